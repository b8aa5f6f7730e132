"""Run a training job and record which bits flipped: for every operand and row, a digest of encode(in) xor encode(out).

As a script under torchrun: `record_flips.py OUT FLAGS...`; every rank writes OUT-RANK.json. Recording looks at what
went into and came out of the memory, eager or compiled, so that it sees what the layers really computed with. The
faults of such a run must leave exponents alone (a NaN would lose its payload on the way through float32).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from transforms import bitflip

Flips = dict[str, str]


class Recorder:
    """Wraps the golden function; seeing an operand again (backward, recomputation) must show the same flips."""

    def __init__(self) -> None:
        self.flips: Flips = {}
        self.calls = 0
        self._golden, self._compiled = bitflip.golden, bitflip._compiled

    def __enter__(self) -> Recorder:
        bitflip.golden = self._watched(self._golden)
        bitflip._compiled = lambda text, shape: self._watched(self._compile(text, shape))
        return self

    def _compile(self, text: str, shape: torch.Size):
        watched, bitflip.golden = bitflip.golden, self._golden  # the function as it is, not this recorder, is compiled
        try:
            return self._compiled(text, shape)
        finally:
            bitflip.golden = watched

    def __exit__(self, *error: object) -> None:
        bitflip.golden, bitflip._compiled = self._golden, self._compiled

    def _watched(self, function):
        def call(code, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None) -> Tensor:
            stored = function(code, value, table, context, tokens)
            self._note(code, value.detach(), stored.detach(), table, context)
            return stored

        return call

    def _note(self, code, value: Tensor, stored: Tensor, table: Tensor, context: Tensor) -> None:
        self.calls += 1
        flipped = value.to(torch.bfloat16).view(torch.int16) ^ stored.to(torch.bfloat16).view(torch.int16)
        step, group, first = context.tolist()
        where = f"{table[0]:x}-{table[1]:x} step {step}"
        parts = [(f"{where} group {group}", flipped)]
        if not code.of_weight:
            parts = [(f"{where} row {first + row}", mask) for row, mask in enumerate(flipped)]
        for name, mask in parts:
            assert mask.any() or mask.numel() < 4096, f"nothing flipped in {name}"
            digest = hashlib.sha256(mask.numpy().tobytes()).hexdigest()
            assert self.flips.setdefault(name, digest) == digest, f"{name} saw two different draws"


if __name__ == "__main__":
    from train.config_sources import load_config
    from train.job import run_job

    with Recorder() as recorder:
        run_job(load_config([], sys.argv[2:], world_size=int(os.environ.get("WORLD_SIZE", 1))))
    Path(f"{sys.argv[1]}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(recorder.flips))
