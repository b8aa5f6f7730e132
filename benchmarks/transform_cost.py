"""What hardware effects cost: time of a training step with them over that of the clean one.

    python benchmarks/transform_cost.py [--models quickstart,60M,200M,1.1B] [--preset FILE.toml ...] [--rounds 6 ...]

Both runs are whole `Trainer`s (FSDP2 on one process, compiled blocks and loss, clipping, fused AdamW) on random rows of
2,048 tokens (quickstart: its own 16 rows of 256), in one process. They take turns in blocks of steps, in changing order,
and a ratio is taken inside a round, between blocks that are seconds apart: a machine's speed drifts by more than the
difference looked for. On CPU the larger models keep their widths but only some layers (`--cpu-layers`), which time and
memory allow; a layer's share of the effect's cost stays what it is, the head's share of the clean time grows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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

from parallel import mesh as meshes  # noqa: E402
from parallel.apply import compute_dtype  # noqa: E402
from train.config import Config, named_shape  # noqa: E402
from train.config_sources import load_config  # noqa: E402
from train.data import PreparedData, RandomRows, RowBatches  # noqa: E402
from train.job import keep_freed_memory  # noqa: E402
from train.trainer import Trainer  # noqa: E402

WARM_STEPS = 3


def configuration(model: str, device: str, layers: int | None, presets: list[str]) -> Config:
    """The run of one model: with the presets, or clean without."""
    if model == "quickstart":
        flags = "--model.size debug --training.global_batch_size 16 --training.sequence_length 256"
    else:
        flags = f"--model.size {model} --training.global_batch_size 1 --training.sequence_length 2048"
    if layers:
        flags += f" --model.shape.num_layers {layers}"
    if model == "quickstart":
        flags += " --model.shape.vocab_size 2048"
    flags += f" --run.device {device} --data.source random --training.steps 100000 --validation.interval 0"
    return load_config(presets, flags.split(), world_size=1)


class Runner:
    """A trainer that is given the same rows again and again."""

    def __init__(self, config: Config, mesh: meshes.Mesh):
        shape = named_shape(config.model)
        rows = RandomRows(shape.vocab_size, config.run.seed)
        self.trainer = Trainer(config, mesh, shape, None, PreparedData(rows, None))
        reader = RowBatches(rows, config, 0, 1, 0, pin=False)
        self.rows = next(iter(reader))
        reader.close()

    def run(self, steps: int) -> float:
        """Seconds of `steps` training steps."""
        device = self.trainer.mesh.device
        begin = self._now(device)
        for _ in range(steps):
            self.trainer.train_step(self.rows)
            self.trainer.step += 1
        return self._now(device) - begin

    @staticmethod
    def _now(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


def measure(model: str, options: argparse.Namespace, mesh: meshes.Mesh) -> dict[str, Any]:
    """Figures of one model: milliseconds of a step clean and transformed, and their ratio."""
    device = mesh.device.type
    layers = None if device == "cuda" else options.cpu_layers.get(model)
    torch._dynamo.reset()
    runners, peak = {}, {}
    for name, presets in (("clean", []), ("transformed", options.preset)):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        runners[name] = Runner(configuration(model, device, layers, presets), mesh)
        compile_seconds = runners[name].run(1)
        runners[name].run(WARM_STEPS)
        if device == "cuda":
            peak[name] = torch.cuda.max_memory_allocated() - before
        print(f"{model} {name}: first step {compile_seconds:.1f} s", flush=True)
    steps = max(1, min(options.max_steps, round(options.seconds / (runners["clean"].run(2) / 2))))
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for r in range(options.rounds):
        for name in list(runners)[:: 1 if r % 2 else -1]:
            runners[name].run(1)
            seconds[name].append(runners[name].run(steps) / steps)
        print(f"{model} round {r + 1}: ratio {seconds['transformed'][-1] / seconds['clean'][-1]:.3f}", flush=True)
    ratios = [noisy / clean for noisy, clean in zip(seconds["transformed"], seconds["clean"])]
    config = runners["transformed"].trainer.config
    return {
        "model": model,
        "layers": named_shape(config.model).num_layers,
        "tokens": config.tokens_per_step,
        "compute_dtype": str(compute_dtype(config, mesh.device)).removeprefix("torch."),
        "steps_per_round": steps,
        "milliseconds_clean": round(1e3 * statistics.median(seconds["clean"]), 2),
        "milliseconds_transformed": round(1e3 * statistics.median(seconds["transformed"]), 2),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "peak_bytes": peak,
    }


def parse() -> argparse.Namespace:
    preset = str(ROOT / "configs" / "transforms" / "bitflip_published.toml")
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--models", default="quickstart,60M,200M,1.1B")
    parser.add_argument("--preset", nargs="+", default=[preset], help="TOML files with [[transforms]]")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=5.0, help="clean time of a block of steps")
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--cpu-layers", type=json.loads, default={"200M": 4, "1.1B": 2})
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/transform_cost_DEVICE.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    mesh = meshes.start(options.device)
    if mesh.device.type == "cpu":
        keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else cpu
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "device": device, "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("torch", "triton")},
        "presets": [Path(name).name for name in options.preset], "load_average_before": os.getloadavg(), "models": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for model in options.models.split(","):
            result["models"].append(measure(model, options, mesh))
    for row in result["models"]:
        print(
            f"{row['model']:>10} ({row['layers']} layers, {row['tokens']} tokens): clean {row['milliseconds_clean']:.1f} ms, "
            f"transformed {row['milliseconds_transformed']:.1f} ms, ratio {row['ratio_median']:.3f} "
            f"({row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
        )
    slug = device.lower().replace(" ", "_") if mesh.device.type == "cuda" else "cpu"
    out = options.out or ROOT / "benchmarks" / "results" / f"transform_cost_{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
