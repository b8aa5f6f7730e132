"""Token shards: what is refused when they are opened, and reading and writing their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import train.prepare
from train.config import Config
from train.config_sources import load_config
from train.corpus import DataError
from train.data import open_data
from train.prepare import prepare
from train.shards import Manifest, ShardFile, Split, SplitWriter, TokenFile
from train.tokenizer import ByteTokenizer

TEXTS = [f"Document {i}: " + "some words " * (i % 9) for i in range(200)]


def quietly(config: Config) -> list[Path]:
    return prepare(config, say=lambda text: None)


@pytest.fixture
def configure(tmp_path):
    """A configuration of a jsonl file of `texts`, with the byte tokenizer; later flags win."""

    def configuration(*flags: object, texts: list[str] = TEXTS) -> Config:
        path = tmp_path / "corpus.jsonl"
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        if not path.exists() or path.read_text() != content:
            path.write_text(content)
        plain = {
            "data.dir": tmp_path / "data", "data.source": "files", "data.paths": json.dumps([str(path)]),
            "data.validation_fraction": 0.1, "tokenizer.kind": "bytes", "training.sequence_length": 16,
        }  # fmt: skip
        return load_config(
            [], [*(str(part) for key, value in plain.items() for part in (f"--{key}", value)), *map(str, flags)]
        )

    return configuration


@pytest.fixture
def prepared(configure, monkeypatch) -> tuple[Config, Path]:
    """A configuration and its shards, in many small files."""
    monkeypatch.setattr(train.prepare, "TOKENS_PER_FILE", 2000)
    monkeypatch.setattr(train.prepare, "BATCH_CHARACTERS", 700)
    config = configure()
    return config, quietly(config)[0]


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "cut off":
        del data[-2:]
    elif how == "longer":
        data += b"\0\0"
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00003.bin", "validation-00000.bin"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "is missing"),
        ("cut off", r"has \d+ bytes, its manifest says \d+"),
        ("longer", r"has \d+ bytes, its manifest says \d+"),
        ("flipped", r"is not what its manifest says \(sha256 differs\)"),
    ],
)
def test_a_damaged_shard_is_named(how, message, name, prepared):
    config, folder = prepared
    open_data(config, ByteTokenizer(), 257)
    damage(folder / name, how)
    with pytest.raises(DataError, match=f"{folder / name} {message}.*run `newcompute prepare` again"):
        open_data(config, ByteTokenizer(), 257)


def test_large_corpora_are_checked_by_size_alone(prepared, monkeypatch):
    config, folder = prepared
    monkeypatch.setattr("train.shards.FULL_HASH_LIMIT", 1000)
    damage(folder / "train-00001.bin", "flipped")
    open_data(config, ByteTokenizer(), 257)
    damage(folder / "train-00001.bin", "cut off")
    with pytest.raises(DataError, match=r"train-00001\.bin has"):
        open_data(config, ByteTokenizer(), 257)


def test_another_tokenizer_is_refused(prepared, tmp_path):
    config, folder = prepared
    other = train.prepare.train_bpe(iter(TEXTS), 300, tmp_path / "bpe")
    with pytest.raises(DataError, match="was tokenised with another tokenizer") as error:
        open_data(config, other, 300)
    assert str(folder) in str(error.value)
    assert other.fingerprint[:12] in str(error.value)
    assert ByteTokenizer.fingerprint[:12] in str(error.value)


def test_a_corpus_shorter_than_one_row_is_refused(configure):
    def config(length: int) -> Config:
        return configure("--data.validation_fraction", 0, "--training.sequence_length", length, texts=["x" * 16])

    quietly(config(16))
    open_data(config(16), ByteTokenizer(), 257)
    with pytest.raises(DataError, match=r"holds 17 training tokens, fewer than one row of .* \+ 1 = 18"):
        open_data(config(17), ByteTokenizer(), 257)


def test_what_was_not_prepared_is_refused(configure):
    with pytest.raises(DataError, match=r"the tokens of 'files' are not prepared .* run `newcompute prepare` first"):
        open_data(configure(), ByteTokenizer(), 257)


def test_a_fingerprint_is_that_of_the_tokens_not_of_the_place(prepared, configure, tmp_path):
    _, folder = prepared
    fingerprint = Manifest.read(folder).fingerprint
    [copy] = quietly(configure("--data.dir", tmp_path / "elsewhere"))
    assert copy != folder
    assert Manifest.read(copy).fingerprint == fingerprint
    [other] = quietly(configure("--data.validation_fraction", 0.2))
    assert Manifest.read(other).fingerprint != fingerprint


def test_tokens_are_read_across_file_borders(prepared):
    _, folder = prepared
    manifest = Manifest.read(folder)
    parts = [np.fromfile(folder / file.name, np.uint16) for file in manifest.splits["train"].files]
    assert len(parts) > 5
    everything = np.concatenate(parts)
    tokens = TokenFile(folder, manifest, "train")
    assert len(tokens) == len(everything) == manifest.splits["train"].tokens
    borders = np.cumsum([file.tokens for file in manifest.splits["train"].files])
    for border in [0, *borders[:-1].tolist()]:
        for start in (border - 7, border - 1, border):
            for count in (1, 7, 8, 2500):  # the last spans a whole file
                if start >= 0 and start + count <= len(everything):
                    out = np.empty(count, np.int64)
                    tokens.read(start, out)
                    assert out.tolist() == everything[start : start + count].tolist()
    out = np.empty(5, np.int64)
    tokens.read(len(everything) - 5, out)
    assert out.tolist() == everything[-5:].tolist()


def test_files_without_tokens_are_passed_over(tmp_path):
    parts = [[1, 2, 3], [], [4, 5], [6]]
    files = []
    for i, part in enumerate(parts):
        np.array(part, np.uint16).tofile(tmp_path / f"train-{i}.bin")
        files.append(ShardFile(f"train-{i}.bin", len(part), ""))
    splits = {"train": Split(tokens=6, files=files), "validation": Split()}
    manifest = Manifest({}, "", {"fingerprint": ""}, "uint16", splits)
    out = np.empty(6, np.int64)
    TokenFile(tmp_path, manifest, "train").read(0, out)
    assert out.tolist() == [1, 2, 3, 4, 5, 6]
    assert len(TokenFile(tmp_path, manifest, "validation")) == 0


def test_a_file_ends_at_a_documents_end_once_it_is_long_enough(tmp_path):
    writer = SplitWriter(tmp_path, "train", "uint16", max_tokens=10)
    closed = [writer.add(np.full(length, length), 2 * length) for length in (4, 5, 3, 12, 1)]
    writer.close_file()
    assert closed == [False, False, True, True, False]
    assert [file.tokens for file in writer.split.files] == [12, 12, 1]
    assert (writer.split.documents, writer.split.tokens, writer.split.bytes) == (5, 25, 50)
    assert np.fromfile(tmp_path / "train-00000.bin", np.uint16).tolist() == [4] * 4 + [5] * 5 + [3] * 3


def test_a_manifest_survives_writing_and_reading(tmp_path):
    splits = {"train": Split(1, 2, 3, [ShardFile("a", 2, "ff")]), "validation": Split()}
    manifest = Manifest({"source": "files"}, "abc", {"fingerprint": "f"}, "uint32", splits)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
