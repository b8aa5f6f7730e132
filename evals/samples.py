"""Samples of a run's text, kept beside its metrics: `samples.jsonl`, one object with step, prompt and text per line."""

from __future__ import annotations

import json
from collections.abc import Sequence

from evals.runs import Run

NEW_TOKENS = 64


def add_samples(run: Run, prompts: Sequence[str]) -> None:
    """Continue the prompts greedily, without hardware effects, with the latest checkpoint (or RUN/export, where none is left).

    Raises:
        ValueError: the run has neither, or no tokenizer.
    """
    from evals.generate import generate
    from evals.models import load_model

    export = run.path / "export"
    if run.saved is not None:
        source, step = run.path, run.saved.step
    elif (export / "config.json").exists():
        source, step = export, _exported_step(export)
    else:
        raise ValueError(
            f"{run.path} has neither a complete checkpoint nor an export/: nothing to generate samples with"
        )
    model = load_model(str(source))
    kept = [s for s in run.samples if s["step"] != step or s["prompt"] not in prompts]
    new = [{"step": step, "prompt": p, "text": generate(model, p, NEW_TOKENS)} for p in dict.fromkeys(prompts)]
    text = "".join(json.dumps(sample) + "\n" for sample in [*kept, *new])
    (run.path / "samples.jsonl").write_text(text, encoding="utf-8")


def _exported_step(export) -> int:
    try:
        return int(json.loads((export / "newcompute.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
