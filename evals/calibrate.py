"""Fitting the ranges of converters on text, for models that were not trained with them.

The model reads the text once with everything on but the converters whose ranges are still unknown; each range becomes the
largest magnitude that came by. Ranges are saved under the names of a checkpoint's, as a safetensors file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from evals.masked import MaskedProtocol, pseudo_log_likelihood, surroundings
from evals.models import EvalModel
from evals.noise import NoisyModel
from evals.text import Protocol, encode, windows
from transforms.experts import without_expert
from transforms.ranges import Range
from transforms.specs import Hardware, OpticalSpec

DEFAULT_TOKENS = 16_384
NOTHING_TO_CALIBRATE = "these transforms have no ranges to calibrate: no scale is tracked or learned"


def needs_ranges(specs: Sequence[Hardware]) -> bool:
    """Whether some converters of these transforms have tracked or learned ranges: told without a model."""
    operands = [getattr(spec, name, None) for spec in specs for name in ("weight", "input", "attention")]
    kept = any(getattr(operand, "scale", None) in ("tracked", "learned") for operand in operands)
    return kept or any(isinstance(spec, OpticalSpec) for spec in specs)


def calibrate_where_unknown(
    model: EvalModel, noisy: NoisyModel, files: Sequence[Path], protocol: Protocol | MaskedProtocol
) -> dict[str, int] | None:
    """Fit ranges on the beginnings of the texts to evaluate, if the converters have some that nobody gave.

    Returns:
        {file: tokens read of it}; None where ranges are known or there is no text.
    """
    if noisy.known or not files:
        return None
    texts = beginnings(model, files, DEFAULT_TOKENS)
    fit(model, noisy, list(texts.values()), protocol)
    return {file: len(ids) for file, ids in texts.items()}


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
    return fit(model, noisy, list(beginnings(model, files, tokens).values()), protocol)


def beginnings(model: EvalModel, files: Sequence[Path], tokens: int) -> dict[str, Tensor]:
    """The first tokens of each text, by its file name: (at most `tokens`,) int64."""
    return {str(file): encode(model, file)[0][:tokens] for file in files}


def _share_among_experts(ranges: Mapping[str, Range]) -> None:
    """An expert that the text gave no token has the largest range of the other experts of its block."""
    blocks: dict[str, list[Range]] = defaultdict(list)
    for name, range_ in ranges.items():
        blocks[without_expert(name)].append(range_)
    for alike in blocks.values():
        largest = torch.stack([range_.used for range_ in alike]).amax(0)
        for range_ in alike:
            if range_.used <= 0:
                range_.used.copy_(largest)


@torch.no_grad()
def fit(
    model: EvalModel, noisy: NoisyModel, texts: Sequence[Tensor], protocol: Protocol | MaskedProtocol
) -> dict[str, Tensor]:
    """The ranges by name, after reading texts as tokens; they are also put in place.

    Raises:
        ValueError: the transforms have no ranges, or nothing finite came by.
    """
    if not noisy.noise.ranges:
        raise ValueError(NOTHING_TO_CALIBRATE)
    noisy.calibrating()
    for ids in texts:
        if isinstance(protocol, MaskedProtocol):
            around = surroundings(model.tokenizer, ids.device)
            pseudo_log_likelihood(lambda rows: model.model(rows).logits, ids, protocol, around)
            continue
        bos = torch.tensor(protocol.bos, dtype=torch.int64, device=ids.device)
        for begin, end, _ in windows(len(ids), protocol):
            model.model(torch.cat([bos, ids[begin:end]])[None])
    noisy.noise.end_step()
    _share_among_experts(noisy.noise.ranges)
    unseen = [name for name, range_ in noisy.noise.ranges.items() if not range_.used.isfinite() or range_.used <= 0]
    if unseen:
        raise ValueError(f"{unseen[0]}: nothing finite came by in this text, so {len(unseen)} ranges remain unknown")
    return {name: tensor.cpu().clone() for name, tensor in noisy.ranges().items()}
