"""From text to token shards: what is written, when it is written again, and interruptions."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support import quietly, run_python, write_jsonl

import train.prepare
from train.config import Config, SourceConfig
from train.config_sources import load_config
from train.corpus import DataError, documents, embedded_files, is_held_out
from train.data import open_data
from train.prepare import corpus_folder, prepare, run_tokenizer, tokenizer_folder
from train.shards import MANIFEST, Manifest, SplitWriter, verify
from train.tokenizer import ByteTokenizer, load_tokenizer

BOS = 256  # of the byte tokenizer
TEXTS = [f"Document {i}: " + "naïve café 🙂 " * (i % 7) + "\n" * (i % 3) + "end" for i in range(200)]


@pytest.fixture
def small_files(monkeypatch):
    """Files and batches small enough that a short corpus has many of both."""
    monkeypatch.setattr(train.prepare, "TOKENS_PER_FILE", 2000)
    monkeypatch.setattr(train.prepare, "BATCH_CHARACTERS", 700)


def read_split(folder: Path, split: str) -> np.ndarray:
    manifest = json.loads((folder / MANIFEST).read_text())
    parts = [np.fromfile(folder / file["name"], manifest["dtype"]) for file in manifest["splits"][split]["files"]]
    return np.concatenate([np.empty(0, manifest["dtype"]), *parts])


def texts_of(tokens: np.ndarray) -> list[str]:
    """The documents of a token stream, cut at their boundary tokens."""
    assert not len(tokens) or tokens[0] == BOS
    parts = np.split(tokens, np.flatnonzero(tokens == BOS))[1:]
    return [bytes(part[1:].astype(np.uint8)).decode() for part in parts]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What is written


def test_shards_hold_every_document_behind_its_boundary_token(configure, tmp_path, small_files):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    [folder] = quietly(configure("--data.validation_fraction", 0.2, paths=[file]))
    train_texts, held_out = (texts_of(read_split(folder, split)) for split in ("train", "validation"))
    assert train_texts == [text for i, text in enumerate(TEXTS) if not is_held_out(str(i), 0.2)]
    assert held_out == [text for i, text in enumerate(TEXTS) if is_held_out(str(i), 0.2)]
    assert 20 < len(held_out) < 60


def test_the_manifest_counts_what_is_there(configure, tmp_path, small_files):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    [folder] = quietly(configure("--data.validation_fraction", 0.2, paths=[file]))
    manifest = json.loads((folder / MANIFEST).read_text())
    for split in ("train", "validation"):
        record, texts = manifest["splits"][split], texts_of(read_split(folder, split))
        num_bytes = sum(len(text.encode()) for text in texts)
        assert (record["documents"], record["bytes"], record["tokens"]) == (
            len(texts),
            num_bytes,
            num_bytes + len(texts),
        )
        assert record["tokens"] == sum(file["tokens"] for file in record["files"])
        for file in record["files"]:
            data = (folder / file["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (2 * file["tokens"], file["sha256"])
    assert len(manifest["splits"]["train"]["files"]) > 5
    assert {path.name for path in folder.iterdir()} == {MANIFEST} | {
        file["name"] for record in manifest["splits"].values() for file in record["files"]
    }
    assert manifest["tokenizer"] == {"fingerprint": ByteTokenizer.fingerprint, "vocab_size": 257, "bos_id": 256}
    assert manifest["dtype"] == "uint16"


def test_every_format_gives_the_same_tokens(configure, tmp_path):
    table = pyarrow.table({"id": list(range(200)), "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=37)
    files = [
        write_jsonl(tmp_path / "a.jsonl", TEXTS),
        write_jsonl(tmp_path / "b.jsonl.gz", TEXTS),
        write_jsonl(tmp_path / "c.json", TEXTS),
        tmp_path / "d.parquet",
    ]
    expected = None
    for file in files:
        [folder] = quietly(configure("--data.validation_fraction", 0.2, paths=[file]))
        streams = [read_split(folder, split).tolist() for split in ("train", "validation")]
        expected = expected or streams
        assert streams == expected, file.name


def test_another_column_and_empty_records(configure, tmp_path):
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text('{"body": "one", "text": "no"}\n\n{"body": ""}\n{"body": "two"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["three", None, "", "four"]}), tmp_path / "b.parquet")
    config = configure(
        "--data.column", "body", "--data.validation_fraction", 0, paths=[jsonl, tmp_path / "b.parquet"]
    )  # fmt: skip
    [folder] = quietly(config)
    assert texts_of(read_split(folder, "train")) == ["one", "two", "three", "four"]


@pytest.mark.parametrize("compressed", [False, True])
def test_the_end_of_a_text_file_is_held_out(configure, tmp_path, compressed):
    """Cut at a line's end; nothing is lost, nothing is in both parts, line endings stay."""
    text = "".join(f"line {i} of a text with ümlauts\r\n" for i in range(1000))
    file = tmp_path / ("a.txt.gz" if compressed else "a.txt")
    file.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    [folder] = quietly(configure("--data.validation_fraction", 0.1, paths=[file]))
    [kept], [held_out] = texts_of(read_split(folder, "train")), texts_of(read_split(folder, "validation"))
    assert kept + held_out == text
    assert kept.endswith("\n")
    assert len(held_out) / len(text) == pytest.approx(0.1, abs=0.005)


