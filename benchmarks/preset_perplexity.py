"""Perplexity of a trained model on every hardware of `configs/transforms/`, without any training on it.

    python benchmarks/preset_perplexity.py [--data ../shared/data] [--characters 50000] [--chips 8] [--presets int8,mxfp4]

Model and text: stories260K and the first characters of WikiText-2's validation split, in windows of 512 tokens, both from
the data folder. Effects that draw random numbers are measured on several simulated chips, the others once. Ranges of
converters are calibrated on the text that follows, as many characters again, which is not evaluated.

Writes benchmarks/results/preset_perplexity.json after each preset, and docs/preset-perplexity.md from it at the end
(`--table`: only that).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

import torch  # noqa: E402

from benchmarks import common  # noqa: E402
from evals.calibrate import calibrate  # noqa: E402
from evals.chips import Trials, read_transforms, text_over_chips  # noqa: E402
from evals.models import EvalModel, load_model  # noqa: E402
from evals.text import Protocol, choose_protocol, evaluate_text, protocol_record  # noqa: E402
from train.job import keep_freed_memory  # noqa: E402

HEAD = """# Trained models on each kind of hardware

`python benchmarks/preset_perplexity.py`, result `{file}`: the pretrained {model} (clean perplexity {clean:.2f}, {tokens:,}
scored tokens) under every preset of `configs/transforms/`, without any training on it. Text: {text}, in windows
of {context} tokens, without BOS. Mean ± sample standard deviation over {chips} simulated chips where the effect draws random
numbers; the others are the same on every chip. Ranges of converters are calibrated on the text that follows. {compute}, torch
{torch}, {device}, {date}, commit {commit}.

| preset | perplexity | against clean | chips |
|---|---|---|---|
"""


def measure(
    model: EvalModel, preset: str, chips: int, text: Path, calibration: Path, protocol: Protocol, clean: dict[str, Any]
) -> dict[str, Any]:
    """Figures of one preset."""
    transforms = read_transforms([str(common.PRESETS / f"{preset}.toml")], model.name)
    noisy = transforms.attach(model)
    try:
        ranges = calibrate(model, noisy, [calibration], protocol) if noisy.noise.ranges else {}
        found = text_over_chips(model, noisy, Trials("chip", chips), [text], protocol, clean=clean)[str(text)]
        random = noisy.noise.random
    finally:
        noisy.detach()
    kept = (
        "perplexity",
        "perplexity_std",
        "perplexity_per_chip",
        "bits_per_byte",
        "bits_per_byte_std",
        "non_finite_chips",
    )
    return {
        "preset": preset, "transforms": transforms.record(), "random": random, "calibrated_ranges": len(ranges),
        "chips": len(found["perplexity_per_chip"]), **{key: found[key] for key in kept},
    }  # fmt: skip


def page(result: dict[str, Any], file: str) -> str:
    fixed = {
        key: result[key] for key in ("model", "clean", "tokens", "text", "chips", "compute", "device", "date", "commit")
    }
    head = HEAD.format(file=file, context=result["protocol"]["context"], torch=result["versions"]["torch"], **fixed)
    lines = []
    for row in result["presets"]:
        mean, std = row["perplexity"], row["perplexity_std"]
        figure = "not finite" if mean is None else f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")
        difference = "" if mean is None else f"{100 * (mean / result['clean'] - 1):+.2f}%"
        bad = f", {row['non_finite_chips']} not finite" if row["non_finite_chips"] else ""
        chips = f"{row['chips']}{bad}" if row["random"] else f"not random{bad}"
        lines.append(f"| `{row['preset']}` | {figure} | {difference} | {chips} |")
    return head + "\n".join(lines) + "\n"


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measures all presets; the result is written after each."""
    model = load_model(str(options.data / "stories260K"), options.device, "float32")
    protocol = choose_protocol(model.context, None, None)
    whole = common.wikitext(options.data)
    if len(whole) < 2 * options.characters:
        raise SystemExit(
            f"--characters {options.characters}: the text has {len(whole)}, half of which can be evaluated"
        )
    text, calibration = work / "text.txt", work / "calibration.txt"
    text.write_text(whole[: options.characters], encoding="utf-8")
    calibration.write_text(whole[options.characters : 2 * options.characters], encoding="utf-8")
    clean = evaluate_text(model, [text], protocol)
    device = torch.cuda.get_device_name() if model.model.device.type == "cuda" else common.processor()
    result: dict[str, Any] = common.origin(device) | {
        "model": "stories260K", "text": f"first {options.characters:,} characters of wikitext-2-valid.txt",
        "tokens": clean[str(text)]["tokens"], "protocol": protocol_record(protocol), "chips": options.chips,
        "compute": "float32", "clean": clean[str(text)]["perplexity"], "presets": [],
    }  # fmt: skip
    print(f"clean: {result['clean']:.4f} over {result['tokens']:,} tokens", flush=True)
    for preset in options.presets:
        result["presets"].append(measure(model, preset, options.chips, text, calibration, protocol, clean))
        common.write_json(result, options.out)
        row = result["presets"][-1]
        print(f"  {preset}: {row['perplexity']} ± {row['perplexity_std']}, {row['chips']} chips", flush=True)
    return result


def main() -> None:
    known = sorted(file.stem for file in common.PRESETS.glob("*.toml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--characters", type=int, default=50_000)
    parser.add_argument("--chips", type=int, default=8)
    parser.add_argument("--presets", default=",".join(known), help="comma-separated; default: all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=common.RESULTS / "preset_perplexity.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "preset-perplexity.md")
    parser.add_argument("--table", action="store_true", help="only write the page, from the result file")
    options = parser.parse_args()
    options.presets = options.presets.split(",")
    for name in options.presets:
        if name not in known:
            parser.error(f"--presets: {name!r} is none of {', '.join(known)}")
    if options.table:
        result = json.loads(options.out.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = run(options, Path(folder))
    options.page.write_text(page(result, options.out.name), encoding="utf-8")
    print(f"wrote {options.page}")


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    main()
