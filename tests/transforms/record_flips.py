"""Run a training job and record which bits flipped: for every operand and row, encode(in) xor encode(out) by element.

As a script, one process of several: `record_flips.py OUT FLAGS...`; every rank writes OUT-RANK.pt. Recording looks at
what went into and came out of the memory, eager or compiled, so that it sees what the layers really computed with, and
numbers elements as in the whole operand, whichever part of it a device holds. The faults of such a run must leave
exponents alone (a NaN would lose its payload on the way through float32).
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from transforms import bitflip, operands

POSITIONS = 1 << 20
"""An element of an activation's row is number position * POSITIONS + feature."""


class Flips:
    """Masks of elements by operand; seeing an element again must show the same flips."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, elements: Tensor, masks: Tensor) -> None:
        """Elements (n,) int64 of an operand and their masks (n,) int16."""
        if name in self._parts:
            elements = torch.cat([self._parts[name][0], elements])
            masks = torch.cat([self._parts[name][1], masks])
        order = elements.argsort(stable=True)
        elements, masks = elements[order], masks[order]
        again = elements[1:] == elements[:-1]
        assert (masks[1:] == masks[:-1])[again].all(), f"{name} saw two different draws"
        first = torch.cat([torch.ones(1, dtype=torch.bool), ~again])
        self._parts[name] = (elements[first], masks[first])

    def merge(self, path: str) -> None:
        for name, part in torch.load(path).items():
            self.add(name, *part)

    def save(self, path: str) -> None:
        torch.save(self._parts, path)

    def digests(self) -> dict[str, str]:
        """Of every operand, over all its elements and masks."""
        found = {}
        for name, (elements, masks) in self._parts.items():
            assert masks.any() or masks.numel() < 4096, f"nothing flipped in {name}"
            found[name] = hashlib.sha256(elements.numpy().tobytes() + masks.numpy().tobytes()).hexdigest()
        return found


class Recorder:
    """Wraps the golden function, eager and compiled."""

    def __init__(self) -> None:
        self.flips = Flips()
        self.calls = 0
        self._golden, self._compiled = bitflip._golden, bitflip._compiled

    def __enter__(self) -> Recorder:
        bitflip._golden = self._watched(self._golden)
        bitflip._compiled = lambda *which: self._watched(self._compile(*which))
        return self

    def _compile(self, *which):
        watched, bitflip._golden = (
            bitflip._golden,
            self._golden,
        )  # the function as it is, not this recorder, is compiled
        try:
            return self._compiled(*which)
        finally:
            bitflip._golden = watched

    def __exit__(self, *error: object) -> None:
        bitflip._golden, bitflip._compiled = self._golden, self._compiled

    def _watched(self, function):
        def call(code, rows: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None, *place) -> Tensor:
            stored = function(code, rows, table, context, tokens, *place)
            with _disable_current_modes():  # selective checkpointing would count what follows
                self._note(code, rows, stored, table, context, tokens, place)
            return stored

        return call

    def _note(self, code, rows: Tensor, stored: Tensor, table: Tensor, context: Tensor, tokens, place) -> None:
        self.calls += 1
        flipped = _stored_bits(rows) ^ _stored_bits(stored.view(rows.shape))
        step, group, _ = context.tolist()
        where = f"{table[0]:x}-{table[1]:x} step {step}"
        features = _elements(rows.shape[-1], *place)
        if code.of_weight:
            self.flips.add(f"{where} group {group}", features.expand(rows.shape).flatten(), flipped.flatten())
            return
        position, sample = operands.positions_and_samples(rows, context, tokens)
        for row in sample.unique().tolist():
            mine = sample == row
            elements = position[mine][:, None] * POSITIONS + features
            self.flips.add(f"{where} row {row}", elements.flatten(), flipped[mine].flatten())


def _stored_bits(value: Tensor) -> Tensor:
    return value.detach().to(torch.bfloat16).view(torch.int16)


def _elements(width: int, first_chunk, skip: int, begins: Tensor | None) -> Tensor:
    """Numbers of the elements of rows in the whole operand, (width,) or (rows, width)."""
    first = first_chunk * bitflip.CHUNK + (skip if begins is None else begins)
    first = first[:, None] if isinstance(first, Tensor) else first
    return first + torch.arange(width)


if __name__ == "__main__":
    from train.config_sources import load_config
    from train.job import run_job

    with Recorder() as recorder:
        run_job(load_config([], sys.argv[2:], world_size=int(os.environ.get("WORLD_SIZE", 1))))
    recorder.flips.save(f"{sys.argv[1]}-{os.environ.get('RANK', 0)}.pt")
