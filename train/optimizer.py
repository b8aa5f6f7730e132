"""The optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from parallel.init import ADAPTERS
from parallel.names import named_parameters
from train.config import OptimizerConfig, ScheduleConfig
from train.muon import ADJUST_LR, MuonWithAdamW

EMBEDDING = "model.embed_tokens.weight"


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to the embedding, nor to norms and biases (vectors)."""
    return parameter.ndim >= 2 and name != EMBEDDING


def orthogonalised(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates it: the blocks' matrices. Embedding, head, norms and adapters are AdamW's."""
    return parameter.ndim == 2 and name.startswith("model.layers.") and not name.endswith(ADAPTERS)


def build_optimizer(parts: Sequence[nn.Module], config: OptimizerConfig, compiled: bool = True) -> Optimizer:
    """The configured optimizer over all trained parameters, with and without weight decay in separate groups.

    The rate is a plain number in every group, set every step; one rate serves all groups.

    Args:
        compiled: compile the steps of the low-bit optimizers; the others are torch's own kernels.
    """
    parameters = [(name, p) for name, p in named_parameters(*parts) if p.requires_grad]
    matrices = [(name, p) for name, p in parameters if config.name == "muon" and orthogonalised(name, p)]
    taken = {name for name, _ in matrices}
    rest = _groups([(name, p) for name, p in parameters if name not in taken], config.weight_decay)
    adam = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name in ("adamw_8bit", "adamw_bf16"):
        from train import low_bit_adamw  # imports torchao, which takes a second

        if config.name == "adamw_bf16":
            return low_bit_adamw.AdamWBf16(rest, compiled=compiled, **adam)
        embedding = [p for name, p in parameters if name == EMBEDDING]
        return low_bit_adamw.AdamW8bit(rest, exact=embedding, compiled=compiled, **adam)
    adamw = torch.optim.AdamW(rest, fused=True, **adam)
    if not matrices:
        return adamw
    muon = torch.optim.Muon(
        _groups(matrices, config.weight_decay),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        adjust_lr_fn=ADJUST_LR,
    )
    return MuonWithAdamW(muon, adamw)


def _groups(parameters: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for name, p in parameters if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters if not decays(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, total: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of the step that makes `step` + 1 updates, `step` counted from 0.

    Linear warm-up over `warmup_steps`, so that the first step already moves and step `warmup_steps` - 1 is at the peak;
    then cosine or linear to `min_lr_ratio` of the peak at the last step; or (wsd) constant until the last
    `decay_fraction` of the run and linear from there; or (two_stage) linear to `first_stage_end`, then linear from
    `second_stage_start`, as BitNet b1.58 2B4T was trained (arXiv 2504.12285, section 2.2).
    """
    warmup = min(100, total // 10) if schedule.warmup_steps is None else schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    start = warmup
    if schedule.name == "wsd":
        decay = max(1, round(schedule.decay_fraction * total)) if schedule.decay_fraction > 0 else 0
        start = max(start, total - decay)
    if schedule.name == "two_stage":
        switch = max(warmup, second_stage(total, schedule))
        if step < switch:
            done = (step - warmup + 1) / max(1, switch - warmup)
            return peak * (1 + (schedule.first_stage_end - 1) * done)
        done = (step - switch) / (total - 1 - switch) if step < total - 1 else 1.0
        first = schedule.second_stage_start
        return peak * (first + (min(schedule.min_lr_ratio, first) - first) * done)
    # From the peak at step `start` - 1 to the minimum at step `total` - 1.
    progress = min(1.0, max(0.0, (step - start + 1) / max(1, total - start)))
    if schedule.name == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        remaining = 1 - progress
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * remaining)


def second_stage(total: int, schedule: ScheduleConfig) -> int:
    """The step, counted from 0, at which the second stage begins; beyond the run where there is none."""
    return round(schedule.stage_fraction * total) if schedule.name == "two_stage" else total + 1


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


def distributed_like(local: Tensor, parameter: Tensor) -> Tensor:
    """This process's part as a tensor distributed as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def is_quantised(moment: Tensor) -> bool:
    """Whether a moment, or a shard of one, is of torchao's quantised kind."""
    return hasattr(_local(moment), "codes")


def plain_moment(moment: Tensor) -> Tensor:
    """A moment as a checkpoint keeps it: itself, or a float32 copy of a quantised one, distributed as it is."""
    if not is_quantised(moment):
        return moment
    return distributed_like(_local(moment).dequantize(), moment)


def set_moment(moment: Tensor, plain: Tensor) -> None:
    """Take over what a checkpoint holds; a moment that is not quantised is the same tensor and has it already."""
    if is_quantised(moment):
        from train.low_bit_adamw import requantise_

        requantise_(_local(moment), _local(plain))


def _local(tensor: Tensor) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
