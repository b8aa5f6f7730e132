"""Tokenizers against tiktoken's, transformers' and a plain-Python encoding, on real files and awkward text."""

from __future__ import annotations

import base64
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tiktoken.load
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from train.tokenizer import BOS, LLAMA3_PATTERN, Tokenizer, load_tokenizer, train_bpe

KINDS = ["bytes", "bpe", "tiktoken", "hf"]

AWKWARD = {
    "plain": "The quick brown fox jumps over the lazy dog. It's 1,234,567 o'clock, THEY'LL say.",
    "emoji": "👩‍👩‍👧‍👦 family, 🇨🇭 flag, 👍🏽 skin, ☃️ snow",
    "cjk": "你好,世界。日本語のテキスト 한국어 𠜎𠜱",
    "right to left": "שלום עולם مرحبا بالعالم",
    "combining": "é vs e\u0301, Z\u0351\u036b\u0343a\u0357l\u0304go",
    "control": "\x00\x01\x1b[0m\x7f\x85\u200b\ufeff\u2028end",
    "newlines": "a\n\n\n\nb\r\n\r\nc\rd\n",
    "only newlines": "\n\n\n",
    "one newline": "\n",
    "spaces": "   leading, trailing   \t\t \n  mixed \n",
    "empty": "",
}
SPECIAL_SPELLINGS = (
    "<|begin_of_text|>x<|eot_id|> <|end_of_text|><s></s><unk><|reserved_special_token_0|><|start_header_id|>user<0x0A>"
)

# The smallest tiktoken file: one token per byte.
ALL_BYTES = [base64.b64encode(bytes([byte])).decode() + f" {byte}" for byte in range(256)]


@pytest.fixture(scope="module")
def text(text_corpus) -> str:
    return (text_corpus / "corpus.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def llama3(real_inputs) -> Tokenizer:
    return load_tokenizer("tiktoken", str(real_inputs / "llama3-tokenizer"))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, text, tmp_path_factory) -> Tokenizer:
    """One of every kind; the Llama-3 and stories260K ones are real files."""
    if request.param == "bytes":
        return load_tokenizer("bytes")
    if request.param == "bpe":
        return train_bpe(iter([text]), 600, tmp_path_factory.mktemp("bpe"))
    if request.param == "tiktoken":
        return request.getfixturevalue("llama3")
    return load_tokenizer("hf", str(request.getfixturevalue("real_inputs") / "stories260K"))


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """What transformers makes of the folder that `save_hf` writes."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer.save_hf(folder)
    return AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text])[0].tolist()


# Ids


def test_bytes_are_utf8():
    tokenizer = load_tokenizer("bytes")
    for text in AWKWARD.values():
        assert ids_of(tokenizer, text) == list(text.encode())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, None, 257)


def test_llama3_ids_are_tiktokens_own(llama3, real_inputs):
    file = real_inputs / "llama3-tokenizer" / "tokenizer.model"
    # The splitting rule as Meta's released tokenizer.py has it.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ranks = tiktoken.load.load_tiktoken_bpe(str(file))
    reference = tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for name in ("wikitext-2-valid.txt", "tinyshakespeare.txt"):
        text = (real_inputs / "text" / name).read_text(encoding="utf-8")[:300_000]
        assert ids_of(llama3, text) == reference.encode_ordinary(text)
    for text in [*AWKWARD.values(), SPECIAL_SPELLINGS]:
        assert ids_of(llama3, text) == reference.encode_ordinary(text)
    assert ids_of(llama3, "Hello world") == [9906, 1917]  # published examples of Llama 3


def test_llama31_special_tokens_have_their_published_ids(llama3):
    published = {
        "<|begin_of_text|>": 128_000,
        "<|end_of_text|>": 128_001,
        "<|reserved_special_token_0|>": 128_002,
        "<|finetune_right_pad_id|>": 128_004,
        "<|start_header_id|>": 128_006,
        "<|end_header_id|>": 128_007,
        "<|eom_id|>": 128_008,
        "<|eot_id|>": 128_009,
        "<|python_tag|>": 128_010,
        "<|reserved_special_token_247|>": 128_255,
    }
    assert {name: llama3.specials[name] for name in published} == published
    assert sorted(llama3.specials.values()) == list(range(128_000, 128_256))
    assert (llama3.bos_id, llama3.eos_id, llama3.vocab_size) == (128_000, 128_001, 128_256)


def test_tokenizer_json_ids_are_transformers_own(real_inputs):
    folder = real_inputs / "stories260K"
    tokenizer, reference = load_tokenizer("hf", str(folder)), AutoTokenizer.from_pretrained(folder)
    shakespeare = (real_inputs / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000]
    story = (folder / "greedy.txt").read_text(encoding="utf-8")
    for text in [story, shakespeare, *AWKWARD.values(), SPECIAL_SPELLINGS]:
        expected = reference.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids_of(tokenizer, text) == expected
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 512)


def test_trained_bpe_applies_its_merges_in_order(text, tmp_path):
    """Against byte-pair encoding in plain Python: of all adjacent pairs, join the one that was learnt first."""
    tokenizer = train_bpe(iter([text]), 600, tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = model["vocab"]
    order = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
    stand_ins = dict(zip(range(256), bytes_as_characters(), strict=True))

    def encode(piece: str) -> list[int]:
        parts = [stand_ins[byte] for byte in piece.encode()]
        while True:
            pairs = [(order.get(pair, len(order)), i) for i, pair in enumerate(pairwise(parts))]
            rank, i = min(pairs, default=(len(order), 0))
            if rank == len(order):
                return [vocabulary[part] for part in parts]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    for sample in [text[:3000], *AWKWARD.values(), SPECIAL_SPELLINGS]:
        expected = [token for piece in regex.findall(LLAMA3_PATTERN, sample) for token in encode(piece)]
        assert ids_of(tokenizer, sample) == expected


def bytes_as_characters() -> list[str]:
    """GPT-2's table: printable bytes stand for themselves, the others are numbered from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


