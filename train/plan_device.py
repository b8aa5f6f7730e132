"""Which device a plan is for: a GPU that was asked for or is here, the CPU, or a GPU that is assumed. Torch-free without one."""

from __future__ import annotations

import ctypes
import os
import re
from typing import NamedTuple

from train.config import Config
from train.plan_time import GPUS, Gpu

GPU_OPTIONS = ("--gpu", "--gpu-memory", "--mfu")
LONGEST_ON_CPU = 1e16
"""FLOPs of a run that somebody may want to train on a CPU: two days at 50 GFLOP/s, a few cores' rate in float32."""


class Device(NamedTuple):
    """What a plan is for."""

    gpu: Gpu | None
    """None: the CPU."""
    reason: str
    """The device in words, and why it is this one."""


def choose_device(config: Config, world_size: int, flops: float, asked: Gpu | None, name: str = "") -> Device:
    """The device that a run would have.

    Args:
        config: the run.
        world_size: its processes.
        flops: of the whole run.
        asked: what the options of the command line describe, or None without such options.
        name: the GPU of this machine, where there is one.
    """
    device, assumed = config.run.device, GPUS["h100"]
    if asked is not None:
        return Device(asked, f"{_count(world_size, asked)}, as the options say")
    if device == "cpu":
        return Device(None, 'CPU (run.device = "cpu"; --gpu h100 plans for a GPU)')
    if name:
        known = [gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.name}\b", name)]
        if known:
            return Device(known[0], f"{_count(world_size, known[0])}: this machine has an {name}")
        return Device(assumed, f"assumed: {_count(world_size, assumed)}; there are no figures of this machine's {name}")
    if device == "auto" and flops <= LONGEST_ON_CPU:
        return Device(None, "CPU: there is no GPU here (--gpu h100 plans for a GPU)")
    why = "there is no GPU here"
    if device == "auto":
        why += f", and {flops:.1e} FLOPs are too many for a CPU (--run.device cpu plans for it all the same)"
    return Device(assumed, f"assumed: {_count(world_size, assumed)}; {why}; --gpu names another")


def _count(number: int, gpu: Gpu) -> str:
    return f"one {gpu.name}" if number == 1 else f"{number} x {gpu.name}"


def gpu_here() -> str:
    """Name of this machine's first GPU, or "". Without a driver, torch's seconds of import are saved."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def host_memory() -> float:
    """Bytes of this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")


def placed(config: Config, device: Device) -> Config:
    """The configuration with the device that was chosen, which "auto" leaves open."""
    run = config.run.model_copy(update={"device": "cpu" if device.gpu is None else "cuda"})
    return config.model_copy(update={"run": run})
