"""Train as train/main.py does, with faults that befall this process: `faulty.py '[{"rank": 1, ...}]' FLAGS...`.

A fault says which `rank` it befalls, in which `phase` (a key of PHASES) at which `step` (the steps made so far), and what
it is (`action`, a name in ACTIONS). Each happens once.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RANK = int(os.environ.get("RANK", 0))

PHASES = {
    "start": ("parallel.mesh", "start"),
    "build": ("train.trainer", "build_model"),
    "load": ("train.saving", "Checkpoints.load"),
    "data": ("train.data", "RowBatches._read"),
    "step": ("train.trainer", "Trainer.train_step"),
    "forward": ("train.trainer", "Trainer.count_tokens"),
    "clip": ("parallel.gradients", "clip"),
    "validate": ("train.trainer", "Trainer._held_out_figures"),
    "begin save": ("train.saving", "Checkpoints.begin"),
    "copy": ("train.saving", "Checkpoints._copy"),
    "write": ("train.saving", "Checkpoints._write"),
    "commit": ("train.saving", "Checkpoints._commit"),
    "verify": ("train.saving", "Checkpoints._verify"),
    "delete": ("train.saving", "Checkpoints._remove_old"),
}


def send(*signals: int) -> Callable[[], None]:
    def act() -> None:
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    return act


def throw() -> None:
    raise RuntimeError("a fault that was asked for")


def hang() -> None:
    time.sleep(10_000)


def disk(error: int) -> Callable[[], None]:
    """Every durable write fails for the next two seconds."""

    def act() -> None:
        fsync, until = os.fsync, time.monotonic() + 2.0

        def failing(descriptor: int) -> None:
            if time.monotonic() < until:
                raise OSError(error, os.strerror(error))
            fsync(descriptor)

        os.fsync = failing

    return act


def slow_disk() -> None:
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.3)
        fsync(descriptor)

    os.fsync = slow


def jump(seconds: float) -> Callable[[], None]:
    def act() -> None:
        now = time.time
        time.time = lambda: now() + seconds

    return act


ACTIONS: dict[str, Callable[[], None]] = {
    "SIGKILL": send(signal.SIGKILL),
    "SIGTERM": send(signal.SIGTERM),
    "SIGUSR1": send(signal.SIGUSR1),
    "SIGINT": send(signal.SIGINT),
    "SIGINT twice": send(signal.SIGINT, signal.SIGINT),
    "SIGTERM twice": send(signal.SIGTERM, signal.SIGTERM),
    "SIGUSR1 and SIGTERM": send(signal.SIGUSR1, signal.SIGTERM),
    "SIGSTOP": send(signal.SIGSTOP),
    "hang": hang,
    "throw": throw,
    "full disk": disk(errno.ENOSPC),
    "read-only disk": disk(errno.EROFS),
    "disk is gone": disk(errno.EIO),
    "slow disk": slow_disk,
    "clock back a day": jump(-86_400.0),
    "clock on a day": jump(86_400.0),
}


def befall(fault: dict[str, Any]) -> None:
    """Arrange for a fault of this process."""
    if "after" in fault:  # seconds, whatever is going on then
        timer = threading.Timer(fault["after"], ACTIONS[fault["action"]])
        timer.daemon = True
        timer.start()
        return
    import importlib

    from train.trainer import Trainer

    module, name = PHASES[fault["phase"]]
    owner: Any = importlib.import_module(module)
    *outer, attribute = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, done, current = getattr(owner, attribute), [], []
    if not hasattr(Trainer, "init"):
        Trainer.init = Trainer.__init__
    init = Trainer.__init__

    def noting(self, *args, **kwargs):
        current.append(self)
        init(self, *args, **kwargs)

    Trainer.__init__ = noting

    def patched(*args, **kwargs):
        step = current[-1].step if current and hasattr(current[-1], "step") else 0
        if not done and step >= fault.get("step", 0):
            done.append(step)
            print(f"process {RANK}: {fault['action']} in {fault['phase']} at step {step}", file=sys.stderr, flush=True)
            ACTIONS[fault["action"]]()
        return original(*args, **kwargs)

    setattr(owner, attribute, patched)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    for fault in json.loads(sys.argv[1]):
        if fault.get("rank", 0) == RANK:
            befall(fault)
    del sys.argv[1]
    from train.main import main

    main(sys.argv[1:])