def test_the_held_out_share_of_a_text_file_without_lines_stays_small(tmp_path):
    """One early line end must not hand the whole file to validation."""
    (tmp_path / "a.txt").write_text("A title\n" + "word " * 20_000)
    source = SourceConfig(source="files", paths=[str(tmp_path / "a.txt")], validation_fraction=0.01)
    held_out = sum(len(document.text) for document in documents(source) if document.held_out)
    assert held_out < 0.05 * 100_000


def test_files_are_read_in_the_order_of_the_globs_and_of_their_names(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    patterns = [str(tmp_path / "c.md"), str(tmp_path / "**" / "*.txt"), str(tmp_path / "a.txt")]
    source = SourceConfig(source="files", paths=patterns, validation_fraction=0.0)
    assert [document.text for document in documents(source)] == ["c.md", "a.txt", "b.txt", "sub/d.txt"]


def test_ids_beyond_16_bits_are_stored_in_32(configure, tmp_path, monkeypatch):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

        def encode_batch(self, texts):
            return [ids + 65_500 for ids in super().encode_batch(texts)]

    monkeypatch.setattr(train.prepare, "load_tokenizer", lambda kind, path: Wide())
    file = write_jsonl(tmp_path / "a.jsonl", ["abc", "xyz"])
    [folder] = quietly(configure("--data.validation_fraction", 0, paths=[file]))
    assert Manifest.read(folder).dtype == "uint32"
    expected = [BOS, *(65_500 + byte for byte in b"abc"), BOS, *(65_500 + byte for byte in b"xyz")]
    assert read_split(folder, "train").tolist() == expected


def test_a_limit_takes_the_first_documents(configure, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    [folder] = quietly(configure("--data.max_documents", 30, "--data.validation_fraction", 0, paths=[file]))
    assert texts_of(read_split(folder, "train")) == TEXTS[:30]


def test_a_mixture_has_one_folder_per_source_whatever_its_weight(configure, tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", TEXTS[:50])

    def mixture(weight: float) -> Config:
        tables = [f'{{source = "files", paths = ["{file}"], weight = {weight}}}' for file in (a, b)]
        return configure("--data.sources", f"[{', '.join(tables)}]")

    folders = quietly(mixture(1.0))
    assert [Manifest.read(folder).splits["train"].documents > 100 for folder in folders] == [True, False]
    assert quietly(mixture(3.0)) == folders


def test_a_source_of_which_nothing_is_held_out_is_named(configure, tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", TEXTS[:50])
    tables = f'[{{paths = "{a}"}}, {{paths = "{b}", validation_fraction = 0.0}}]'
    flags = ["--data.source", "files", "--data.validation_fraction", 0.2, "--data.sources", tables]
    said: list[str] = []
    prepare(configure(*flags), said.append)
    assert said[-1] == f"warning: the validation loss will be without {b}, of which nothing is held out"


# What is held out


def test_held_out_documents_are_a_fixed_share_by_number():
    held_out = [i for i in range(20_000) if is_held_out(str(i), 0.1)]
    assert abs(len(held_out) - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    assert {i for i in range(20_000) if is_held_out(str(i), 0.02)} < set(held_out)
    assert not any(is_held_out(str(i), 0.0) for i in range(1000))
    assert all(is_held_out(str(i), 1.0) for i in range(1000))


def test_held_out_documents_do_not_change_when_text_is_added(tmp_path):
    def held_out(texts: list[str]) -> list[bool]:
        source = SourceConfig(
            source="files", paths=[str(write_jsonl(tmp_path / "a.jsonl", texts))], validation_fraction=0.2
        )
        return [document.held_out for document in documents(source)]

    assert held_out(TEXTS)[:120] == held_out(TEXTS[:120])


def test_named_validation_files_are_all_of_the_held_out_text(configure, tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "b.txt"
    b.write_text("held out\n" * 100)
    config = configure("--data.validation_paths", json.dumps([str(b)]), paths=[a])
    [folder] = quietly(config)
    assert texts_of(read_split(folder, "train")) == TEXTS
    assert texts_of(read_split(folder, "validation")) == ["held out\n" * 100]


def test_a_validation_file_that_the_training_globs_match_is_not_trained_on(configure, tmp_path):
    (tmp_path / "a.txt").write_text("train on this\n" * 100)
    (tmp_path / "valid.txt").write_text("validate on this\n" * 100)
    flags = ["--data.validation_paths", json.dumps([str(tmp_path / "valid.txt")])]
    [folder] = quietly(configure(*flags, paths=[tmp_path / "*.txt"]))
    assert not any("validate" in text for text in texts_of(read_split(folder, "train")))


def test_another_spelling_of_a_validation_file_is_not_trained_on_either(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("train on this\n")
    (tmp_path / "valid.txt").write_text("validate on this\n")
    (tmp_path / "link.txt").symlink_to("valid.txt")
    monkeypatch.chdir(tmp_path)
    source = SourceConfig(source="files", paths=["*.txt"], validation_paths=[str(tmp_path / "valid.txt")])
    assert [(document.text, document.held_out) for document in documents(source)] == [
        ("train on this\n", False),
        ("validate on this\n", True),
    ]


def test_a_limit_leaves_the_named_validation_files(configure, tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", ["held out"] * 5)
    flags = ["--data.validation_paths", json.dumps([str(b)]), "--data.max_documents", 30]
    [folder] = quietly(configure(*flags, paths=[a]))
    assert texts_of(read_split(folder, "train")) == TEXTS[:30]
    assert texts_of(read_split(folder, "validation")) == ["held out"] * 5


# The embedded corpus


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A small standard library in place of the running one."""
    root = tmp_path / "lib"
    files = [
        "zlast.py",
        "abc.py",
        "json/decoder.py",
        "json/__init__.py",
        "site-packages/torch.py",
        "dist-packages/x.py",
    ]
    files += ["json/__pycache__/decoder.py", "_sysconfigdata__linux.py", "notes.txt", "empty.py"]
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("" if name == "empty.py" else f"# {name}\n" * 50)
    monkeypatch.setattr("train.corpus.sysconfig.get_paths", lambda: {"stdlib": str(root)})
    return root


def test_the_embedded_corpus_is_the_sorted_source_text_of_the_library(library):
    names = ["abc.py", "empty.py", "json/__init__.py", "json/decoder.py", "zlast.py"]
    assert [path.relative_to(library).as_posix() for path in embedded_files()] == names
    texts = [document.text.splitlines()[0] for document in documents(SourceConfig())]
    assert texts == [f"# {name}" for name in names if name != "empty.py"]


def test_the_embedded_corpus_is_made_again_when_its_text_changes(library, configure):
    config = configure("--data.validation_fraction", 0)
    [folder] = quietly(config)
    before = contents(folder)
    os.utime(library / "abc.py", (1, 1))
    quietly(config)
    assert contents(folder) == before, "only the text counts, not when it was installed"
    (library / "abc.py").write_text("changed = True\n")
    quietly(config)
    assert "changed = True\n" in texts_of(read_split(folder, "train"))
    assert Manifest.read(folder).inputs != json.loads(before[MANIFEST])["inputs"]


def test_the_running_librarys_own_text_is_tens_of_megabytes():
    files = embedded_files()
    assert sum(path.stat().st_size for path in files) > 10e6
    assert not any("site-packages" in path.parts for path in files)


# Again, or not


def test_a_second_prepare_does_nothing(configure, tmp_path, monkeypatch):
    config = configure(paths=[write_jsonl(tmp_path / "a.jsonl", TEXTS)])
    [folder] = quietly(config)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}
    monkeypatch.setattr(ByteTokenizer, "encode_batch", None)
    said: list[str] = []
    assert prepare(config, said.append) == [folder]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()} == before
    assert f"{folder} is prepared" in said[0]


def test_changed_text_is_prepared_again(configure, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    config = configure("--data.validation_fraction", 0, paths=[file])
    [folder] = quietly(config)
    write_jsonl(file, [*TEXTS[:20], "something new"])
    said: list[str] = []
    assert prepare(config, said.append) == [folder]
    assert "was made from other text" in said[0]
    assert texts_of(read_split(folder, "train")) == [*TEXTS[:20], "something new"]
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_settings_that_change_the_tokens_change_the_folder(configure, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    flags: list[list[object]] = [
        [], ["--data.validation_fraction", 0.3], ["--data.max_documents", 10], ["--data.column", "id"],
        ["--tokenizer.kind", "bpe"], ["--tokenizer.kind", "bpe", "--tokenizer.vocab_size", 300],
        ["--tokenizer.kind", "hf", "--tokenizer.path", "somewhere"],
    ]  # fmt: skip
    folders = set()
    for extra in flags:
        config = configure(*extra, paths=[file])
        folders.add(corpus_folder(config, config.data.all_sources[0]))
    assert len(folders) == len(flags)
    config = configure("--training.steps", 500, "--run.seed", 3, paths=[file])
    assert corpus_folder(config, config.data.all_sources[0]) in folders


def test_a_damaged_manifest_is_made_again(configure, tmp_path):
    """Its error says "run `newcompute prepare` again", so that must help."""
    config = configure(paths=[write_jsonl(tmp_path / "a.jsonl", TEXTS)])
    [folder] = quietly(config)
    good = contents(folder)
    for damage in ("", "garbage", "{}", "[]", '"text"'):
        (folder / MANIFEST).write_text(damage)
        with pytest.raises(DataError, match=r"manifest\.json cannot be read .*; run `newcompute prepare` again"):
            open_data(config, ByteTokenizer(), 257)
        quietly(config)
        assert contents(folder) == good


def test_the_bpe_is_trained_once_and_only_on_training_text(configure, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", [f"{text} number {i}" for i, text in enumerate(TEXTS)])
    flags = ["--tokenizer.kind", "bpe", "--tokenizer.vocab_size", 300, "--data.validation_fraction", 0.3]
    config = configure(*flags, paths=[file])
    with pytest.raises(DataError, match="is not there yet: run `newcompute prepare`"):
        run_tokenizer(config)
    seen: list[str] = []
    train_bpe = train.prepare.train_bpe

    def recording(texts, *arguments):
        seen.extend(texts)
        return train_bpe(iter(seen), *arguments)

    monkeypatch.setattr(train.prepare, "train_bpe", recording)
    [folder] = quietly(config)
    held_out = {document.text for document in documents(config.data.all_sources[0]) if document.held_out}
    assert len(seen) > 20
    assert held_out
    assert not held_out & set(seen)
    tokenizer = run_tokenizer(config)
    assert tokenizer.vocab_size == 300
    assert Manifest.read(folder).tokenizer["fingerprint"] == tokenizer.fingerprint
    assert load_tokenizer("bpe", str(tokenizer_folder(config))).fingerprint == tokenizer.fingerprint

    monkeypatch.setattr(train.prepare, "train_bpe", None)
    assert quietly(config) == [folder]


def test_random_data_needs_no_preparation(configure, tmp_path):
    assert quietly(configure("--data.source", "random")) == []
    assert not (tmp_path / "data").exists()


def test_two_prepares_of_one_folder_take_turns(configure, tmp_path):
    config = configure(paths=[write_jsonl(tmp_path / "a.jsonl", TEXTS)])
    (tmp_path / "data").mkdir()
    waiting, said = threading.Event(), []

    def say(text: str) -> None:
        said.append(text)
        waiting.set()

    with open(tmp_path / "data" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=prepare, args=(config, say))
        thread.start()
        assert waiting.wait(30)
        assert said == [f"waiting for another prepare in {tmp_path / 'data'}"]
        assert thread.is_alive()
    thread.join(30)
    assert (corpus_folder(config, config.data.all_sources[0]) / MANIFEST).exists()


# Interruptions


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, cls: type, method: str, calls: int) -> list[int]:
    """Let a method fail at its n-th call; the returned list counts the calls, and `.clear()` starts anew."""
    original, counted = getattr(cls, method), []

    def counting(self, *arguments):
        counted.append(len(counted))
        if len(counted) == calls:
            raise Interrupted
        return original(self, *arguments)

    monkeypatch.setattr(cls, method, counting)
    return counted


@pytest.fixture
def uninterrupted(configure, tmp_path, small_files) -> dict[str, bytes]:
    config = configure(
        "--data.dir", tmp_path / "other", "--data.validation_fraction", 0.1,
        paths=[write_jsonl(tmp_path / "a.jsonl", TEXTS)],
    )  # fmt: skip
    return contents(quietly(config)[0])


def nothing_looks_finished(config: Config) -> bool:
    folder = corpus_folder(config, config.data.all_sources[0])
    with pytest.raises(DataError, match="are not prepared"):
        open_data(config, ByteTokenizer(), 257)
    return not folder.exists()


@pytest.mark.parametrize(
    ("cls", "method", "calls"),
    [(ByteTokenizer, "encode_batch", calls) for calls in (1, 2, 5, 9, 13)]
    + [(SplitWriter, "add", calls) for calls in (1, 40, 41, 97, 150, 200)]
    + [(Manifest, "write", 1)],
)
def test_an_interrupted_prepare_goes_on_to_identical_shards(
    cls, method, calls, configure, tmp_path, uninterrupted, monkeypatch
):
    config = configure("--data.validation_fraction", 0.1, paths=[tmp_path / "a.jsonl"])
    counted = interrupt_after(monkeypatch, cls, method, calls)
    with pytest.raises(Interrupted):
        quietly(config)
    assert len(counted) == calls
    assert nothing_looks_finished(config)
    [folder] = quietly(config)
    assert contents(folder) == uninterrupted
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_a_prepare_interrupted_twice_does_not_start_from_the_beginning(configure, tmp_path, uninterrupted, monkeypatch):
    config = configure("--data.validation_fraction", 0.1, paths=[tmp_path / "a.jsonl"])
    counted = interrupt_after(monkeypatch, SplitWriter, "add", 80)
    with pytest.raises(Interrupted):
        quietly(config)
    partial = corpus_folder(config, config.data.all_sources[0]).with_suffix(".partial")
    first = json.loads((partial / "position.json").read_text())["documents"]
    assert 0 < first < 80
    counted.clear()
    with pytest.raises(Interrupted):
        quietly(config)
    second = json.loads((partial / "position.json").read_text())["documents"]
    assert first + 40 < second < first + 80
    [folder] = quietly(config)
    assert len(counted) == 80 + 200 - second
    assert contents(folder) == uninterrupted


def test_an_interrupted_prepare_with_a_limit_and_validation_files_goes_on_to_identical_shards(
    configure, tmp_path, small_files, monkeypatch
):
    """What the limit leaves out stands between the two kinds of documents, and is no part of the position."""
    a, b = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", TEXTS[::-1])
    flags = ["--data.validation_paths", json.dumps([str(b)]), "--data.max_documents", 50]
    expected = contents(quietly(configure(*flags, "--data.dir", tmp_path / "other", paths=[a]))[0])
    config = configure(*flags, paths=[a])
    interrupt_after(monkeypatch, SplitWriter, "add", 200)
    with pytest.raises(Interrupted):
        quietly(config)
    [folder] = quietly(config)
    assert len(texts_of(read_split(folder, "validation"))) == len(TEXTS)
    assert contents(folder) == expected


def test_an_interrupted_prepare_of_changed_text_starts_from_the_beginning(
    configure, tmp_path, uninterrupted, monkeypatch
):
    config = configure("--data.validation_fraction", 0, paths=[tmp_path / "a.jsonl"])
    interrupt_after(monkeypatch, SplitWriter, "add", 150)
    with pytest.raises(Interrupted):
        quietly(config)
    write_jsonl(tmp_path / "a.jsonl", list(reversed(TEXTS)))
    [folder] = quietly(config)
    assert texts_of(read_split(folder, "train")) == list(reversed(TEXTS))
    verify(folder, Manifest.read(folder))


def test_an_interruption_before_the_last_rename_leaves_nothing_finished(
    configure, tmp_path, uninterrupted, monkeypatch
):
    config = configure("--data.validation_fraction", 0.1, paths=[tmp_path / "a.jsonl"])
    with monkeypatch.context() as context:
        context.setattr(train.prepare.os, "rename", lambda *paths: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            quietly(config)
    assert nothing_looks_finished(config)
    assert contents(quietly(config)[0]) == uninterrupted


KILLED = """
import os, signal, sys
import train.prepare
from train.config_sources import load_config
from train.tokenizer import ByteTokenizer

train.prepare.TOKENS_PER_FILE, train.prepare.BATCH_CHARACTERS = 2000, 700
encode, calls = ByteTokenizer.encode_batch, []

def encode_or_die(self, texts):
    calls.append(texts)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, texts)

ByteTokenizer.encode_batch = encode_or_die
train.prepare.prepare(load_config([], sys.argv[1:]))
"""


def test_a_killed_prepare_goes_on_to_identical_shards(configure, tmp_path, uninterrupted, monkeypatch):
    """SIGKILL: no handler runs, and what was buffered is lost."""
    flags = [
        "--data.dir", str(tmp_path / "data"), "--tokenizer.kind", "bytes", "--data.source", "files",
        "--data.paths", json.dumps([str(tmp_path / "a.jsonl")]), "--data.validation_fraction", "0.1",
    ]  # fmt: skip
    done = run_python("-c", KILLED, *flags, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    config = load_config([], flags)
    assert nothing_looks_finished(config)
    counted = interrupt_after(monkeypatch, SplitWriter, "add", 0)
    [folder] = quietly(config)
    assert contents(folder) == uninterrupted
    assert 0 < len(counted) < 200, "it went on from the noted position"


def test_a_hub_stream_goes_on_from_its_own_state(configure, tmp_path, small_files, monkeypatch):
    """With a real streaming dataset, made from records in memory; what was read before is not read again."""
    import datasets

    read: list[int] = []

    def counted(record):
        read.append(record["id"])
        return record

    def hub_dataset(source):
        table = datasets.Dataset.from_list([{"id": i, "text": text} for i, text in enumerate(TEXTS)])
        return table.to_iterable_dataset(num_shards=4).map(counted)

    monkeypatch.setattr("train.corpus.hub_dataset", hub_dataset)
    flags = ["--data.source", "hub", "--data.validation_fraction", 0.1]
    expected = contents(quietly(configure(*flags, "--data.dir", tmp_path / "other"))[0])
    assert sorted(read) == list(range(200))

    config = configure(*flags)
    interrupted = interrupt_after(monkeypatch, SplitWriter, "add", 120)
    with pytest.raises(Interrupted):
        quietly(config)
    interrupted.clear()
    read.clear()
    [folder] = quietly(config)
    assert contents(folder) == expected
    assert 0 < len(interrupted) < 200
    # A stream's state may lie a little before the place; what it reads over again is no whole shard of 50.
    assert len(read) <= len(interrupted) + 50
