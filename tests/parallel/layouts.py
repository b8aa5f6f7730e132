"""Train a few steps on any layout and record what has to be the same on all of them.

`run` does it with this process, `Pool` with worker processes that live as long as the tests (a torchrun each would cost
seconds): losses, initial weights, and every gradient of every step as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"dim": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 128}


@dataclass
class Record:
    """What a run computed; gradients before clipping, by step and parameter."""

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Before a checkpoint is loaded."""
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    loaded: dict[str, Tensor] = field(default_factory=dict)
    """Weights and moments after a checkpoint was loaded, if there was one."""
    final: dict[str, Tensor] = field(default_factory=dict)
    """Weights and moments at the end."""
    rows: dict[str, str] = field(default_factory=dict)
    """A digest of each row by "step number", as it was trained on."""


def flags(folder: Path, corpus: Path, name: str, **changes: object) -> list[str]:
    """Flags of a ten-step run; `changes` are settings with "__" for the dot."""
    from support import tiny_flags

    settings: dict[str, object] = {
        **{f"model__shape__{key}": value for key, value in SHAPE.items()},
        "training__steps": 10,
        "training__sequence_length": 32,
        "schedule__warmup_steps": 2,
        "validation__interval": 10,
        "checkpoint__interval": 0,
    }
    return tiny_flags(folder, corpus, name, **(settings | changes))


def run(arguments: Sequence[str]) -> Record:
    """Run a job in this process, which may be one of several; losses are those of the main process."""
    from support import read_metrics

    from parallel import gradients
    from parallel.names import named_parameters
    from train import trainer
    from train.config_sources import load_config
    from train.job import run_job

    record = Record()
    config = load_config([], arguments, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    clip, resume, train_step = gradients.clip, trainer.Trainer.resume, trainer.Trainer.train_step
    current: list[trainer.Trainer] = []

    def whole(tensor: Tensor) -> Tensor:
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        tensor = getattr(tensor, "_tensor", tensor)  # torchao's wrapper of weights that are gathered as float8
        return tensor.detach().clone()

    def noting_resume(self):
        current.append(self)
        record.weights = {name: whole(p) for name, p in named_parameters(*self.parts)}
        found = resume(self)
        if found:
            record.loaded = state()
        return found

    def state():
        return {name: whole(tensor) for name, tensor in current[-1].checkpoints._state().items()}

    def noting_step(self, rows):
        for i, row in enumerate(rows):
            digest = hashlib.sha256(row.numpy().tobytes()).hexdigest()
            record.rows[f"step {self.step + 1}, row {self.first_row() + i}"] = digest
        found = train_step(self, rows)
        if self.step + 1 == self.last_step:
            record.final = state()
        return found

    def noting_clip(parameters, *rest):
        names = {id(p): name for name, p in named_parameters(*current[-1].parts)}
        found = {names[id(p)]: whole(p.grad) for p in parameters if p.grad is not None}
        record.gradients.append(found)
        return clip(parameters, *rest)

    gradients.clip, trainer.Trainer.resume, trainer.Trainer.train_step = noting_clip, noting_resume, noting_step
    try:
        run_job(config)
    finally:
        gradients.clip, trainer.Trainer.resume, trainer.Trainer.train_step = clip, resume, train_step
    rows = read_metrics(Path(config.run.dir) / config.run.name)
    record.losses = [row["loss"] for row in rows if "loss" in row]
    record.validation = [row["val_loss"] for row in rows if "val_loss" in row]
    return record


class Pool:
    """Worker processes that train jobs together, one after the other."""

    def __init__(self, size: int, folder: Path):
        self.size, self.folder, self.jobs = size, folder, 0
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        self.logs = [folder / f"worker-{size}-{rank}.log" for rank in range(size)]
        self.workers = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=open(self.logs[rank], "w"),  # noqa: SIM115 - the worker's
                text=True,
                env=environment,
            )
            for rank in range(size)
        ]

    def run(self, arguments: Sequence[str]) -> Record:
        """The merged record of a job; a failed one stops the pool.

        Raises:
            AssertionError: a worker failed; with what it printed.
        """
        self.jobs += 1
        out = self.folder / f"job-{self.size}-{self.jobs}"
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.write(json.dumps({"arguments": list(arguments), "port": port, "out": str(out)}) + "\n")
            worker.stdin.flush()
        answers = self._answers()
        if answers != {"done"}:
            self.close()
            log = "\n".join(path.read_text()[-3000:] for path in self.logs)
            raise AssertionError(f"workers answered {answers}\n{log}")
        merged = Record()
        for rank in range(self.size):
            part = Record(**torch.load(f"{out}-{rank}.pt"))
            os.unlink(f"{out}-{rank}.pt")
            if rank == 0:  # which has written them
                merged.losses, merged.validation = part.losses, part.validation
            merged.weights |= part.weights
            merged.loaded |= part.loaded
            merged.final |= part.final
            for row, digest in part.rows.items():
                assert merged.rows.setdefault(row, digest) == digest, f"ranks disagree about {row}"
            merged.gradients = merged.gradients or [{} for _ in part.gradients]
            for whole, some in zip(merged.gradients, part.gradients, strict=True):
                for name, gradient in some.items():
                    assert torch.equal(whole.setdefault(name, gradient), gradient), f"ranks disagree about {name}"
        return merged

    def _answers(self) -> set[str]:
        """What the workers say; the first that fails leaves the others waiting for it."""
        waiting = {worker.stdout: worker for worker in self.workers}
        answers = set()
        while waiting and answers <= {"done"}:
            ready = select.select(list(waiting), [], [], 300)[0]
            answers |= {pipe.readline().strip() for pipe in ready} or {"nothing for 300 s"}
            for pipe in ready:
                del waiting[pipe]
        return answers

    @property
    def alive(self) -> bool:
        return all(worker.poll() is None for worker in self.workers)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()


def difference(expected: Record, found: Record) -> tuple[float, float, str]:
    """Largest relative difference (2-norm) of a parameter's gradient: at the first step, at any, and where that was."""
    first, largest, where = 0.0, 0.0, ""
    for step, (wanted, seen) in enumerate(zip(expected.gradients, found.gradients, strict=True)):
        assert wanted.keys() == seen.keys()
        for name, gradient in wanted.items():
            relative = float((gradient - seen[name]).norm() / gradient.norm())
            first = max(first, relative) if step == 0 else first
            if relative > largest:
                largest, where = relative, f"step {step + 1}, {name}"
    return first, largest, where


def serve(rank: int, size: int) -> None:
    """Take jobs from standard input until it ends; answer "done" or the error."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(job["port"]),
        }
        try:
            torch.save(vars(run(job["arguments"])), f"{job['out']}-{rank}.pt")
            answer = "done"
        except BaseException as error:
            import traceback

            traceback.print_exc()
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")[:500]
        torch.compiler.reset()
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    serve(int(sys.argv[1]), int(sys.argv[2]))
