"""Text that cannot be prepared: each refusal names the file and what is wrong with it."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
from support import quietly, write_jsonl

from train.config import Config
from train.corpus import DataError
from train.prepare import corpus_folder
from train.shards import Manifest

TEXTS = [f"Document {i}" for i in range(200)]


def refusal(config: Config) -> str:
    with pytest.raises(DataError) as error:
        quietly(config)
    return str(error.value)


def test_a_glob_without_a_match_is_refused(configure, tmp_path):
    message = refusal(configure(paths=[tmp_path / "*.nothing"]))
    assert f"data.paths: no file matches '{tmp_path / '*.nothing'}'" in message
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    message = refusal(configure("--data.validation_paths", json.dumps([str(tmp_path / "no.txt")]), paths=[file]))
    assert f"data.validation_paths: no such file: {tmp_path / 'no.txt'}" in message


@pytest.mark.parametrize("name", ["a.csv", "a", "a.txt.bz2", "a.jsonl.zst"])
def test_an_unknown_kind_of_file_is_refused(name, configure, tmp_path):
    (tmp_path / name).write_text("text")
    assert f"{tmp_path / name} is not .txt, .jsonl or .parquet" in refusal(configure(paths=[tmp_path / name]))


@pytest.mark.parametrize("text", ["", "  \n\n\t"])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_an_empty_text_file_is_refused(text, kind, configure, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    config = configure("--tokenizer.kind", kind, paths=[tmp_path / "a.txt"])
    assert f"there is no text to train on in {tmp_path / 'a.txt'}" in refusal(config)
    assert not corpus_folder(config, config.data.all_sources[0]).exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "cut', "expected a JSON object with a field 'text'"),
        ('["text"]', "expected a JSON object with a field 'text'"),
        ('"text"', "expected a JSON object with a field 'text'"),
        ('{"txet": "typo"}', "there is no field 'text'; it has txet: name the one with the text in data.column"),
        ('{"text": 5}', "field 'text' holds int, not text"),
        ('{"text": null}', "field 'text' holds NoneType, not text"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line, reason, configure, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    message = refusal(configure(paths=[tmp_path / "a.jsonl"]))
    assert f"{tmp_path / 'a.jsonl'}:3: {reason}" in message


def test_a_missing_column_is_named_beside_those_that_are_there(configure, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    message = refusal(configure(paths=[tmp_path / "a.parquet"]))
    assert f"{tmp_path / 'a.parquet'}: there is no field 'text'; it has body, id: name the one" in message


def test_a_column_that_is_no_text_is_refused(configure, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2, 3]}), tmp_path / "a.parquet")
    message = refusal(configure(paths=[tmp_path / "a.parquet"]))
    assert str(tmp_path / "a.parquet") in message
    assert "'text'" in message


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.gz", "a.jsonl.gz"])
def test_a_damaged_file_is_named(name, configure, tmp_path):
    (tmp_path / name).write_bytes(b"not what the ending says")
    assert str(tmp_path / name) in refusal(configure(paths=[tmp_path / name]))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_cut_off_archive_is_named(name, configure, tmp_path):
    write_jsonl(tmp_path / name, TEXTS)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    assert str(tmp_path / name) in refusal(configure(paths=[tmp_path / name]))


def test_half_a_surrogate_pair_does_not_end_a_prepare(configure, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud83d pair"}\n{"text": "more"}\n')
    flags = ["--tokenizer.kind", "bpe", "--tokenizer.vocab_size", 257, "--data.validation_fraction", 0]
    [folder] = quietly(configure(*flags, paths=[tmp_path / "a.jsonl"]))
    assert Manifest.read(folder).splits["train"].documents == 2


@pytest.mark.parametrize("value", ["1", "true"])
def test_the_hub_is_refused_offline(value, configure, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    message = refusal(configure("--data.source", "hub", "--data.dataset", "some/corpus"))
    assert "'some/corpus' is on the Hub, but HF_HUB_OFFLINE is set" in message


def test_a_folder_that_cannot_be_written_is_named(configure, tmp_path):
    (tmp_path / "file").write_text("")
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    message = refusal(configure("--data.dir", tmp_path / "file" / "data", paths=[file]))
    assert f"data.dir: cannot write to {tmp_path / 'file' / 'data'}" in message


def test_a_tokenizer_that_cannot_be_read_is_refused(configure, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    flags = ["--tokenizer.kind", "tiktoken", "--tokenizer.path", tmp_path / "none.model"]
    assert f"tokenizer: cannot read the tiktoken file {tmp_path / 'none.model'}" in refusal(
        configure(*flags, paths=[file])
    )


def test_a_folder_in_place_of_files_says_how_to_name_them(configure, tmp_path):
    message = refusal(configure(paths=[tmp_path]))
    assert f"{str(tmp_path)!r} is a folder: name the files in it, as in {str(tmp_path / '*.jsonl')!r}" in message
