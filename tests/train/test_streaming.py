"""Direct streaming: what it reads is compared with the documents themselves, its resumes with an uninterrupted run."""

from __future__ import annotations

import json
import multiprocessing
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from train import records, streaming
from train.config import Config, DataConfig, RunConfig, SourceConfig, TokenizerConfig, TrainingConfig, ValidationConfig
from train.corpus import DataError
from train.streaming import Shards, StreamBatches, read_state, stream_held_out
from train.tokenizer import BOS, ByteTokenizer, HFTokenizer, train_bpe

LENGTH, WINDOW, NUM_DOCUMENTS = 32, 8, 60


def text_of(number: int) -> str:
    """Document `number` consists of its name, so that whatever row holds a part of it also tells which it is."""
    return f"<{number:03d}>" * (8 + number * 7 % 11)


TEXTS = [text_of(number) for number in range(NUM_DOCUMENTS)]


def numbers_in(rows: np.ndarray) -> set[int]:
    """The documents that (rows, T + 1) byte tokens hold a part of."""
    return {int(name) for row in rows for name in re.findall(rb"<(\d{3})>", bytes(t for t in row.tolist() if t < 256))}


def cut(texts: list[str]) -> np.ndarray:
    """(rows, T + 1) byte tokens of these texts one after the other."""
    tokens = [token for text in texts for token in (256, *text.encode())]
    return np.array([tokens[i : i + LENGTH + 1] for i in range(0, len(tokens) - LENGTH, LENGTH)])


def write_shards(folder: Path, kind: str, num_shards: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, numbers in enumerate(np.array_split(np.arange(NUM_DOCUMENTS), num_shards)):
        texts = [TEXTS[number] for number in numbers]
        if kind == "jsonl":
            lines = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts)
            (folder / f"part-{i}.jsonl").write_text(lines)
        else:
            table = pyarrow.table({"text": texts, "other": numbers})
            pyarrow.parquet.write_table(table, folder / f"train-{i}.parquet", row_group_size=4)


