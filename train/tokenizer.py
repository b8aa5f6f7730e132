"""Tokenizers behind one small interface: bytes, a tokenizer.json, Llama-3's tiktoken file, a BPE trained on the corpus.

Two rules hold for all of them. Text never turns into a special token: a document that contains the letters "<|eot_id|>"
is encoded as those letters (both libraries would otherwise parse them, and a web page could end a document). And every
document starts with one boundary token: BOS, or EOS where the tokenizer has no BOS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from train.local_paths import refuse_missing

# Llama 3's splitting rule (Meta's released tokenizer): contractions, words, up to three digits, punctuation, spaces.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST_RUN = 25_000
BOS = "<|begin_of_text|>"


def llama3_special_tokens() -> list[str]:
    """The 256 special tokens of Llama 3.1, in the order of their ids, as its Hugging Face release names them."""
    named = {
        0: BOS,
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(256))
    return [named.get(i) or next(reserved) for i in range(256)]


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    vocab_size: int
    """Largest id + 1."""
    bos_id: int
    """The token that starts every document."""
    eos_id: int | None
    """The tokenizer's own end token, if it has one."""
    fingerprint: str
    """sha256 of what defines the ids of text, and where a setting names the boundary token "-" and its id. Shards and
    checkpoints made with another one are refused (`difference`)."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of every text, without the boundary token; special tokens' spellings are ordinary text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files from which `load_tokenizer` with this kind and this folder restores the tokenizer."""
        ...

    def save_hf(self, folder: Path) -> None:
        """Write a Hugging Face tokenizer: AutoTokenizer gives our ids, and puts the boundary token first."""
        ...


def load_tokenizer(kind: str, path: str = "") -> Tokenizer:
    """The tokenizer of a `[tokenizer]` section; for "bpe", `path` is the folder that `prepare` wrote.

    Raises:
        ValueError: the file is missing or not what its kind says.
    """
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "tiktoken":
        file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        return TiktokenTokenizer(file)
    return HFTokenizer(_local_or_hub(path))


class ByteTokenizer:
    """One id per byte of UTF-8, and BOS = 256."""

    vocab_size = 257
    bos_id = 256
    eos_id: int | None = None
    fingerprint = hashlib.sha256(b"newcompute bytes: 0-255, BOS 256").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        self.save_hf(folder)

    def save_hf(self, folder: Path) -> None:
        # A byte-level BPE without merges, whose vocabulary gives each byte's stand-in character the byte as its id.
        alphabet = {_stand_in(byte): byte for byte in range(256)}
        backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(BOS, normalized=False, special=True)])
        _save_hf(backend, folder, bos=BOS, eos=BOS)


