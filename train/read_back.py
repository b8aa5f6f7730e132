"""An export read back as its users will read it: transformers loads the folder, and ids and logits are compared.

Ids are compared on a fixed set of awkward texts, on the spellings of the special tokens, and on text that runs through the
whole vocabulary; logits on one small batch, in float32, at positions spread over the whole context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.hf import SHARD_BYTES
from models.llama import Llama, rope_table
from models.sizes import LlamaShape
from train.tokenizer import Tokenizer

ODD_TEXTS = (
    "",
    " ",
    "a",
    " a",
    "   leading and   double  spaces, and trailing  ",
    "\n",
    "tabs\t\tand\nnewlines\n\n\nand\r\n\r\nboth\rkinds",
    "def f(x):\n    return x\n\n\nclass A:\n\tpass\n",
    "x = [1, 23, 456, 7890, 12345678, 3.14159, 0x1F, -1e-5]",
    "It's THEY'LL don't I'm U.S.A. e.g. (a) [b] {c} #d @e $5 50% a_b-c/d\\e",
    "https://example.org/a?b=c&d=%20#e",
    "naïve café, Übergröße, İstanbul, ǅ ﬁ ½ ①",
    "e\u0301 and \u00e9, Z\u0351\u036b\u0343a\u0357l\u0304go",
    "你好,世界。日本語のテキスト 한국어 𠜎𠜱",
    "שלום עולם مرحبا بالعالم हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🇨🇭 👍🏽 ☃️",
    "\x00\x01\x1b[0m\x7f\u200b\ufeff\u2028\u00a0\u3000end",
    "▁ Ġ Ċ ##ing <0x0A> </w>",
    "<s></s> <unk><pad>[CLS][SEP] [MASK]<|endoftext|><|begin_of_text|>\n<|im_start|>user <|eot_id|>",
    "a" * 70,
)
MAX_SPECIAL_TEXTS = 64
"""Special tokens whose spelling is a text of its own; all of them stand in one more."""
VOCABULARY_SLICE = 256
"""Ids of the vocabulary that make one text."""
BATCH, LENGTH = 2, 16
"""Rows and tokens of the batch whose logits are compared."""
LONGEST_TABLE = 1 << 17
"""Positions that a rotary table is made for: more would take memory, and no context so far is longer."""
TOLERANCE = 1e-3
"""Relative difference of the logits of one token: far above float32's order of sums, far below a wrong setting."""


