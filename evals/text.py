"""Perplexity and bits per byte of text files.

Default protocol: the text's tokens in windows that do not overlap, as long as the model's context but at most 512. With a
stride shorter than the window, windows overlap and each token is scored once, behind as much context as there is.

A protocol with BOS puts it before every window, where it takes one of the window's places: models trained with BOS saw it
at the beginning of each sequence, and some (Gemma) are far off without. BOS itself is never scored. Every token of the
text then is, the first of a window behind BOS alone, so a text of one window has the log-likelihood that lm-eval's
`loglikelihood_rolling` gives it with add_bos_token=False (in longer texts lm-eval's later windows begin with the last token
of the window before instead). Without BOS nothing precedes the first token of a window, and it is not scored.

Masked encoders have a protocol of their own, in `evals/masked.py`. The protocol is recorded with the result: perplexities
of different protocols or tokenizers cannot be compared, bits per byte of different tokenizers can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.masked import (
    MaskedProtocol,
    choose_masked_protocol,
    passes,
    pseudo_log_likelihood,
    surroundings,
    tokens_around,
)
from evals.models import MAX_DEFAULT_CONTEXT, EvalModel
from train.text_files import DataError, without_mark


@dataclass(frozen=True)
class Protocol:
    context: int
    """Tokens per window, with BOS."""
    stride: int
    """Tokens of the text from the beginning of a window to that of the next; equal to `size`, windows do not overlap."""
    bos: tuple[int, ...] = ()
    """The tokens before every window: BOS, what a tokenizer has instead, or none. They are not scored."""

    @property
    def size(self) -> int:
        """Tokens of the text per window."""
        return self.context - len(self.bos)


def choose_protocol(model_context: int, context: int | None, stride: int | None, bos: tuple[int, ...] = ()) -> Protocol:
    """
    Raises:
        ValueError: a window of fewer than 2 tokens of text, or a stride longer than those.
    """
    context = context or min(model_context, MAX_DEFAULT_CONTEXT)
    if context > model_context:
        raise ValueError(f"--context {context}: the model was made for at most {model_context} tokens")
    size = context - len(bos)
    behind = f" behind {len(bos)} of BOS" if bos else ""
    if size < 2:
        raise ValueError(f"--context {context}: a window needs at least 2 tokens{behind}")
    stride = stride or size
    if not 1 <= stride <= size:
        raise ValueError(
            f"--stride {stride}: expected 1 to {size}, the tokens of a window{behind}; {size} is the default"
        )
    return Protocol(context, stride, bos)


def protocol_for(
    model: EvalModel, context: int | None, stride: int | None, mask_every: int | None, add_bos: str | None = None
) -> Protocol | MaskedProtocol:
    """The protocol of a model's kind, with what the command line gives.

    Args:
        add_bos: "yes", "no" (so does None), or "auto" for what the model's tokenizer does by itself.

    Raises:
        ValueError: an option that is out of range, or that belongs to the other kind of model.
    """
    if model.masked:
        if add_bos in ("yes", "no"):
            raise ValueError("--add-bos: windows of a masked encoder always stand between its special tokens")
        if stride is not None:
            raise ValueError("--stride: the windows of a masked encoder do not overlap, its tokens see both sides")
        return choose_masked_protocol(model, context, mask_every)
    if mask_every is not None:
        raise ValueError(f"--mask-every: {model.name} is a decoder, nothing in its text is masked")
    return choose_protocol(model.context, context, stride, bos_tokens(model, add_bos))


def bos_tokens(model: EvalModel, add_bos: str | None) -> tuple[int, ...]:
    """The tokens to put before a window: BOS for "yes"; for "auto" what the tokenizer puts before a text by itself.

    Raises:
        ValueError: the tokenizer has no BOS, or does not show what it puts before a text.
    """
    if add_bos in (None, "no"):
        return ()
    if add_bos == "auto":
        around = tokens_around(model.tokenizer)
        if around is None:
            raise ValueError(
                f"{model.name}: the tokenizer does not show what it adds to a text: give --add-bos yes or no"
            )
        return tuple(around[0])
    if model.tokenizer.bos_token_id is None:
        raise ValueError(f"--add-bos yes: the tokenizer of {model.name} has no BOS token")
    return (int(model.tokenizer.bos_token_id),)


def windows(num_tokens: int, protocol: Protocol) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored position) of every window; each token but the unscored ones is scored exactly once."""
    overlapping = protocol.stride < protocol.size
    alone = 0 if protocol.bos else 1
    begin = scored = 0
    while begin < num_tokens:
        end = min(begin + protocol.size, num_tokens)
        first = max(scored, begin + alone) if overlapping else begin + alone
        if first < end:
            yield begin, end, first
        scored = end
        if end == num_tokens:
            return
        begin += protocol.stride


