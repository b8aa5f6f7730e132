"""What training under bit errors does to a model, at laptop size.

    python benchmarks/bitflip_training.py quickstart     # three runs of 400 steps on two processes
    python benchmarks/bitflip_training.py lora [--data ../shared/data]

`quickstart`: the quickstart run clean, with mantissa bits flipping at 2^-12, and with all bits flipping at 2^-10 behind
the thresholds 30 (inputs) and 1.25 (weights); all in bfloat16 storage, weights and inputs of every linear layer inside
the blocks. Figures are validation losses in nats per token over the same held-out rows, under the run's own faults and
with them off.

`lora`: the pretrained stories260K on memory that flips all bits at 2^-10 (thresholds as above), and how much of the
damage adapters repair. Trained on the first 90% of tinyshakespeare, tested on the rest (`newcompute eval`, 5 chips):

    repaired = (noisy - LoRA noisy) / (noisy - LoRA trained and tested clean, same steps)

in nats per token, where "noisy" is the model as it was. The adapters also learn the text, in both runs alike; so the
clean model without adapters is given as well.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MANTISSA = '{ kind = "bitflip", weight = { mantissa = 2.44140625e-4 }, input = { mantissa = 2.44140625e-4 } }'
ALL_BITS = (
    '{ kind = "bitflip", weight = { sign_exponent = 9.765625e-4, mantissa = 9.765625e-4, zero_above = 1.25 }, '
    "input = { sign_exponent = 9.765625e-4, mantissa = 9.765625e-4, zero_above = 30.0 } }"
)
LORA = '{ kind = "lora", rank = 16, alpha = 32 }'


def run(*command: str) -> None:
    """Run a command of the project, its output to ours.

    Raises:
        CalledProcessError: it failed.
    """
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | environment, check=True)


def last_validation(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key: round(value, 5) for key, value in rows[-1].items() if key.startswith("val_loss")}


def quickstart(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Validation losses of the three runs."""
    losses = {}
    run("-m", "launch.cli", "prepare", "--config", "configs/quickstart.toml", "--data.dir", str(work / "data"))
    for name, transforms in (("clean", ""), ("mantissa 2^-12", MANTISSA), ("all bits 2^-10", ALL_BITS)):
        slug = name.replace(" ", "_").replace("^", "")
        run(
            "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train/main.py",
            "--config", "configs/quickstart.toml", "--run.name", slug, "--run.dir", str(work),
            "--data.dir", str(work / "data"), "--transforms", f"[{transforms}]",
            "--validation.transforms", "both" if transforms else "same",
            "--validation.interval", "400", "--checkpoint.interval", "0",
        )  # fmt: skip
        losses[name] = last_validation(work / slug)
    clean = losses["clean"]["val_loss"]
    relative = {name: round(row["val_loss"] / clean - 1, 5) for name, row in losses.items() if name != "clean"}
    return {"validation": losses, "loss_relative_to_clean": relative}


def lora(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Losses on the last tenth of the text, and the repaired share."""
    text = (options.data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = text.index("\n\n", int(0.9 * len(text))) + 2
    (work / "train.txt").write_text(text[:cut], encoding="utf-8")
    (work / "test.txt").write_text(text[cut:], encoding="utf-8")
    (work / "noise.toml").write_text(f"transforms = [{ALL_BITS}]\n", encoding="utf-8")
    model = options.data / "stories260K"
    flags = (
        "--run.dir", str(work), "--run.device", "cpu", "--model.name", "llama3", "--model.init_from", f"hf:{model}",
        "--tokenizer.kind", "hf", "--tokenizer.path", str(model),
        "--data.dir", str(work / "data"), "--data.source", "files",
        "--data.paths", json.dumps([str(work / "train.txt")]), "--data.validation_fraction", "0.02",
        "--training.steps", str(options.steps), "--training.global_batch_size", "16",
        "--training.sequence_length", "256", "--optimizer.lr", "4e-3", "--optimizer.weight_decay", "0.0",
        "--validation.interval", "0", "--checkpoint.interval", str(options.steps), "--metrics.log_interval", "50",
    )  # fmt: skip
    run("-m", "launch.cli", "prepare", *flags)
    for name, transforms in (("lora_clean", f"[{LORA}]"), ("lora_noisy", f"[{LORA}, {ALL_BITS}]")):
        run("train/main.py", "--run.name", name, "--transforms", transforms, *flags)

    def tested(reference: Path, *flags: str) -> dict[str, Any]:
        out = work / "eval.json"
        run(
            "-m", "launch.cli", "eval", "--model", str(reference), "--text", str(work / "test.txt"), "--context", "256",
            "--out", str(out), *flags,
        )  # fmt: skip
        return json.loads(out.read_text())["text"][str(work / "test.txt")]

    noise = ("--transforms", str(work / "noise.toml"), "--mode", "chip", "--chips", "5")
    found = {"without adapters, noisy": tested(model, *noise)}
    found["adapters trained noisy, noisy"] = tested(work / "lora_noisy", *noise)
    found["adapters trained clean, noisy"] = tested(work / "lora_clean", *noise)
    found["adapters trained clean, clean"] = tested(work / "lora_clean")
    found["without adapters, clean"] = tested(model)
    losses = {name: round(math.log(row["perplexity"]), 5) for name, row in found.items()}
    noisy, repaired = losses["without adapters, noisy"], losses["adapters trained noisy, noisy"]
    share = (noisy - repaired) / (noisy - losses["adapters trained clean, clean"])
    return {
        "steps": options.steps,
        "log_perplexity": losses,
        "perplexity": {
            name: {k: v for k, v in row.items() if k.startswith("perplexity")} for name, row in found.items()
        },
        "repaired": round(share, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("part", choices=["quickstart", "lora"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="lora: stories260K and text")
    parser.add_argument("--steps", type=int, default=400, help="lora: training steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.data = options.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        figures = {"quickstart": quickstart, "lora": lora}[options.part](options, Path(folder))
    result = {
        "date": datetime.now(UTC).date().isoformat(), "device": "cpu", "versions": {"torch": version("torch")}, **figures
    }  # fmt: skip
    out = options.out or ROOT / "benchmarks" / "results" / f"bitflip_training_{options.part}.json"
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
