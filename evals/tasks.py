"""lm-eval tasks on a loaded model: its own ones by name, or a local YAML file or folder."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from evals.models import EvalModel
from evals.progress import library_bars


def evaluate_tasks(
    model: EvalModel,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """{task: {metric: value}} as lm-eval reports them.

    Args:
        tasks: names, or paths of YAML files.
        include_path: folder with further task definitions.
        limit: examples per task, for a quick look.
        trust_remote_code: let a task fetch a metric from the Hub, which is Python code; lm-eval's own metrics need none.

    Raises:
        ValueError: a task is not known, or needs code from the Hub that was not allowed; or the model is an encoder.
    """
    if model.masked:
        raise ValueError(f"--tasks: {model.name} is a masked encoder, and lm-eval's tasks continue a text")
    import lm_eval

    names, manager = find_tasks(tasks, include_path)
    wrapped = _behind_one_bos()(
        pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size, max_length=model.context
    )
    # What lm-eval prints on the way would stand in the middle of the result.
    with (
        _metrics_from_the_hub(trust_remote_code),
        library_bars(", ".join(names), *_with_bars()),
        redirect_stdout(io.StringIO()),
    ):
        results = lm_eval.simple_evaluate(wrapped, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=1000)
    return {
        task: {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in results["results"].items()
    }


def _with_bars() -> list[ModuleType]:
    """lm-eval's modules that draw bars."""
    modules = [module for name, module in sys.modules.items() if name.startswith("lm_eval.")]
    return [module for module in modules if isinstance(vars(module).get("tqdm"), type)]


@cache
def _behind_one_bos() -> Any:
    """lm-eval's model of a transformers model, which scores a text by windows as training has seen it: behind one BOS."""
    from lm_eval.models.huggingface import HFLM

    class BehindOneBOS(HFLM):
        add_bos_token: bool | None

        def loglikelihood_rolling(self, *args: Any, **options: Any) -> list[float]:
            # lm-eval puts the BOS before such a text itself. The tokenizer's own would be a second one, and be scored.
            usual, self.add_bos_token = self.add_bos_token, False
            try:
                scores: list[float] = super().loglikelihood_rolling(*args, **options)
                return scores
            finally:
                self.add_bos_token = usual

    return BehindOneBOS


def find_tasks(tasks: Sequence[str], include_path: str | None = None) -> tuple[list[str], Any]:
    """The names of tasks that are given by name or file, and lm-eval's index of them; no model is needed for that.

    Raises:
        ValueError: a task is not known, or a file is not there or no task.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path {include_path}: no such folder")
    folders = [include_path] if include_path else []
    names = []
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            if not Path(task).is_file():
                raise ValueError(f"--tasks {task}: no such file")
            folders.append(str(Path(task).resolve().parent))
            names.append(_task_name(Path(task)))
        else:
            names.append(task)
    manager = _task_manager(tuple(folders))
    known = set(manager.all_tasks)
    unknown = [name for name in names if name not in known and "*" not in name]
    if unknown:
        raise ValueError(
            f"--tasks: lm-eval knows no {', '.join(unknown)}; --include-path names a folder of your own tasks"
        )
    return names, manager


@contextmanager
def _metrics_from_the_hub(allowed: bool) -> Iterator[None]:
    """Beyond its own metrics lm-eval asks `evaluate`, whose modules are scripts that it downloads and runs."""
    import evaluate

    load, refused = evaluate.load, []

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        refused.append(name)
        raise ValueError(f"the metric {name!r} is code from the Hub")

    if not allowed:
        evaluate.load = refuse
    try:
        yield
    except Exception:
        if not refused:
            raise  # of a refusal lm-eval says only what follows from it
    finally:
        evaluate.load = load
    if refused:
        raise ValueError(
            f"--tasks: the metric {refused[0]!r} is Python code on the Hub, which is not run unless asked for: if you trust "
            "it give --trust-remote-code"
        )


@cache
def _task_manager(folders: tuple[str, ...]) -> Any:
    """lm-eval's index of tasks, which takes it seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders) or None)


def _task_name(file: Path) -> str:
    """The `task:` of a YAML file (read as text: lm-eval's own tags are no plain YAML)."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("task:"):
            return line.partition(":")[2].strip().strip("\"'")
    raise ValueError(f"--tasks {file}: the file has no `task:` line")