def config_of(size: int = 1, seed: int = 5, fraction: float = 0.2, length: int = LENGTH, **data: object) -> Config:
    """A configuration that streams `data` with three rows per process and step."""
    settings = {"streaming": True, "shuffle_window": WINDOW, "validation_fraction": fraction, **data}
    return Config(
        run=RunConfig(seed=seed),
        data=DataConfig(**settings),
        tokenizer=TokenizerConfig(kind="bytes"),
        training=TrainingConfig(global_batch_size=3 * size, sequence_length=length),
    )


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Settings of a corpus of this kind; a Hub dataset is a local folder, which `datasets` opens in the same way."""
    # Small lists, so that windows, lists and shards end at different places.
    monkeypatch.setattr(streaming, "BATCH_DOCUMENTS", 3)

    def make(kind: str, num_shards: int = 3) -> dict:
        write_shards(tmp_path / kind, kind, num_shards)
        if kind == "hub":
            monkeypatch.setenv("HF_HUB_OFFLINE", "0")
            return {"source": "hub", "dataset": str(tmp_path / kind), "subset": ""}
        return {"source": "files", "paths": [str(tmp_path / kind / "*")]}

    return make


def open_stream(
    config: Config, rank: int = 0, size: int = 1, state: dict | None = None, workers: int = 0
) -> StreamBatches:
    return StreamBatches(config, ByteTokenizer(), rank, size, pin=False, state=state, num_workers=workers)


def take(batches: StreamBatches, num_rows: int) -> np.ndarray:
    """The next whole batches of at most so many rows, (rows, T + 1)."""
    return np.concatenate([batch.numpy() for batch in islice(batches, num_rows // 3)])


def same_rows(a: np.ndarray, b: np.ndarray) -> bool:
    return sorted(a.tolist()) == sorted(b.tolist())


def held_out_numbers(config: Config) -> set[int]:
    held_out = stream_held_out(config, ByteTokenizer(), max_rows=1000)
    rows = np.zeros((held_out.count, LENGTH + 1), np.int64)
    for i, row in enumerate(rows):
        held_out.read(i, row)
    return numbers_in(rows)


def test_rows_are_those_of_the_training_documents_shuffled_in_windows(corpus):
    config = config_of(**corpus("jsonl", num_shards=1))
    training = set(range(NUM_DOCUMENTS)) - held_out_numbers(config)
    expected = cut([TEXTS[number] for number in sorted(training)])
    rows = take(open_stream(config), 48)
    assert len(expected) > 48
    for start in range(0, 48, WINDOW):
        assert same_rows(rows[start : start + WINDOW], expected[start : start + WINDOW])
    assert not np.array_equal(rows, expected[:48])


def test_held_out_documents_never_are_in_training(corpus):
    config = config_of(**corpus("parquet"))
    held_out = held_out_numbers(config)
    three_epochs = take(open_stream(config), 3 * len(cut(TEXTS)))
    assert 0 < len(held_out) < NUM_DOCUMENTS / 2
    assert numbers_in(three_epochs) == set(range(NUM_DOCUMENTS)) - held_out


def test_held_out_rows_and_their_length_in_bytes(corpus):
    config = config_of(**corpus("jsonl")).model_copy(update={"validation": ValidationConfig(steps=2)})
    texts = [TEXTS[number] for number in sorted(held_out_numbers(config))]
    held_out = stream_held_out(config, ByteTokenizer())
    assert held_out.count == 2 * config.training.global_batch_size
    row = np.zeros(LENGTH + 1, np.int64)
    held_out.read(5, row)
    assert row.tolist() == cut(texts)[5].tolist()
    everything = stream_held_out(config, ByteTokenizer(), max_rows=1000)
    num_bytes = sum(map(len, texts))
    assert everything.tokens_per_byte == pytest.approx((num_bytes + len(texts)) / num_bytes)


def test_held_out_files_and_ends_of_text_files(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("".join(f"<{i:03d}>\n" for _ in range(90)) + "<777>\n" * 10)
    config = config_of(source="files", paths=[str(tmp_path / "*.txt")], fraction=0.1)
    assert numbers_in(take(open_stream(config), 300)) == {0, 1, 2, 3}
    assert held_out_numbers(config) == {777}

    # Each file goes to another rank, though each is the first document of its shard.
    texts = [texts_of_epoch(config, rank, 5) for rank in range(5)]
    assert sorted(map(len, texts)) == [0, 1, 1, 1, 1]

    (tmp_path / "held-out").mkdir()
    (tmp_path / "held-out" / "a.txt").write_text("<888>\n" * 50)
    config = config_of(source="files", paths=[str(tmp_path / "*.txt")], validation_paths=[str(tmp_path / "held-out/*")])
    assert numbers_in(take(open_stream(config), 300)) == {0, 1, 2, 3, 777}
    assert held_out_numbers(config) == {888}


def test_nothing_held_out_gives_none(corpus):
    assert stream_held_out(config_of(**corpus("jsonl"), fraction=0.0), ByteTokenizer()) is None


# 1 and 3 shards of 2 processes are (also) shared document by document, 4 are not.
@pytest.mark.parametrize(("kind", "num_shards"), [("jsonl", 1), ("parquet", 3), ("parquet", 4), ("hub", 3)])
def test_ranks_see_disjoint_documents_and_together_all(corpus, kind, num_shards):
    config = config_of(size=2, fraction=0.0, **corpus(kind, num_shards))
    texts = [texts_of_epoch(config, rank, 2) for rank in range(2)]
    assert sorted(texts[0] + texts[1]) == TEXTS
    assert min(map(len, texts)) > NUM_DOCUMENTS / 4
    # And the rows are of these texts: a window more than an epoch's rows shows all of them.
    for rank in range(2):
        num_rows = len(cut(texts[rank])) + 2 * WINDOW
        assert numbers_in(take(open_stream(config, rank, 2), num_rows)) >= {TEXTS.index(text) for text in texts[rank]}


def texts_of_epoch(config: Config, rank: int, size: int, epoch: int = 0) -> list[str]:
    """The training texts of a rank in the order of reading."""
    texts: list[str] = []
    start = streaming.START | {"epoch": epoch}
    shards = streaming.Shards(config.data.all_sources[0])
    for _, batch in streaming.TrainingTexts(shards, rank, size, config.run.seed, start).batches():
        if not batch:
            return texts
        texts += batch
    raise AssertionError


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_resumes_give_the_rows_of_an_uninterrupted_run(corpus, tmp_path, kind):
    config = config_of(size=2, **corpus(kind))
    straight = open_stream(config, rank=1, size=2)
    # The end of an epoch lies within, and that of every shard.
    assert len(cut(TEXTS)) / 2 < 90
    expected = take(straight, 90)

    resumed, state = [], None
    for num_steps in (4, 3, 3) * 3:
        batches = open_stream(config, rank=1, size=2, state=state)
        resumed.append(take(batches, 3 * num_steps))
        (tmp_path / "stream-rank-00001.json").write_text(records.sealed(batches.state()))
        state = read_state(tmp_path, 1)
    assert np.array_equal(np.concatenate(resumed), expected)
    assert state["step"] == 30
    assert state == json.loads(json.dumps(straight.state()))


def test_a_run_resumes_from_any_row(corpus, tmp_path):
    # The last row of an epoch starts in a list of texts that alone is shorter than a row.
    texts = ["a" * 40, "b" * 40, "c" * 40, "d" * 5]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = config_of(fraction=0.0, source="files", paths=[str(tmp_path / "a.jsonl")], shuffle_window=1)
    expected, state = take(open_stream(config), 36), None
    for step in range(12):
        batches = open_stream(config, state=state)
        assert np.array_equal(take(batches, 3), expected[3 * step : 3 * step + 3])
        state = batches.state()


def test_the_stream_starts_over_in_another_order(corpus, tmp_path):
    # An epoch is one window exactly, so that every window holds the same rows.
    text = "".join(f"{i:04d}" for i in range(WINDOW * LENGTH))[: WINDOW * LENGTH - 1]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    config = config_of(fraction=0.0, source="files", paths=[str(tmp_path / "a.jsonl")])
    rows = take(open_stream(config), 3 * WINDOW)
    epochs = [rows[start : start + WINDOW] for start in range(0, 3 * WINDOW, WINDOW)]
    tokens = [256, *text.encode()] * 2
    expected = np.array([tokens[i : i + LENGTH + 1] for i in range(0, WINDOW * LENGTH, LENGTH)])
    assert all(same_rows(epoch, expected) for epoch in epochs)
    assert len({epoch.tobytes() for epoch in epochs}) == 3

    # Shards, too, come in another order.
    config = config_of(fraction=0.0, **corpus("parquet", num_shards=6))
    orders = [texts_of_epoch(config, 0, 1, epoch) for epoch in range(3)]
    assert all(sorted(order) == TEXTS for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_another_number_of_processes_is_refused(corpus, tmp_path):
    config = config_of(size=2, **corpus("jsonl"))
    for rank in range(2):
        batches = open_stream(config, rank, 2)
        take(batches, 3)
        (tmp_path / f"stream-rank-{rank:05d}.json").write_text(records.sealed(batches.state()))
    for rank in range(3):
        with pytest.raises(
            DataError, match=r"streamed by 2 processes, this run has 3: resume with 2 processes, or prep"
        ):
            open_stream(
                config.model_copy(update={"training": config_of(3).training}), rank, 3, read_state(tmp_path, rank)
            )
    with pytest.raises(DataError, match="this run has 1"):
        open_stream(config, 0, 1, read_state(tmp_path, 0))


def test_another_stream_is_refused(corpus, tmp_path):
    settings = corpus("jsonl")
    batches = open_stream(config_of(**settings))
    take(batches, 3)
    state = batches.state()
    open_stream(config_of(**settings), state=state)
    for other in (config_of(**settings, seed=6), config_of(**settings, length=16), config_of(2, **settings)):
        with pytest.raises(DataError, match="another stream"):
            open_stream(other, state=state)
    with (tmp_path / "jsonl" / "part-1.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match="another stream"):
        open_stream(config_of(**settings), state=state)
    with pytest.raises(DataError, match=r"was not streamed: resume it with data.streaming = false"):
        read_state(tmp_path, 0)


def test_too_little_text_is_an_error_and_no_endless_loop(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * (LENGTH - 1)}) + "\n")
    config = config_of(size=2, fraction=0.0, source="files", paths=[str(tmp_path / "a.jsonl")])
    found = []
    for rank in range(2):
        with pytest.raises(DataError, match=r"has (\d+) tokens, less than one row of .* = 33") as error:
            take(open_stream(config, rank, 2), 3)
        found.append(re.search(r"process (\d) \(of 2\) has (\d+) tokens", str(error.value)).groups())
    assert sorted(tokens for _, tokens in found) == ["0", str(LENGTH)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * LENGTH}) + "\n")  # one row exactly, again and again
    assert take(open_stream(config_of(fraction=0.0, source="files", paths=config.data.paths)), 6).shape == (
        6,
        LENGTH + 1,
    )


def test_errors_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        open_stream(config_of(source="hub"))
    with pytest.raises(DataError, match="no file matches"):
        open_stream(config_of(source="files", paths=[str(tmp_path / "none*")]))
    with pytest.raises(DataError, match="max_documents"):
        open_stream(config_of(source="files", paths=[__file__], max_documents=5))


def test_the_worker_process_gives_the_same_rows_and_ends(corpus, tmp_path):
    """With a tokenizer that a pickle would damage, on text that spells a special token."""
    settings = corpus("hub")
    spelled = [f"{text[:20]}{BOS}{text}" for text in TEXTS]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": spelled, "other": range(60)}), tmp_path / "hub" / "train-1.parquet"
    )
    train_bpe(iter(TEXTS), 270, tmp_path / "tokenizer")
    kind = TokenizerConfig(kind="hf", path=str(tmp_path / "tokenizer"))
    config = config_of(**settings).model_copy(update={"tokenizer": kind})
    tokenizer = HFTokenizer(tmp_path / "tokenizer")

    def rows(workers: int) -> np.ndarray:
        parts, state = [], None
        for _ in range(2):
            batches = StreamBatches(config, tokenizer, 0, 1, False, state, workers)
            parts.append(take(batches, 30))
            state = json.loads(json.dumps(batches.state()))
            batches.close()
        assert state["step"] == 20
        return np.concatenate(parts)

    here = rows(workers=0)
    assert np.array_equal(rows(workers=1), here)
    # torchdata waits 5 s for a worker, then signals it without waiting: on a busy machine it may still be dying here.
    for worker in multiprocessing.active_children():
        worker.join()
    text = tokenizer.backend.decode(here.flatten().tolist(), skip_special_tokens=True)
    assert BOS in text  # spelled, hence not skipped


def test_the_worker_hands_over_errors_as_they_are(corpus, quick_workers):
    batches = open_stream(config_of(**corpus("hub"), column="body"), workers=1)
    with pytest.raises(DataError) as error:
        next(iter(batches))
    batches.close()
    assert "there is no field 'body'; it has text, other: name the one" in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("kind", ["hub", "jsonl"])
def test_documents_that_cannot_be_used_are_left_out_and_said(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": text_of(i)}) for i in range(6)]
    lines.insert(2, json.dumps({"text": None, "other": 1}) if kind == "hub" else "not JSON")
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(lines))
    where = {"source": "hub", "dataset": str(tmp_path / "data"), "subset": ""}
    if kind == "jsonl":
        where = {"source": "files", "paths": [str(tmp_path / "data" / "a.jsonl")]}
        with pytest.raises(DataError, match=r"a\.jsonl:3: expected a JSON object"):
            list(Shards(SourceConfig(**where, validation_fraction=0.0)).read(0))
    source = SourceConfig(**where, validation_fraction=0.0, skip_invalid=True)
    assert [document.text for document in Shards(source).read(0) if document.text] == [text_of(i) for i in range(6)]
    said = capsys.readouterr().err
    assert ("streaming, so far: 1 invalid document left out (1 no JSON)" in said) == (kind == "jsonl")
