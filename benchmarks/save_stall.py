"""What a checkpoint costs the training beside it: an asynchronous save against a synchronous one, in one run.

    OMP_NUM_THREADS=1 python benchmarks/save_stall.py [--size 60M --rounds 5 --out benchmarks/results/save_stall.json]

A round is a few plain steps, a save that training waits for, plain steps again, and a save that runs beside the steps. Of
the last, `stall` is what the loop stands still for (handing the state over, and waiting for the copy before the optimizer
changes it), and `lost` is all of the time by which the steps during the save take longer than the median plain step
around it: on a CPU the thread that writes takes its share of the cores as well. Both are given relative to the
synchronous save of the same round.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from models.sizes import num_parameters  # noqa: E402
from parallel import mesh as meshes  # noqa: E402
from train.config import named_shape  # noqa: E402
from train.config_sources import load_config  # noqa: E402
from train.data import PreparedData, RandomRows  # noqa: E402
from train.job import keep_freed_memory  # noqa: E402
from train.trainer import Trainer  # noqa: E402

PLAIN_STEPS = 6


class Bench:
    """A trainer whose steps and saves are timed."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.rows = iter(trainer.batches)
        self.waited = 0.0
        wait_copied = trainer.checkpoints.wait_copied

        def timed_wait() -> None:
            start = time.perf_counter()
            wait_copied()
            self.waited += time.perf_counter() - start

        trainer.checkpoints.wait_copied = timed_wait  # type: ignore[method-assign]

    def step(self) -> float:
        """Seconds of a training step."""
        start = self._now()
        self.trainer.train_step(next(self.rows))
        self.trainer.step += 1
        self.trainer.agreement.finish()
        return self._now() - start

    def save(self) -> float:
        """Seconds of a save that training waits for."""
        start = self._now()
        self.trainer.begin_save()
        self._settle()
        return self._now() - start

    def save_beside(self, plain: float) -> tuple[float, float, int]:
        """(stall, lost) in seconds, and the steps made during the save; `plain` is what a step takes otherwise."""
        self.waited = 0.0
        start = self._now()
        self.trainer.begin_save()
        begin = time.perf_counter() - start
        steps = []
        while self.trainer.checkpoints.busy or not steps:
            steps.append(self.step())
        self._settle()
        return begin + self.waited, begin + sum(steps) - plain * len(steps), len(steps)

    def _settle(self) -> None:
        saved = self.trainer.checkpoints.settle(self.trainer.step)
        assert saved is not None
        assert not saved.problem, saved.problem

    def _now(self) -> float:
        if self.trainer.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="60M", help="of the clm family")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--dir", help="where the checkpoints go; default a temporary folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        flags = f"--model.size {options.size} --training.global_batch_size {options.rows} --data.source random"
        flags += f" --training.steps 100000 --validation.interval 0 --checkpoint.keep 1 --run.dir {folder}"
        config = load_config([], flags.split())
        mesh = meshes.start(config.run.device)
        if mesh.device.type == "cpu":
            keep_freed_memory()
        shape = named_shape(config.model)
        trainer = Trainer(config, mesh, shape, None, PreparedData(RandomRows(shape.vocab_size, 0), None))
        trainer.resume()
        bench, rounds = Bench(trainer), []
        for _ in range(3):
            bench.step()
        bench.save()  # the first one allocates the copy in host memory
        for r in range(options.rounds):
            before = [bench.step() for _ in range(PLAIN_STEPS)]
            waited = bench.save()
            bench.step()
            between = [bench.step() for _ in range(PLAIN_STEPS)]
            stall, lost, steps = bench.save_beside(statistics.median(before + between))
            rounds.append({
                "step_ms": 1e3 * statistics.median(before + between),
                "synchronous_ms": 1e3 * waited,
                "stall_ms": 1e3 * stall,
                "lost_ms": 1e3 * lost,
                "steps_during_save": steps,
                "stall_ratio": stall / waited,
                "lost_ratio": lost / waited,
            })  # fmt: skip
            row = rounds[-1]
            print(
                f"round {r + 1}: step {row['step_ms']:.0f} ms, synchronous save {row['synchronous_ms']:.0f} ms; beside "
                f"{steps} steps: stall {row['stall_ms']:.1f} ms ({row['stall_ratio']:.1%}), lost in all {row['lost_ms']:.0f} ms "
                f"({row['lost_ratio']:.1%})",
                flush=True,
            )
        trainer.batches.close()
        dist.destroy_process_group()
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else f"cpu, {os.cpu_count()} cores"
    record = {
        "size": options.size,
        "parameters": num_parameters(shape),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "date": datetime.now(UTC).date().isoformat(),
        "stall_ratio_median": statistics.median(row["stall_ratio"] for row in rounds),
        "stall_ratio_largest": max(row["stall_ratio"] for row in rounds),
        "lost_ratio_median": statistics.median(row["lost_ratio"] for row in rounds),
        "rounds": rounds,
    }
    print(f"stall {record['stall_ratio_median']:.2%} (median), {record['stall_ratio_largest']:.2%} (largest) of a save")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
