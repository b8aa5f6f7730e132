"""AdamW, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from parallel.names import named_parameters
from train.config import OptimizerConfig, ScheduleConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to the embedding, nor to norms and biases (vectors)."""
    return parameter.ndim >= 2 and name != "model.embed_tokens.weight"


def build_optimizer(parts: Sequence[nn.Module], config: OptimizerConfig) -> Optimizer:
    """Fused AdamW with two groups: with and without weight decay. The rate is a tensor-free number set every step.

    Frozen parameters are left out.
    """
    parameters = [(name, p) for name, p in named_parameters(*parts) if p.requires_grad]
    groups = [
        {"params": [p for name, p in parameters if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in parameters if not decays(name, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def learning_rate(step: int, total: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of the step that makes `step` + 1 updates, `step` counted from 0.

    Linear warm-up over `warmup_steps`, so that the first step already moves and step `warmup_steps` - 1 is at the peak;
    then cosine or linear to `min_lr_ratio` of the peak at the last step, or (wsd) constant until the last
    `decay_fraction` of the run and linear from there.
    """
    warmup = min(100, total // 10) if schedule.warmup_steps is None else schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    start = warmup
    if schedule.name == "wsd":
        decay = max(1, round(schedule.decay_fraction * total)) if schedule.decay_fraction > 0 else 0
        start = max(start, total - decay)
    # From the peak at step `start` - 1 to the minimum at step `total` - 1.
    progress = min(1.0, max(0.0, (step - start + 1) / max(1, total - start)))
    if schedule.name == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        remaining = 1 - progress
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * remaining)


def materialise_state(optimizer: Optimizer) -> None:
    """Create the optimizer's state without changing a weight, so that a checkpoint has tensors to load into.

    A step with zero gradients and rate 0 does it for every optimizer alike; the load overwrites its step count.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
