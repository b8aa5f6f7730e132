"""How much of the damage of bit errors low-rank adapters repair, at laptop size.

    python benchmarks/bitflip_training.py [--data ../shared/data]

The pretrained stories260K on memory that flips all bits of weights and inputs of every linear layer inside the blocks at
2^-10, in bfloat16 storage, behind the thresholds 30 (inputs) and 1.25 (weights). Trained on the first 90% of
tinyshakespeare, tested on the rest (`newcompute eval`, 5 chips):

    repaired = (noisy - LoRA noisy) / (noisy - LoRA trained and tested clean, same steps)

in nats per token, where "noisy" is the model as it was. The adapters also learn the text, in both runs alike; so the
clean model without adapters is given as well. What training from scratch makes of such memory is in
benchmarks/hardware_training.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

from benchmarks import common  # noqa: E402

NOISE = "bitflip_all_bits"
LORA = '[[transforms]]\nkind = "lora"\nrank = 16\nalpha = 32\n'


def lora(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Losses on the last tenth of the text, and the repaired share."""
    text = (options.data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = text.index("\n\n", int(0.9 * len(text))) + 2
    (work / "train.txt").write_text(text[:cut], encoding="utf-8")
    (work / "test.txt").write_text(text[cut:], encoding="utf-8")
    noise_file = common.effect_file(NOISE, work)
    (work / "lora_clean.toml").write_text(LORA, encoding="utf-8")
    (work / "lora_noisy.toml").write_text(LORA + noise_file.read_text(encoding="utf-8"), encoding="utf-8")
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
    common.run("-m", "launch.cli", "prepare", *flags)
    for name in ("lora_clean", "lora_noisy"):
        common.run("train/main.py", "--run.name", name, "--config", str(work / f"{name}.toml"), *flags)

    def tested(reference: Path, *flags: str) -> dict[str, Any]:
        out = work / "eval.json"
        common.run(
            "-m", "launch.cli", "eval", "--model", str(reference), "--text", str(work / "test.txt"), "--context", "256",
            "--out", str(out), *flags,
        )  # fmt: skip
        return json.loads(out.read_text())["text"][str(work / "test.txt")]

    noise = ("--transforms", str(noise_file), "--mode", "chip", "--chips", "5")
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
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="stories260K and text")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "bitflip_training_lora.json")
    options = parser.parse_args()
    options.data = options.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        result = common.origin(common.processor()) | lora(options, Path(folder))
    common.write_json(result, options.out)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
