"""Perplexity of a trained model against the probability of bit errors, for four kinds of error.

    python benchmarks/bitflip_perplexity.py [--data ../shared/data] [--characters 50000] [--chips 5]

Model and text: stories260K and the first 50,000 characters of WikiText-2's validation split in windows of 512 tokens, both
from the data folder. Operands of all linear layers inside the blocks pass through a bfloat16 memory
whose bits flip independently; embedding and output head stay clean. The cases:

- `weights`, `inputs`: every bit of the one operand can flip;
- `sign and exponent`, `mantissa`: those bits only, of weights and inputs.

Where sign and exponent can flip, values of at least 1.25 (weights) or 30 (inputs) become 0 after the flips, as in the
published bit-flip pretraining; a mantissa flip changes a value by less than a factor of 2 and needs no such threshold. The
threshold also clears values that are this large without any flip, so the curves that have it need not approach the clean
line for small p: `p = 0` in the result is what threshold and bfloat16 storage cost alone. Weight faults are drawn once per
chip, so their spread over chips is that between devices; input faults are new at every token and average out.

Takes about half an hour on one CPU core. Writes bitflip_perplexity.json and .png into benchmarks/results, anew after each
case.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

import torch  # noqa: E402

from benchmarks import common  # noqa: E402
from evals.chips import TransformList, Trials, text_over_chips  # noqa: E402
from evals.models import EvalModel, load_model  # noqa: E402
from evals.sweep import FIGURES, at_probability, describe, draw  # noqa: E402
from evals.text import Protocol, choose_protocol, evaluate_text, protocol_record  # noqa: E402
from train.job import keep_freed_memory  # noqa: E402
from transforms.specs import BitflipSpec, CellFaults  # noqa: E402

PROBABILITIES = [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
WEIGHTS_BELOW, INPUTS_BELOW = 1.25, 30.0


def cases() -> dict[str, BitflipSpec]:
    """What can fail in each case, at a probability that stands for all."""

    def both(groups: dict[str, Any], thresholds: bool) -> BitflipSpec:
        weight = CellFaults(**groups, zero_above=WEIGHTS_BELOW if thresholds else None)
        inputs = CellFaults(**groups, zero_above=INPUTS_BELOW if thresholds else None)
        return BitflipSpec(kind="bitflip", weight=weight, input=inputs)

    all_bits = both({"sign_exponent": 1.0, "mantissa": 1.0}, True)
    return {
        "weights": all_bits.model_copy(update={"input": None}),
        "inputs": all_bits.model_copy(update={"weight": None}),
        "sign and exponent": both({"sign_exponent": 1.0}, True),
        "mantissa": both({"mantissa": 1.0}, False),
    }


def measure(
    model: EvalModel, spec: BitflipSpec, p: float, trials: Trials, text: Path, protocol: Protocol, clean: dict[str, Any]
) -> dict[str, Any]:
    """One point, as `newcompute sweep-noise` measures it.

    The figures of a chip do not depend on the batch, its time does: where faults are frequent, random words are drawn
    for every bit, and those of a single window stay in the processor's cache.
    """
    noisy = TransformList([at_probability(spec, p)], ["this benchmark"]).attach(model)
    try:
        row = text_over_chips(model, noisy, trials, [text], protocol, 1 if p > 1e-3 else 8, clean)[str(text)]
    finally:
        noisy.detach()
    return {"value": p, **{name: row[name] for name in FIGURES}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--characters", type=int, default=50_000)
    parser.add_argument("--chips", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    model = load_model(str(options.data / "stories260K"), options.device, "float32")
    protocol = choose_protocol(model.context, None, None)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(common.wikitext(options.data)[: options.characters], encoding="utf-8")
        clean = evaluate_text(model, [text], protocol)
        figures = clean[str(text)]
        print(f"clean: {figures['perplexity']:.4f} over {figures['tokens']:,} tokens", flush=True)
        result = {
            "model": "stories260K",
            "text": f"first {options.characters} characters of wikitext-2-valid.txt",
            "tokens": figures["tokens"],
            "protocol": protocol_record(protocol),
            "chips": options.chips,
            "compute": f"float32 on {options.device}",
            "torch": version("torch"),
            "date": datetime.now(UTC).date().isoformat(),
            "clean": figures["perplexity"],
            "cases": {},
        }
        for name, spec in cases().items():
            alone = measure(model, spec, 0.0, Trials("chip", 1), text, protocol, clean)["perplexity"]
            print(f"{name}: {alone:.4f} from storage and threshold alone", flush=True)
            points = []
            for p in PROBABILITIES:
                points.append(measure(model, spec, p, Trials("chip", options.chips), text, protocol, clean))
                print(f"  {describe('p', points[-1])}", flush=True)
            case = {"transforms": spec.model_dump(exclude_none=True), "storage_and_threshold_alone": alone}
            result["cases"][name] = case | {"points": points}
            result["seconds"] = round(time.monotonic() - began)
            write(result, options.out)


def write(result: dict[str, Any], folder: Path) -> None:
    common.write_json(result, folder / "bitflip_perplexity.json")
    curves = {name: case["points"] for name, case in result["cases"].items()}
    title = f"stories260K, WikiText-2 validation, {result['chips']} chips"
    draw(curves, result["clean"], title, folder / "bitflip_perplexity.png")


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    main()