class ReadBackError(ValueError):
    """What transformers reads from a folder is not what was exported."""


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turns an error of transformers into one that says whose it is."""
    try:
        yield
    except Exception as error:  # of its own kinds, of tokenizers', of safetensors'
        raise ReadBackError(f"transformers cannot load the {what} of the export: {error}") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that transformers reads from a folder.

    Raises:
        ReadBackError: it reads none.
    """
    from transformers import AutoTokenizer

    with _named("tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check_tokenizer(tokenizer: Any, training: Tokenizer) -> None:
    """Compare a tokenizer of transformers with the one a model was trained with.

    Raises:
        ReadBackError: it gives other ids (with and without the boundary token, which has to come first), another text for
            ids, or another boundary token.
    """
    spelled = tokenizer.convert_ids_to_tokens(training.bos_id)
    # lm-eval takes the first token of a text from `bos_token_id`, and asks whether a text begins with it already.
    if tokenizer.bos_token_id != training.bos_id or tokenizer.decode(training.bos_id).strip() != str(spelled).strip():
        raise ReadBackError(
            f"the exported tokenizer has bos_token {tokenizer.bos_token!r} with id {tokenizer.bos_token_id}, which decodes to "
            f"{tokenizer.decode(training.bos_id)!r}; documents were trained behind id {training.bos_id} ({spelled!r})"
        )
    texts = [*odd_texts(tokenizer), *_vocabulary(training)]
    ids = [found.tolist() for found in training.encode_batch(texts)]
    check_ids(tokenizer, {text: [training.bos_id, *found] for text, found in zip(texts, ids)})
    check_ids(tokenizer, dict(zip(texts, ids)), add_special_tokens=False)
    for found in ids:
        ours, theirs = training.decode(found), tokenizer.decode(found, skip_special_tokens=True)
        if ours != theirs:
            raise ReadBackError(f"the exported tokenizer decodes {found} to {theirs!r}, in training it was {ours!r}")


def check_ids(tokenizer: Any, expected: Mapping[str, list[int]], **options: Any) -> None:
    """
    Raises:
        ReadBackError: a tokenizer of transformers gives other ids for a text.
    """
    for text, ids in expected.items():
        found = tokenizer(text, verbose=False, **options)["input_ids"]
        if found != ids:
            first = next((i for i, (a, b) in enumerate(zip(found, ids)) if a != b), min(len(found), len(ids)))
            part = slice(max(0, first - 3), first + 20)
            raise ReadBackError(
                f"the exported tokenizer gives other ids than the model was made with for the text {text[:200]!r}: from id "
                f"{part.start} on it has {found[part]}, expected {ids[part]}"
            )


def odd_texts(tokenizer: Any) -> list[str]:
    """Texts that tokenizers differ on, with the spellings of the added tokens of one."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return [*ODD_TEXTS, *(f"a{token} b" for token in added[:MAX_SPECIAL_TEXTS]), "".join(added), " ".join(added)]


def _vocabulary(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts that all tokens of a vocabulary are written for."""
    for start in range(0, tokenizer.vocab_size, VOCABULARY_SLICE):
        # U+FFFD stands for bytes that are no character; the character itself says nothing more.
        text = tokenizer.decode(range(start, min(start + VOCABULARY_SLICE, tokenizer.vocab_size)))
        yield text.replace("\ufffd", "")


Read = Callable[[list[str]], dict[str, Tensor]]
"""Names of weights -> the weights, float32."""


@torch.no_grad()
def check_llama(folder: Path, shape: LlamaShape, read: Read) -> None:
    """Compare the logits that transformers computes from a folder with those of our model.

    Neither model is in memory as a whole: transformers maps its files, a module's weights are turned to float32 while it
    computes, and our model reads them as many at a time as one file holds.

    Args:
        read: the weights that were exported, padding of the vocabulary included.

    Raises:
        ReadBackError: they differ, are not finite, or the folder does not hold exactly the model's weights.
    """
    from transformers import AutoModelForCausalLM

    tokens, positions = probe(shape.vocab_size, shape.max_context)
    options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    with quiet(), _named("model"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True, **options)
    problems = {name: sorted(map(str, found)) for name, found in report.items() if found}
    if problems:
        raise ReadBackError(f"transformers does not find the model's weights in the export: {problems}")
    for module in model.modules():
        _lend(module, lambda own: {name: weight.float() for name, weight in own.items()}, recurse=False)
    # With a mask transformers does not take a leap between positions for the beginning of another document.
    found = model.eval()(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
    compare(found, _llama_logits(shape, read, tokens, positions), TOLERANCE)


def probe(vocab_size: int, context: int, batch: int = BATCH, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """(tokens, positions), both (batch, T) int64: random ids, the first and the last one among them, over a context."""
    length = min(length, context)
    tokens = torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    tokens[0, 0], tokens[-1, -1] = 0, vocab_size - 1
    positions = torch.linspace(0, min(context, LONGEST_TABLE) - 1, length, dtype=torch.float64).long()
    return tokens, positions.expand(batch, -1)


def compare(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """
    Args:
        found: logits (B, T, V).
        tolerance: largest relative difference |found - expected| / |expected| of a token.

    Raises:
        ReadBackError: they differ by more, or are not finite.
    """
    if found.shape != expected.shape:
        raise ReadBackError(
            f"the export gives logits of shape {tuple(found.shape)}, the model has {tuple(expected.shape)}"
        )
    error = float(((found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)).max())
    if not error <= tolerance:  # what is not finite is neither
        raise ReadBackError(
            "transformers computes other logits from the export than the model that it was made of: they differ by "
            f"{error:.2g} of their size, allowed is {tolerance:g} (nan: a weight overflows in this --dtype)"
        )


def _llama_logits(shape: LlamaShape, read: Read, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits of our own model, of which the weights of one file are in memory."""
    with torch.device("meta"):
        model = Llama(shape, 1).eval()
    model.model.rope_cos, model.model.rope_sin = rope_table(shape, int(positions.max()) + 1)
    parts: dict[str, Any] = {"model.embed_tokens": model.model.embed_tokens}
    parts |= {f"model.layers.{name}": block for name, block in model.model.layers.items()}
    parts |= {"model.norm": model.model.norm, "lm_head": model.lm_head}
    ahead = _Ahead(read, {name: 4 * parameter.numel() for name, parameter in model.named_parameters()})
    for prefix, module in parts.items():
        of = "model.embed_tokens" if prefix == "lm_head" and shape.tied_embeddings else prefix

        def weights(own: dict[str, Tensor], of: str = of) -> dict[str, Tensor]:
            return {name: ahead.weights([f"{of}.{name}" for name in own])[f"{of}.{name}"] for name in own}

        _lend(module, weights)
    return model(tokens, positions_BT=positions)


@dataclass
class _Ahead:
    """Weights in the order of the forward, as many of them read at once as one file holds: every read has its own price."""

    read: Read
    sizes: dict[str, int]
    """Bytes of every weight, in that order."""
    held: dict[str, Tensor] = field(default_factory=dict)

    def weights(self, names: list[str]) -> dict[str, Tensor]:
        if not self.held.keys() >= set(names):
            following = list(self.sizes)[list(self.sizes).index(names[0]) :]
            totals = accumulate(self.sizes[name] for name in following)
            self.held = {}  # before the next ones come
            self.held = self.read([n for n, size in zip(following, totals) if size <= SHARD_BYTES or n in names])
        return self.held


def _lend(module: nn.Module, weights: Callable[[dict[str, Tensor]], dict[str, Tensor]], recurse: bool = True) -> None:
    """Give a module other weights while it computes, made from its own ones, and let go of them afterwards."""
    own = dict(module.named_parameters(recurse=recurse))
    if not own:
        return

    def place(tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            holder = module.get_submodule(name.rpartition(".")[0])
            holder._parameters[name.rpartition(".")[2]] = nn.Parameter(tensor, requires_grad=False)

    module.register_forward_pre_hook(lambda *_: place(weights(own)))
    module.register_forward_hook(lambda *_: place(own), always_call=True)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