class HFTokenizer:
    """A Hugging Face `tokenizer.json` with its `tokenizer_config.json`, of which only the special tokens' names count.

    The class that the settings name is never asked: transformers would build a tokenizer of its own from some of the
    file, with other ids. Truncation and padding are off, and boundary and end token are special whatever the file says.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = _read_settings(folder / "tokenizer_config.json")
        file = folder / "tokenizer.json"
        try:
            data = file.read_bytes()
            self.backend = _backend(json.loads(data), [self._named("bos_token"), self._named("eos_token")])
        except Exception as error:
            raise ValueError(f"cannot read {file}: {error}") from error
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.vocab_size:
            raise ValueError(f"{file} has no vocabulary")
        bos, self.eos_id = self._special("bos_token"), self._special("eos_token")
        boundary = bos if bos is not None else self.eos_id
        if boundary is None:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} names neither bos_token nor eos_token: documents need one"
            )
        self.bos_id = boundary
        self.fingerprint = f"{hashlib.sha256(data).hexdigest()}-{boundary}"

    def _named(self, role: str) -> str | None:
        """How the settings spell the token of a role."""
        token = self.settings.get(role)
        if isinstance(token, dict):
            token = token.get("content")
        return token if isinstance(token, str) else None

    def _special(self, role: str) -> int | None:
        token = self._named(role)
        return None if token is None else self.backend.token_to_id(token)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self.backend.encode_batch_fast([without_halves(text) for text in texts], add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (self.folder / name).exists() and self.folder != folder:
                shutil.copyfile(self.folder / name, folder / name)
        copy_chat_templates(self.folder, folder)

    def save_hf(self, folder: Path) -> None:
        special = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        # A token that the file lacks would be added behind the vocabulary, where the model has no row for it.
        kept = {f"{role}_token": self._named(f"{role}_token") for role in ("unk", "pad", "sep", "cls", "mask")}
        settings = {key: token for key, token in kept.items() if token in special}
        settings |= {key: self.settings[key] for key in ("padding_side",) if key in self.settings}
        end = self.bos_id if self.eos_id is None else self.eos_id
        bos, eos = (str(self.backend.id_to_token(i)) for i in (self.bos_id, end))
        _save_hf(self.backend, folder, bos, eos, settings)


def _backend(content: dict, special: list[str | None]) -> tokenizers.Tokenizer:
    """The tokenizer that a `tokenizer.json` describes, for text that stays text, with some more special tokens."""
    content |= {"truncation": None, "padding": None}
    vocabulary = tokenizers.Tokenizer.from_str(json.dumps(content)).get_vocab(with_added_tokens=True)
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for name in special:
        if name in vocabulary:
            added[name] = plain | added.get(name, {}) | {"id": vocabulary[name], "content": name, "special": True}
    content["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.encode_special_tokens = True
    return backend


class TiktokenTokenizer:
    """Llama-3's file of base64 tokens and ranks, with its 256 special tokens after them."""

    def __init__(self, file: Path):
        import tiktoken

        try:
            content = file.read_bytes()
            lines = [line.split() for line in content.splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
            if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
                raise ValueError("expected ranks 0, 1, 2, ... without a gap, and a token for every byte")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the tiktoken file {file}: {error}") from error
        self.file = file
        self.specials = {token: len(ranks) + i for i, token in enumerate(llama3_special_tokens())}
        self.encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.specials
        )
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = len(ranks) + len(self.specials)
        self.bos_id = self.specials[BOS]
        self.eos_id: int | None = self.specials["<|end_of_text|>"]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [_pieces(text) for text in texts]
        ids = iter(self.encoding.encode_ordinary_batch([piece for parts in pieces for piece in parts], num_threads=4))
        return [np.asarray([i for _ in parts for i in next(ids)], np.uint32) for parts in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        first_special = self.vocab_size - len(self.specials)
        return self.encoding.decode([int(i) for i in ids if i < first_special])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.resolve() != (folder / "tokenizer.model").resolve():
            shutil.copyfile(self.file, folder / "tokenizer.model")

    def save_hf(self, folder: Path) -> None:
        from transformers.convert_slow_tokenizer import TikTokenConverter

        converter = TikTokenConverter(str(self.file), LLAMA3_PATTERN, extra_special_tokens=list(self.specials))
        _save_hf(converter.converted(), folder, bos=BOS, eos="<|end_of_text|>")


def train_bpe(texts: Iterator[str], vocab_size: int, folder: Path) -> HFTokenizer:
    """Train a byte-level BPE with Llama 3's splitting rule on `texts` and save it to `folder`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((without_halves(text) for text in texts), trainer)
    _save_hf(backend, folder, bos=BOS, eos=BOS)
    return HFTokenizer(folder)


def _read_settings(file: Path) -> dict:
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"cannot read {file}: expected a JSON object")
    return settings


def _save_hf(backend: tokenizers.Tokenizer, folder: Path, bos: str, eos: str, settings: dict | None = None) -> None:
    """tokenizer.json and tokenizer_config.json, so that `AutoTokenizer(text)` is BOS and then our ids.

    `PreTrainedTokenizerFast` takes the file as it is; any other class rebuilds parts of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    first, a, b = ({"SpecialToken": {"id": bos, "type_id": 0}}, *({"Sequence": {"id": s, "type_id": 0}} for s in "AB"))
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, first, b],
        "special_tokens": {bos: {"id": bos, "ids": [backend.token_to_id(bos)], "tokens": [bos]}},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = (settings or {}) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text is text, as in training
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


