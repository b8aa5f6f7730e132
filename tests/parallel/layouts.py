"""Train a few steps on any layout and record what has to be the same on all of them.

`run` does it with this process, `run_on` with several: losses, initial weights, and every gradient of every step as a whole.
"""

from __future__ import annotations

import hashlib
import os
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
        return {name: whole(tensor) for name, tensor in current[-1].checkpoints.state().items()}

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


def run_on(processes: int, folder: Path, arguments: Sequence[str]) -> Record:
    """The merged record of a job of several processes, which are new: what a job leaves behind meets no other.

    Raises:
        AssertionError: a process failed, with what it printed; or two recorded different bits.
    """
    from support import fork_python

    fork_python(folder, __file__, str(folder / "record"), *arguments, processes=processes)
    merged = Record()
    for rank in range(processes):
        part = Record(**torch.load(folder / f"record-{rank}.pt"))
        os.unlink(folder / f"record-{rank}.pt")
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


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    torch.set_num_threads(1)
    torch.save(vars(run(sys.argv[2:])), f"{sys.argv[1]}-{os.environ['RANK']}.pt")