@torch.no_grad()
def negative_log_likelihood(
    logits_of: Callable[[Tensor], Tensor], ids: Tensor, protocol: Protocol, batch_size: int = 8
) -> tuple[float, int]:
    """Summed -log p in nats of a token sequence, and how many tokens it scores.

    Args:
        logits_of: tokens (B, T) -> logits (B, T, V).
        ids: (N,) int64, on the model's device.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    bos = torch.tensor(protocol.bos, dtype=torch.int64, device=ids.device)
    batch: list[tuple[int, int, int]] = []
    spans = list(windows(len(ids), protocol))
    for i, span in enumerate(spans):
        batch.append(span)
        following = spans[i + 1] if i + 1 < len(spans) else None
        same_length = following is not None and following[1] - following[0] == span[1] - span[0]
        if len(batch) < batch_size and same_length:
            continue
        rows = torch.stack([torch.cat([bos, ids[begin:end]]) for begin, end, _ in batch])
        log_probabilities = F.log_softmax(logits_of(rows)[:, :-1].float(), dim=-1)
        nll = -log_probabilities.gather(-1, rows[:, 1:, None]).squeeze(-1)
        for (begin, end, first), losses in zip(batch, nll):
            total += losses[len(bos) + first - begin - 1 :].double().sum().cpu()
            count += end - first
        batch = []
    return float(total), count


def encode(model: EvalModel, file: Path) -> tuple[Tensor, int]:
    """The tokens of a text file, (N,) int64 on the model's device, and its length in bytes; a byte order mark is no text.

    Raises:
        ValueError: it cannot be read, is not UTF-8 or is shorter than two tokens.
    """
    try:
        data = without_mark(file, file.read_bytes())
        text = data.decode("utf-8")
    except OSError as error:
        raise ValueError(f"--text {file}: {error.strerror}") from error
    except DataError as error:
        raise ValueError(f"--text {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text {file}: not UTF-8 from byte {error.start:,} on: convert the file, figures per byte would be of another text"
        ) from error
    encoded = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(encoded, dtype=torch.int64, device=model.model.device)
    if len(ids) < 2:
        raise ValueError(f"{file}: the text has {len(ids)} tokens, at least 2 are needed")
    return ids, len(data)


def evaluate_text(
    model: EvalModel, files: Sequence[Path], protocol: Protocol | MaskedProtocol, batch_size: int = 8
) -> dict[str, Any]:
    """{file: {"perplexity", "bits_per_byte", "tokens"}} with the number of scored tokens.

    Bits per byte are nats per scored token, times tokens per byte of the whole file, over ln 2.

    Raises:
        ValueError: a file cannot be read or is shorter than two tokens.
    """
    if model.masked != isinstance(protocol, MaskedProtocol):
        raise ValueError(f"{model.name}: {type(protocol).__name__} is not the protocol of this kind of model")

    def logits_of(rows: Tensor) -> Tensor:
        return model.model(rows).logits

    results: dict[str, Any] = {}
    for file in files:
        ids, num_bytes = encode(model, file)
        if isinstance(protocol, MaskedProtocol):
            place = surroundings(model.tokenizer, ids.device)
            nats, scored = pseudo_log_likelihood(logits_of, ids, protocol, place, batch_size)
        else:
            nats, scored = negative_log_likelihood(logits_of, ids, protocol, batch_size)
        per_token = nats / scored
        results[str(file)] = {
            "perplexity": math.exp(min(per_token, 700.0)),
            "bits_per_byte": per_token / math.log(2) * len(ids) / num_bytes,
            "tokens": scored,
        }
    return results


def tokens_of_a_pass(
    model: EvalModel, files: Sequence[Path], protocol: Protocol | MaskedProtocol, at_most: int | None = None
) -> int:
    """How many tokens the model reads when texts, or `at_most` tokens of each, are read once: the unit of progress."""
    total = 0
    for file in files:
        num_tokens = len(encode(model, file)[0][:at_most])
        if isinstance(protocol, MaskedProtocol):
            total += sum(end - begin + protocol.special_tokens for begin, end, _ in passes(num_tokens, protocol))
        else:
            total += sum(end - begin + len(protocol.bos) for begin, end, _ in windows(num_tokens, protocol))
    return total


def protocol_record(protocol: Protocol | MaskedProtocol) -> dict[str, Any]:
    """What a result says of how its texts were read."""
    if isinstance(protocol, MaskedProtocol):
        return asdict(protocol)
    with_bos = bool(protocol.bos)
    found = {"context": protocol.context, "stride": protocol.stride}
    found |= {"first_token_scored": with_bos, "bos_added": with_bos}
    return found | ({"bos": list(protocol.bos)} if with_bos else {})