CHAT_TEMPLATE = "chat_template.jinja"
FURTHER_TEMPLATES = "additional_chat_templates"


def copy_chat_templates(source: Path, folder: Path) -> None:
    """Write a Hugging Face folder's chat templates to another that has none, each as a file of its own.

    Raises:
        ValueError: `source` has a tokenizer_config.json that cannot be read.
    """
    if source.resolve() == folder.resolve() or (folder / CHAT_TEMPLATE).exists():
        return
    templates = {file.stem: file.read_text(encoding="utf-8") for file in (source / FURTHER_TEMPLATES).glob("*.jinja")}
    if (source / CHAT_TEMPLATE).exists():
        templates["default"] = (source / CHAT_TEMPLATE).read_text(encoding="utf-8")
    else:  # older folders have them in their settings: one, or a list of named ones
        found = _read_settings(source / "tokenizer_config.json").get("chat_template")
        named: list[dict] = found if isinstance(found, list) else [{"name": "default", "template": found}]
        templates |= {str(one["name"]): str(one["template"]) for one in named if one["template"]}
    for name, template in templates.items():
        file = folder / (CHAT_TEMPLATE if name == "default" else f"{FURTHER_TEMPLATES}/{Path(name).name}.jinja")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(template, encoding="utf-8")


def text_fingerprint(fingerprint: str) -> str:
    """The part of a tokenizer's fingerprint that stands for the ids of text; all of it before boundary tokens were noted."""
    return fingerprint.partition("-")[0]


def difference(recorded: str, mine: str) -> str:
    """How the tokenizer of a recorded fingerprint differs from another; empty where it does not.

    Records of earlier versions do not note the boundary token, and are compared without it.
    """
    (theirs, noted, their_bos), (ours, _, our_bos) = recorded.partition("-"), mine.partition("-")
    if theirs != ours:
        return f"another tokenizer (fingerprint {theirs[:12]} then, {ours[:12]} now)"
    if noted and their_bos != our_bos:
        return (
            f"another boundary token (id {their_bos} then, {our_bos} now: bos_token or eos_token of tokenizer_config.json has "
            "changed)"
        )
    return ""


def _pieces(text: str) -> list[str]:
    """`text` in pieces without a run of more than 25,000 blanks or non-blanks: nearly always `text` itself.

    Longer runs overflow the stack of tiktoken's regular expressions; Meta's own tokenizer cuts them at the same length.
    """
    if len(text) <= LONGEST_RUN:
        return [text]
    cuts = [0]
    for run in re.finditer(r"\s+|\S+", text):
        cuts += range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
    return [text[start:stop] for start, stop in pairwise([*cuts, len(text)])]


def without_halves(text: str) -> str:
    """`text` with "?" for halves of surrogate pairs, which JSON may hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _stand_in(byte: int) -> str:
    """The printable character that byte-level BPE writes for a byte (GPT-2's mapping)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def _local_or_hub(path: str) -> Path:
    """A local folder (or the folder of a tokenizer.json), or the downloaded files of a Hub id."""
    local = Path(path)
    if local.is_dir():
        return local
    if local.is_file():
        return local.parent
    refuse_missing(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(path, allow_patterns=["tokenizer*.json", CHAT_TEMPLATE, f"{FURTHER_TEMPLATES}/*"])
        )
    except Exception as error:
        raise ValueError(f"tokenizer {path!r} is neither a folder here nor reachable on the Hub: {error}") from error