# What holds for every kind


@pytest.mark.parametrize("name", AWKWARD)
def test_decoding_gives_the_text_back(tokenizer, name):
    text = AWKWARD[name]
    ids = ids_of(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == text
    assert tokenizer.decode(np.array([tokenizer.bos_id, *ids], dtype=np.uint32)) == text


def test_special_spellings_stay_text(tokenizer):
    """A web page that contains the letters of a special token must not end a document."""
    ids = ids_of(tokenizer, SPECIAL_SPELLINGS)
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == SPECIAL_SPELLINGS
    assert len(ids) > 20


def test_batches_keep_their_order(tokenizer, text):
    parts = [text[start : start + 50 + start % 97] for start in range(0, 20_000, 100)]
    batch = tokenizer.encode_batch(parts)
    assert all(ids.dtype == np.uint32 for ids in batch)
    assert [ids.tolist() for ids in batch] == [ids_of(tokenizer, part) for part in parts]
    assert max(int(ids.max()) for ids in batch) < tokenizer.vocab_size
    assert len(tokenizer.encode_batch([])) == 0


def test_lone_surrogates_are_encoded_as_a_replacement(tokenizer):
    """JSON may hold half a surrogate pair, and crawled JSON does; one document must not end a long `prepare`."""
    ids = ids_of(tokenizer, "half\ud83d pair")
    decoded = tokenizer.decode(ids)
    assert decoded.startswith("half")
    assert decoded.endswith(" pair")


@pytest.mark.parametrize("character", [" ", "\n"])
def test_a_million_equal_characters_are_encoded(tokenizer, character):
    """tiktoken's splitting overflows its stack on a long run of blanks."""
    text = character * 1_000_000
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


@pytest.mark.timeout(20)
def test_a_long_run_in_a_long_document_takes_linear_time(tmp_path):
    """A second or two; joining millions of words one by one onto a growing string would take minutes."""
    (tmp_path / "bytes.model").write_text("\n".join(ALL_BYTES))
    text = "word " * 800_000 + " " * 30_000
    assert len(load_tokenizer("tiktoken", str(tmp_path / "bytes.model")).encode_batch([text])[0]) == len(text)


def test_saved_files_restore_the_tokenizer(tokenizer, tmp_path, text):
    kind = {"ByteTokenizer": "bytes", "TiktokenTokenizer": "tiktoken"}.get(type(tokenizer).__name__, "hf")
    tokenizer.save(tmp_path / "saved")
    files = {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    restored = load_tokenizer(kind, str(tmp_path / "saved"))
    restored.save(tmp_path / "saved")  # a run that goes on saves into the folder it was read from
    assert {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == files
    for attribute in ("fingerprint", "vocab_size", "bos_id", "eos_id"):
        assert getattr(restored, attribute) == getattr(tokenizer, attribute)
    assert ids_of(restored, text[:5000]) == ids_of(tokenizer, text[:5000])


# Exported folders


def test_the_export_gives_our_ids_behind_the_boundary_token(tokenizer, exported, text):
    for sample in [text[:5000], *AWKWARD.values()]:
        expected = [tokenizer.bos_id, *ids_of(tokenizer, sample)]
        assert exported(sample)["input_ids"] == expected
        assert exported.decode(expected, skip_special_tokens=True) == sample
    batch = exported(["one", "two words"])["input_ids"]
    assert batch == [[tokenizer.bos_id, *ids_of(tokenizer, part)] for part in ("one", "two words")]


def test_every_token_survives_the_export(tokenizer, exported):
    """Also those that merges alone would not rebuild: tiktoken takes a whole piece of the vocabulary as it is."""
    step = 1 + tokenizer.vocab_size // 10_000
    pieces = [tokenizer.decode([token]) for token in range(0, tokenizer.vocab_size, step)]
    expected = [ids.tolist() for ids in tokenizer.encode_batch(pieces)]
    assert exported(pieces, add_special_tokens=False)["input_ids"] == expected


def test_the_export_knows_the_special_tokens(tokenizer, exported):
    assert exported.bos_token_id == tokenizer.bos_id
    assert exported.eos_token_id == (tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id)
    assert len(exported) == tokenizer.vocab_size


def test_the_export_takes_special_spellings_as_text_too(tokenizer, exported):
    assert exported(SPECIAL_SPELLINGS)["input_ids"] == [tokenizer.bos_id, *ids_of(tokenizer, SPECIAL_SPELLINGS)]


def small_tokenizer_json(folder: Path, settings: dict) -> Path:
    """A byte-level tokenizer.json without a template that adds BOS, as GPT-2's and cosmo2's are."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<|start|>", special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_documents_start_with_eos_where_there_is_no_bos(tmp_path):
    only_eos = load_tokenizer("hf", str(small_tokenizer_json(tmp_path / "a", {"eos_token": "<|endoftext|>"})))
    assert (only_eos.bos_id, only_eos.eos_id) == (256, 256)
    both = {"bos_token": {"content": "<|start|>"}, "eos_token": {"content": "<|endoftext|>", "lstrip": False}}
    with_bos = load_tokenizer("hf", str(small_tokenizer_json(tmp_path / "b", both)))
    assert (with_bos.bos_id, with_bos.eos_id) == (257, 256)
    by_file = load_tokenizer("hf", str(tmp_path / "b" / "tokenizer.json"))
    assert by_file.bos_id == 257


@pytest.mark.parametrize(
    "settings", [{"bos_token": "<|start|>", "eos_token": "<|endoftext|>"}, {"eos_token": "<|endoftext|>"}]
)
def test_the_export_of_a_tokenizer_without_a_template_puts_the_boundary_first(settings, tmp_path):
    """Training rows begin with the boundary token, so lm-eval on the export must see it as well."""
    tokenizer = load_tokenizer("hf", str(small_tokenizer_json(tmp_path / "source", settings)))
    tokenizer.save_hf(tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported("some text")["input_ids"] == [tokenizer.bos_id, *ids_of(tokenizer, "some text")]


# Training a BPE


def test_training_is_deterministic_and_exact_in_size(text, tmp_path):
    one = train_bpe(iter([text[:50_000], text[50_000:]]), 500, tmp_path / "one")
    two = train_bpe(iter([text[:50_000], text[50_000:]]), 500, tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert one.fingerprint == two.fingerprint
    assert (one.vocab_size, one.bos_id) == (500, one.backend.token_to_id(BOS))
    assert len(ids_of(one, text)) < 0.5 * len(text.encode())


def test_fingerprints_tell_tokenizers_apart(text, tmp_path):
    shuffled = [f"{line.split()[0]} {255 - rank}" for rank, line in enumerate(ALL_BYTES)]
    for name, lines in (("plain", ALL_BYTES), ("shuffled", shuffled)):
        (tmp_path / f"{name}.model").write_text("\n".join(lines))
    fingerprints = [
        load_tokenizer("bytes").fingerprint,
        train_bpe(iter([text]), 400, tmp_path / "a").fingerprint,
        train_bpe(iter([text]), 401, tmp_path / "b").fingerprint,
        train_bpe(iter([text[:100_000]]), 400, tmp_path / "c").fingerprint,
        load_tokenizer("hf", str(small_tokenizer_json(tmp_path / "d", {"bos_token": "<|start|>"}))).fingerprint,
        load_tokenizer("tiktoken", str(tmp_path / "plain.model")).fingerprint,
        load_tokenizer("tiktoken", str(tmp_path / "shuffled.model")).fingerprint,
    ]
    assert len(set(fingerprints)) == len(fingerprints)


# Bad files


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "no base64 here\n",
        "aGVsbG8= first\n",
        "aGVsbG8=\n",
        '{"version": "1.0"}\n',
        "\n".join(ALL_BYTES[:100]),  # most bytes have no token: encoding would fail in the middle of a corpus
        "\n".join([*ALL_BYTES, "aGVsbG8= 300"]),  # a gap before the last rank: special ids would collide with tokens
    ],
    ids=["missing", "empty", "text", "no number", "one column", "json", "cut off", "gap"],
)
def test_a_bad_tiktoken_file_is_named(content, tmp_path):
    file = tmp_path / "tokenizer.model"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError) as error:
        load_tokenizer("tiktoken", str(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", ""),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", None),
        ("tokenizer_config.json", "{}"),
        ("tokenizer_config.json", "{bad"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"bos_token": "<not a token>"}'),
    ],
)
def test_a_bad_tokenizer_json_is_named(name, content, tmp_path):
    folder = small_tokenizer_json(tmp_path / "tokenizer", {"bos_token": "<|start|>"})
    load_tokenizer("hf", str(folder))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ValueError) as error:
        load_tokenizer("hf", str(folder))
    assert str(folder / name) in str(error.value)


def test_a_name_that_is_neither_folder_nor_reachable_is_named():
    with pytest.raises(ValueError, match="'organisation/none' is neither a folder here nor reachable on the Hub"):
        load_tokenizer("hf", "organisation/none")


def test_a_copied_tokenizer_folder_has_the_same_fingerprint(real_inputs, tmp_path):
    shutil.copytree(real_inputs / "stories260K", tmp_path / "copy")
    assert (
        load_tokenizer("hf", str(tmp_path / "copy")).fingerprint
        == load_tokenizer("hf", str(real_inputs / "stories260K")).fingerprint
    )
