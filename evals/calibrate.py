"""Fitting the ranges of converters on text, for models that were not trained with them.

The model reads the text once with everything on but the converters whose ranges are still unknown; each range becomes the
largest magnitude that came by. Ranges are saved under the names of a checkpoint's, as a safetensors file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from evals.masked import MaskedProtocol, pseudo_log_likelihood, surroundings
from evals.models import EvalModel
from evals.noise import NoisyModel
from evals.text import Protocol, encode, windows

DEFAULT_TOKENS = 16_384


@torch.no_grad()
def calibrate(
    model: EvalModel,
    noisy: NoisyModel,
    files: Sequence[Path],
    protocol: Protocol | MaskedProtocol,
    tokens: int = DEFAULT_TOKENS,
) -> dict[str, Tensor]:
    """The ranges by name, which are also put in place.

    Args:
        tokens: how many of each file, from its beginning.

    Raises:
        ValueError: the transforms have no ranges, or a file cannot be read.
    """
    if not noisy.noise.ranges:
        raise ValueError("these transforms have no ranges to calibrate: no scale is tracked or learned")
    noisy.calibrating()
    for file in files:
        ids = encode(model, file)[0][:tokens]
        if isinstance(protocol, MaskedProtocol):
            around = surroundings(model.tokenizer, ids.device)
            pseudo_log_likelihood(lambda rows: model.model(rows).logits, ids, protocol, around)
            continue
        for begin, end, _ in windows(len(ids), protocol):
            model.model(ids[None, begin:end])
    noisy.noise.end_step()
    unseen = [name for name, range_ in noisy.noise.ranges.items() if not range_.used.isfinite() or range_.used <= 0]
    if unseen:
        raise ValueError(f"{unseen[0]}: nothing finite came by in this text, so {len(unseen)} ranges remain unknown")
    return {name: tensor.cpu().clone() for name, tensor in noisy.ranges().items()}
