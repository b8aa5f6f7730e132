"""Train, and record what weight clipping made of which weights: `record_clipping.py OUT FLAGS...`, one file per rank.

Before the run's own clipping of the last step, both kinds are tried on the same weights, which are then put back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("before", "row", "tensor")


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return getattr(tensor, "_tensor", tensor).detach().clone()


def record(arguments: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """For "before" and each kind of clipping: this process's weights, whole, by name."""
    from train.config import RobustConfig
    from train.config_sources import load_config
    from train.job import run_job
    from train.trainer import Trainer
    from train.weight_clipping import WeightClipping

    config = load_config([], arguments, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    found: dict[str, dict[str, Tensor]] = {}
    build = Trainer.build_inputs

    def noting(trainer, *rest):
        build(trainer, *rest)
        clip = trainer.clip_weights

        def clip_and_note():
            if trainer.step + 1 == trainer.last_step:
                found["before"] = {name: whole(weight) for name, weight in clip.weights.items()}
                stored = [local(weight).clone() for weight in clip.weights.values()]
                for kind in ("row", "tensor"):
                    settings = RobustConfig(clip_weights=config.robust.clip_weights, clip_per=kind)
                    WeightClipping(trainer.parts, trainer.noise, settings, trainer.mesh.device)()
                    found[kind] = {name: whole(weight) for name, weight in clip.weights.items()}
                    for weight, before in zip(clip.weights.values(), stored):
                        local(weight).copy_(before)
            clip()

        trainer.clip_weights = clip_and_note

    @torch.no_grad()
    def local(weight):
        part = weight.detach()
        part = part.to_local() if isinstance(part, DTensor) else part
        return getattr(part, "_tensor", part)

    Trainer.build_inputs = noting
    try:
        run_job(config)
    finally:
        Trainer.build_inputs = build
    return found


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    torch.set_num_threads(1)
    torch.save(record(sys.argv[2:]), f"{sys.argv[1]}-{os.environ['RANK']}.pt")
