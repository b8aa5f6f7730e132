"""What hardware effects cost: time of a training step with them over that of the clean one.

    python benchmarks/transform_cost.py [--models 60M,200M] [--effects int8,optical_8bit] [--minutes 5 --rounds 6 ...] [--resume]

Both runs are whole `Trainer`s (FSDP2 on one process, compiled blocks and loss, clipping, fused AdamW) on random rows of
2,048 tokens (quickstart: its own 16 rows of 256), in one process; on a GPU in bfloat16, on a CPU in float32. They take turns
in blocks of steps, in changing order, and a ratio is taken inside a round, between blocks that are seconds apart: a
machine's speed drifts by more than the difference looked for. The rows lie on the device from the start, and on a GPU a step
has enough of them that it takes longer than the host needs to launch it. On CPU the larger models keep their widths but only
some layers (`--cpu-layers`), which time and memory allow; a layer's share of the effect's cost stays what it is, the head's
share of the clean time grows.

The result is written after each effect; with `--resume`, those in it are kept. Exit codes: 0, all is measured; 1, an effect
failed; 75, the minutes are over and `--resume` goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

# As the launchers have it; torch reads it when it first allocates.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402

from benchmarks import common  # noqa: E402
from parallel import mesh as meshes  # noqa: E402
from parallel.apply import compute_dtype  # noqa: E402
from train.config import Config, named_shape  # noqa: E402
from train.config_sources import load_config  # noqa: E402
from train.data import PreparedData, RandomRows, RowBatches  # noqa: E402
from train.job import keep_freed_memory  # noqa: E402
from train.trainer import Trainer  # noqa: E402

WARM_STEPS = 3
GOALS = {
    "bitflip_published": 1.05, "int8": 1.05, "bitnet_b158": 1.05, "mxfp4": 1.05, "fp8_e4m3": 1.05,
    "optical_linear": 1.15, "optical_8bit": 1.15, "optical_tiled": 1.15,
}  # fmt: skip
"""The effects that are measured, and what a step may take over a clean one on a GPU."""
MODELS = {"cpu": "quickstart,60M", "cuda": "60M"}
ROUNDS = {"cpu": 6, "cuda": 4}
SECONDS = {"cpu": 5.0, "cuda": 1.5}
"""Clean time of a block of steps."""
GPU_ROWS = {"60M": 48, "200M": 24, "400M": 16, "1.1B": 8}
"""Rows of 2,048 tokens that a GPU of 80 GB takes at once. With fewer, its kernels end before the host has launched the
next ones, and what is measured is the host. A CPU takes one row."""
EXIT_FAILED, EXIT_UNFINISHED = 1, 75


def configuration(
    model: str, device: str, layers: int | None, rows: int, files: list[str], further: list[str]
) -> Config:
    """The run of one model: with the transforms of `files`, or clean without."""
    if model == "quickstart":
        flags = "--model.size debug --training.global_batch_size 16 --training.sequence_length 256"
    else:
        flags = f"--model.size {model} --training.global_batch_size {rows} --training.sequence_length 2048"
    if layers:
        flags += f" --model.shape.num_layers {layers}"
    if model == "quickstart":
        flags += " --model.shape.vocab_size 2048"
    flags += f" --run.device {device} --data.source random --training.steps 100000 --validation.interval 0"
    return load_config(files, [*flags.split(), *further], world_size=1)


class Runner:
    """A trainer that is given the same rows again and again."""

    def __init__(self, config: Config, mesh: meshes.Mesh):
        shape = named_shape(config.model)
        rows = RandomRows(shape.vocab_size, config.run.seed)
        self.trainer = Trainer(config, mesh, shape, None, PreparedData(rows, None))
        reader = RowBatches(rows, config, 0, 1, 0, pin=False)
        self.rows = next(iter(reader)).to(mesh.device)
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


def measure(model: str, file: Path, options: argparse.Namespace, mesh: meshes.Mesh) -> dict[str, Any]:
    """Figures of one model under one effect: milliseconds of a step clean and transformed, and their ratio."""
    device = mesh.device.type
    layers = None if device == "cuda" else options.cpu_layers.get(model)
    num_rows = options.rows or (GPU_ROWS.get(model, 16) if device == "cuda" else 1)
    torch._dynamo.reset()
    runners, peak = {}, {}
    for name, files in (("clean", []), ("transformed", [str(file)])):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        runners[name] = Runner(configuration(model, device, layers, num_rows, files, options.flags), mesh)
        compile_seconds = runners[name].run(1)
        runners[name].run(WARM_STEPS)
        if device == "cuda":
            peak[name] = torch.cuda.max_memory_allocated() - before
        print(f"{model} {file.stem} {name}: first step {compile_seconds:.1f} s", flush=True)
    steps = max(1, min(options.max_steps, round(options.seconds / (runners["clean"].run(2) / 2))))
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for r in range(options.rounds):
        for name in list(runners)[:: 1 if r % 2 else -1]:
            runners[name].run(1)
            seconds[name].append(runners[name].run(steps) / steps)
        print(
            f"{model} {file.stem} round {r + 1}: ratio {seconds['transformed'][-1] / seconds['clean'][-1]:.3f}",
            flush=True,
        )
    ratios = [noisy / clean for noisy, clean in zip(seconds["transformed"], seconds["clean"])]
    config = runners["transformed"].trainer.config
    return {
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
    parser = argparse.ArgumentParser(description="See the head of this file. Other flags go to the configuration.")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--models", help=f"comma-separated; default: {MODELS['cpu']} on CPU, {MODELS['cuda']} on a GPU")
    parser.add_argument("--effects", default=",".join(GOALS), help="presets of configs/transforms and others by name")
    parser.add_argument(
        "--rows", type=int, help=f"rows of 2,048 tokens in a step; default: 1 on CPU, on a GPU {GPU_ROWS}"
    )
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS['cpu']} on CPU, {ROUNDS['cuda']} on a GPU")
    parser.add_argument("--seconds", type=float, help="clean time of a block of steps; default: 5 on CPU, 1.5 on a GPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for everything; default: no limit")
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--cpu-layers", type=json.loads, default={"200M": 4, "1.1B": 2})
    parser.add_argument("--resume", action="store_true", help="keep what the result file has")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/transform_cost_DEVICE.json")
    options, options.flags = parser.parse_known_args()
    options.effects = options.effects.split(",")
    unknown = [name for name in options.effects if name not in common.effects()]
    if unknown:
        parser.error(f"--effects: {unknown[0]!r} is none of {', '.join(common.effects())}")
    return options


def one(model: str, effect: str, options: argparse.Namespace, mesh: meshes.Mesh, work: Path) -> dict[str, Any]:
    """The row of one model and effect; where the memory is too small it says so."""
    file = common.effect_file(effect, work)
    row: dict[str, Any] = {"model": model, "effect": effect, "transforms": common.tables(file)}
    row["load_average_before"] = os.getloadavg()
    try:
        row |= measure(model, file, options, mesh)
    except torch.OutOfMemoryError as error:
        print(f"{model} {effect}: {error}", flush=True)
        row["out_of_memory"] = True
    except Exception as error:  # of one effect, which keeps no other from being measured
        traceback.print_exc()
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    gc.collect()  # trainers hold themselves in cycles
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
        row["goal"] = GOALS.get(effect)
    return row


def summary(row: dict[str, Any]) -> str:
    """A row in words."""
    if row.get("out_of_memory"):
        return f"{row['model']:>10} {row['effect']:>18}: not enough memory"
    if row.get("failed"):
        return f"{row['model']:>10} {row['effect']:>18}: failed: {row['failed']}"
    goal = f", goal {row['goal']:.2f}" if row.get("goal") else ""
    return (
        f"{row['model']:>10} {row['effect']:>18} ({row['layers']} layers, {row['tokens']} tokens): clean "
        f"{row['milliseconds_clean']:.1f} ms, with the effect {row['milliseconds_transformed']:.1f} ms, ratio "
        f"{row['ratio_median']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f}){goal}"
    )


def main() -> None:
    begin, options = time.monotonic(), parse()
    mesh = meshes.start(options.device)
    kind = mesh.device.type
    if kind == "cpu":
        keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")
    device = torch.cuda.get_device_name() if kind == "cuda" else common.processor()
    options.rounds = options.rounds or ROUNDS[kind]
    options.seconds = SECONDS[kind] if options.seconds is None else options.seconds
    slug = device.lower().replace(" ", "_") if kind == "cuda" else "cpu"
    out = (options.out or common.RESULTS / f"transform_cost_{slug}.json").absolute()
    made = common.origin(device, ("torch", "triton")) | {"flags": options.flags} | {"threads": torch.get_num_threads()}
    rows: list[dict[str, Any]] = []
    if options.resume and out.exists():
        rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    # What other code or another device has measured is made again; until then it stays.
    same = {key: made[key] for key in ("sources", "device", "flags")}
    done = {(row["model"], row["effect"]) for row in rows if same.items() <= row.items() and not row.get("failed")}
    wanted = [(model, effect) for model in (options.models or MODELS[kind]).split(",") for effect in options.effects]
    longest, unfinished = 0.0, False
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for model, effect in wanted:
            if (model, effect) in done:
                continue
            started = time.monotonic()
            if started - begin + 0.7 * longest > 60 * options.minutes:
                unfinished = True
                break
            rows = [row for row in rows if (row["model"], row["effect"]) != (model, effect)]
            rows.append(one(model, effect, options, mesh, Path(folder)) | made)
            common.write_json({"rows": rows}, out)
            longest = max(longest, time.monotonic() - started)
        os.chdir(common.ROOT)  # the folder is removed
    for row in rows:
        print(summary(row))
    print(f"wrote {out}" + ("; the minutes are over, --resume goes on" if unfinished else ""), flush=True)
    torch.distributed.destroy_process_group()
    if any(row.get("failed") for row in rows if (row["model"], row["effect"]) in wanted):
        raise SystemExit(EXIT_FAILED)
    if unfinished:
        raise SystemExit(EXIT_UNFINISHED)


if __name__ == "__main__":
    main()
