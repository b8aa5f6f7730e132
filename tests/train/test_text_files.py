"""Text as it comes: byte order marks, bytes that are not UTF-8, documents that cannot be used."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support import quietly, write_jsonl

from train.config import Config, SourceConfig
from train.config_sources import load_config
from train.corpus import DataError, documents
from train.prepare import corpus_folder, prepare
from train.shards import Manifest
from train.text_files import Intake

BAD = "naïve caf\xe9 of latin-1 \ufffd".encode().replace("é".encode(), b"\xe9") + b"\xff\xfe and more"
"""Three bytes that are not UTF-8, beside a replacement character that is."""
LINES = [
    b'{"text": "good one"}',
    b'{"text": "cut',
    b"[1, 2]",
    b'{"txet": "misspelt", "id": 3}',
    b'{"text": 5}',
    b'{"text": "\xff bad byte"}',
    b"",
    b'{"text": "good two"}',
]
INVALID = {"no JSON": 1, "no object": 1, "no such field": 1, "no text": 1, "not UTF-8": 1}


def texts(path: Path, **settings: object) -> list[str]:
    found = documents(SourceConfig(source="files", paths=[str(path)], validation_fraction=0.0, **settings))
    return [document.text for document in found]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# Byte order marks


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    """Only at the very beginning: elsewhere U+FEFF is a character like others."""
    text = "one \ufeff two"
    data = json.dumps({"text": text}, ensure_ascii=False).encode() if ".jsonl" in name else text.encode()
    assert texts(write(tmp_path / name, codecs.BOM_UTF8 + data)) == [text]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_another_encoding_is_named_whatever_is_replaced(name, encoding, tmp_path):
    path = write(tmp_path / name, '{"text": "one"}\n'.encode(encoding))
    with pytest.raises(DataError, match=rf"{name} is {encoding.upper()}, by its byte order mark: convert it to UTF-8"):
        texts(path, errors="replace", skip_invalid=True)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_another_encoding_without_a_mark_is_seen_by_its_zeros(name, encoding, tmp_path):
    """Each of its bytes is valid UTF-8: it would be read as letters with zeros between them."""
    path = write(tmp_path / name, ('{"text": "naïve words"}\n' * 3).encode(encoding))
    with pytest.raises(DataError, match=rf"{name} is no UTF-8, many of its bytes are zero, .*: convert it to UTF-8"):
        texts(path, errors="replace", skip_invalid=True)


def test_a_few_zeros_are_text(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"cut off\0here and there")) == ["cut off\0here and there"]


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path):
    file = write(tmp_path / "a.toml", codecs.BOM_UTF8 + b"[training]\nsteps = 7\n")
    assert load_config([str(file)]).training.steps == 7


# Bytes that are not UTF-8


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_bytes_that_are_not_utf_8_are_counted_and_refused(name, tmp_path):
    path = write(tmp_path / name, BAD)
    message = rf"{name}: 3 bytes are not UTF-8, the first at position 10: .* data\.errors = \"replace\""
    with pytest.raises(DataError, match=message):
        texts(path)
    assert texts(path, errors="replace") == [BAD.decode("utf-8", "replace")]
    assert texts(path, skip_invalid=True) == []


def test_strings_of_a_parquet_file_that_are_not_utf_8(tmp_path):
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 3, 5, 8)))
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"one\xff\xfetwo")])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 2: 2 bytes are not UTF-8"):
        texts(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", errors="replace") == ["one", "\ufffd\ufffd", "two"]
    assert texts(tmp_path / "a.parquet", skip_invalid=True) == ["one", "two"]


def prepared(config: Config) -> tuple[Manifest, str]:
    said: list[str] = []
    [folder] = prepare(config, said.append)
    return Manifest.read(folder), "\n".join(said)


def test_replaced_bytes_stand_in_the_manifest_and_in_what_prepare_says(configure, tmp_path):
    path = write(tmp_path / "a.txt", BAD)
    config = configure("--data.errors", "replace", "--data.validation_fraction", 0, paths=[path])
    for _ in range(2):  # made, and found again
        manifest, said = prepared(config)
        assert (manifest.replaced, manifest.skipped) == (3, {})
        assert "3 bytes are not UTF-8 and replaced" in said


def test_halves_of_surrogate_pairs_are_replaced_and_counted(configure, tmp_path):
    """A whole pair is one character, however JSON writes it."""
    lines = ['{"text": "half? \\ud83d, \\ude00 half"}', '{"text": "whole \\ud83d\\ude00"}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines).encode())
    assert texts(path) == ["half? ?, ? half", "whole \U0001f600"]
    manifest, said = prepared(configure("--data.validation_fraction", 0, paths=[path]))
    assert (manifest.replaced, manifest.skipped) == (6, {})
    assert "6 bytes are not UTF-8 and replaced" in said


# Documents that cannot be used


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_an_invalid_document_is_refused_with_the_way_to_leave_it_out(number, tmp_path):
    path = write(tmp_path / "a.jsonl", LINES[0] + b"\n" + LINES[number] + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*; data\.skip_invalid = true leaves out such documents"):
        texts(path)


def test_invalid_documents_are_left_out_and_counted(configure, tmp_path):
    path = write(tmp_path / "a.jsonl", b"\n".join(LINES))
    assert texts(path, skip_invalid=True) == ["good one", "good two"]
    config = configure("--data.skip_invalid", "true", "--data.validation_fraction", 0, paths=[path])
    manifest, said = prepared(config)
    assert (manifest.splits["train"].documents, manifest.skipped) == (2, INVALID)
    assert "5 invalid documents left out (1 no JSON, 1 no object, 1 no such field, 1 no text, 1 not UTF-8)" in said


def test_the_counts_of_an_interrupted_prepare_are_those_of_a_straight_one(configure, tmp_path, monkeypatch):
    import train.prepare

    monkeypatch.setattr(train.prepare, "TOKENS_PER_FILE", 60)
    monkeypatch.setattr(train.prepare, "BATCH_CHARACTERS", 30)
    path = write(tmp_path / "a.jsonl", b"\n".join(LINES * 20))
    config = configure("--data.skip_invalid", "true", "--data.validation_fraction", 0, paths=[path])
    note, notes = train.prepare._Tokenization._note_position, []

    def interrupted(self, writers, stream):
        note(self, writers, stream)
        notes.append(None)
        if len(notes) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.prepare._Tokenization, "_note_position", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quietly(config)
    manifest, _ = prepared(config)
    assert manifest.skipped == {reason: 20 * count for reason, count in INVALID.items()}
    assert manifest.splits["train"].documents == 40


def test_a_source_of_which_nothing_is_left_says_why(configure, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    flags = ["--data.skip_invalid", "true", "--data.column", "body"]
    with pytest.raises(DataError, match=r"no text to train on in .*: 1 invalid document left out \(1 no such field\)"):
        quietly(configure(*flags, paths=[path]))


def test_the_held_out_documents_are_those_of_the_valid_ones(tmp_path):
    """An invalid line does not move its successors from one part to the other."""
    lines = [json.dumps({"text": f"document {i}"}).encode() for i in range(200)]
    clean = write(tmp_path / "a.jsonl", b"\n".join(lines))
    dirty = write(tmp_path / "b.jsonl", b"\nnot JSON\n".join(lines))
    settings = {"source": "files", "skip_invalid": True, "validation_fraction": 0.2}
    first, second = (list(documents(SourceConfig(paths=[str(path)], **settings))) for path in (clean, dirty))
    assert first == second


def test_folders_of_earlier_versions_keep_their_names():
    """What was prepared without the later keys is found again."""
    config = Config()
    assert corpus_folder(config, config.data.all_sources[0]).name == "embedded-be5c0c973b4b"


def test_a_reader_that_nobody_asks_at_the_end_tells_what_it_replaces_and_leaves_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n' * 10 + b"no JSON\n")
    source = SourceConfig(source="files", paths=[str(tmp_path / "a.jsonl")], errors="replace", skip_invalid=True)
    said: list[str] = []
    assert len(list(documents(source, intake=Intake(source, report=said.append)))) == 10
    assert said == [
        "1 byte is not UTF-8 and replaced",
        "10 bytes are not UTF-8 and replaced",
        "1 invalid document left out (1 no JSON), 10 bytes are not UTF-8 and replaced",
    ]
