"""`train/main.py` with a fault: on rank VICTIM, at step AT, the process does what FAULT says."""

import os
import signal
import sys
import time

sys.path.insert(0, ".")

from train.data import RowBatches
from train.main import main
from train.trainer import Trainer

FAULT, VICTIM, AT = os.environ["FAULT"], os.environ["VICTIM"], int(os.environ.get("AT", "4"))
OURS = VICTIM == "all" or os.environ.get("RANK", "0") == VICTIM
read_rows, train_step, resume, figures = RowBatches._read, Trainer.train_step, Trainer.resume, Trainer._held_out_figures


def stuck_disk(self, step):
    if step + 1 >= AT:
        time.sleep(10_000)
    return read_rows(self, step)


def slow_disk(self, step):
    time.sleep(1.0)
    return read_rows(self, step)


def stuck_layer(*anything):
    time.sleep(10_000)


def slow_layer(*anything):
    time.sleep(0.15)


def faulty_step(self, rows):
    block = self.parts[0].model.layers["1"]
    if FAULT == "slow layer" and self.step == 0:
        block.mlp.register_forward_pre_hook(slow_layer)
    if self.step + 1 == AT:
        if FAULT == "throw":
            raise ValueError("the ink is out")
        if FAULT == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "layer":
            block.mlp.register_forward_pre_hook(stuck_layer)
    return train_step(self, rows)


def stuck_load(self):
    time.sleep(10_000)


def slow_load(self):
    time.sleep(4)
    return resume(self)


def slow_validation(self, suffix):
    beat = self.beat

    def slow_beat(phase, step):
        beat(phase, step)
        if phase == "validate":
            time.sleep(0.8)

    self.beat = slow_beat
    try:
        return figures(self, suffix)
    finally:
        self.beat = beat


if OURS:
    Trainer.train_step = faulty_step
    if FAULT == "disk":
        RowBatches._read = stuck_disk
    if FAULT == "slow disk":
        RowBatches._read = slow_disk
    if FAULT == "load":
        Trainer.resume = stuck_load
    if FAULT == "patience":
        Trainer.resume, Trainer._held_out_figures = slow_load, slow_validation

main(sys.argv[1:])
