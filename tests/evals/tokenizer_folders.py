"""Small tokenizer folders of every kind that a run may be given: what is in them beyond the ids used to reach exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "def f(x):\n    return x\n\n",
    "   Leading and  double spaces, Übergröße naïve e\u0301 é",
    "你好 👩‍👩‍👧 123456 don't",
    "<s>a</s> <|end|> [CLS]b[SEP] <tool>x",
    "",
]
"""Also what the tokenizers are trained on."""
CORPUS = [*TEXTS[:3], "the quick brown fox jumps over the lazy dog and leads a double life in space"] * 20
CODE_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def byte_level(prefix_space: bool = False, special: tuple[str, ...] = ("<s>", "</s>")) -> Tokenizer:
    """As GPT-2's and Llama 3's, with the latter's splitting rule."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CODE_SPLIT), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    tokenizer.pre_tokenizer = bytes_ if prefix_space else pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, trainers.BpeTrainer, special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def trained(tokenizer: Tokenizer, trainer: Any, special: tuple[str, ...], **options: Any) -> Tokenizer:
    settings = {"vocab_size": 320, "special_tokens": list(special), "show_progress": False} | options
    tokenizer.train_from_iterator(CORPUS, trainer(**settings))
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: a space before every text, spaces as U+2581, bytes for what the vocabulary lacks."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256))])}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "ab", "▁ab", "th", "the", "▁the"]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("t", "h"), ("th", "e"), ("▁", "the")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return trained(tokenizer, trainers.BpeTrainer, ("<unk>", "<s>", "</s>"))


def unigram() -> Tokenizer:
    """As T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trained(tokenizer, trainers.UnigramTrainer, ("<pad>", "</s>", "<unk>"), unk_token="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def wordpiece() -> Tokenizer:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trained(tokenizer, trainers.WordPieceTrainer, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def with_template(tokenizer: Tokenizer, single: str) -> Tokenizer:
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def normalized() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    return tokenizer


def with_added_tokens() -> Tokenizer:
    """Its first token is an ordinary added one in the file, and special by its role only."""
    tokenizer = byte_level(special=("</s>",))
    tokenizer.add_tokens([AddedToken("<s>", normalized=False), "<tool>", AddedToken("<|end|>", lstrip=True)])
    return tokenizer


def cut_and_padded() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=1, pad_token="</s>", length=8, direction="left")
    return tokenizer


BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
FOLDERS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "plain": (byte_level, BOTH | {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "GPT2Tokenizer": (byte_level, BOTH | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    "GPTNeoXTokenizerFast": (byte_level, BOTH | {"tokenizer_class": "GPTNeoXTokenizerFast"}),
    "Qwen2Tokenizer": (byte_level, BOTH | {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}),
    "LlamaTokenizer": (byte_level, BOTH | {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "prefix space": (lambda: byte_level(True), BOTH | {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": False}),
    "byte fallback": (byte_fallback, BOTH | {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True, "legacy": False}),
    "metaspace": (metaspace, BOTH | {"tokenizer_class": "LlamaTokenizerFast", "unk_token": "<unk>"}),
    "unigram": (unigram, {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "extra_ids": 100}),
    "wordpiece": (wordpiece, {"tokenizer_class": "BertTokenizerFast", "bos_token": "[CLS]", "eos_token": "[SEP]",
                              "do_lower_case": False, "pad_token": "[PAD]", "mask_token": "[MASK]"}),
    "trailing EOS": (lambda: with_template(byte_level(), "<s> $A </s>"), BOTH | {"add_eos_token": True}),
    "EOS only behind": (lambda: with_template(byte_level(), "$A </s>"), BOTH),
    "no BOS": (lambda: byte_level(special=("</s>",)), {"eos_token": {"content": "</s>", "lstrip": False}}),
    "normalizers": (normalized, BOTH | {"do_lower_case": False, "strip_accents": False}),
    "added tokens": (with_added_tokens, BOTH | {"additional_special_tokens": ["<tool>"], "pad_token": "<not there>"}),
    "truncation and padding": (cut_and_padded, BOTH | {"model_max_length": 4, "padding_side": "left"}),
    "chat template": (byte_level, BOTH | {"chat_template": TEMPLATE}),
    "code of its own": (byte_level, BOTH | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}),
}  # fmt: skip


def write_folder(name: str, folder: Path) -> Path:
    make, settings = FOLDERS[name]
    folder.mkdir(parents=True)
    make().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    # Older folders name special tokens once more, and transformers believes this file before the other.
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>"} if name == "plain" else {}))
    return folder
