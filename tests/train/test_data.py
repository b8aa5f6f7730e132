"""Rows and batches, on corpora whose tokens are their own positions, so that every expectation can be read off."""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split as SplitText

from models.loss import IGNORE
from train.config import Config
from train.config_sources import load_config
from train.corpus import DataError
from train.data import (
    CorpusRows,
    HeldOut,
    Mixture,
    RandomRows,
    Resumed,
    RowBatches,
    Rows,
    counts_after,
    mixture_warnings,
    open_data,
    validation_batches,
)
from train.prepare import prepare, run_tokenizer
from train.row_counts import DataState, RowCounts, Stretch
from train.shards import Manifest, ShardFile, Split, TokenFile

T = 8


def token_file(folder: Path, *sizes: int, first: int = 0) -> TokenFile:
    """Tokens first, first + 1, ... in files of the given sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, size in enumerate(sizes):
        np.arange(first, first + size, dtype=np.uint32).tofile(folder / f"{i}.bin")
        files.append(ShardFile(f"{i}.bin", size, ""))
        first += size
    return TokenFile(folder, Manifest({}, "", {"fingerprint": ""}, "uint32", {"train": Split(files=files)}), "train")


def corpus(folder: Path, *sizes: int, key: tuple[int, ...] = (1, 0), first: int = 0) -> CorpusRows:
    return CorpusRows(token_file(folder, *sizes, first=first), T, key)


def row(rows: Rows, i: int) -> list[int]:
    out = np.empty(T + 1, np.int64)
    rows.read(i, out)
    return out.tolist()


def starts(rows: Rows, numbers: range) -> list[int]:
    return [row(rows, i)[0] for i in numbers]


def configuration(*flags: object) -> Config:
    plain = ["--training.sequence_length", T, "--training.global_batch_size", 8, "--run.seed", 1]
    return load_config([], [str(flag) for flag in [*plain, *flags]])


# Rows of one corpus


@pytest.mark.parametrize("length", [9, 16, 17, 18, 25, 400, 401, 408])
def test_each_token_is_predicted_exactly_once_per_epoch(length, tmp_path):
    """Rows overlap by one token: a row's last target is the next row's first input; what fills no row is left out."""
    rows = corpus(tmp_path, length)
    assert rows.count == (length - 1) // T
    for epoch in range(3):
        read = [row(rows, i) for i in range(epoch * rows.count, (epoch + 1) * rows.count)]
        assert all(tokens == list(range(tokens[0], tokens[0] + T + 1)) for tokens in read)
        targets = sorted(token for tokens in read for token in tokens[1:])
        assert targets == list(range(1, rows.count * T + 1))
        assert {rows.epoch(i) for i in range(epoch * rows.count, (epoch + 1) * rows.count)} == {epoch}


def test_a_row_is_a_pure_function_of_its_number(tmp_path):
    rows = corpus(tmp_path, 401)
    expected = [row(rows, i) for i in range(200)]
    order = np.random.default_rng(0).permutation(200)
    shuffled = corpus(tmp_path, 401)
    assert [row(shuffled, int(i)) for i in order] == [expected[i] for i in order]
    assert row(corpus(tmp_path, 401), 173) == expected[173]


def test_the_order_is_a_new_permutation_for_every_epoch_seed_and_source(tmp_path):
    rows = {key: corpus(tmp_path, 801, key=key) for key in [(1, 0), (2, 0), (1, 1)]}
    orders = [starts(rows[key], range(epoch * 100, epoch * 100 + 100)) for key in rows for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(0, 800, T))
        # A random permutation keeps one element in its place on average.
        assert sum(place * T == start for place, start in enumerate(order)) < 8
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert sum(a == b for a, b in zip(one, other)) < 8


def test_the_order_does_not_change_with_the_version_of_numpy(tmp_path):
    """A run may resume on a newer numpy: if this fails, its permutation is another one, and so are the rows."""
    rows = corpus(tmp_path, 801, key=(1234, 0))
    assert [start // T for start in starts(rows, range(8))] == [26, 86, 84, 56, 66, 40, 89, 81]
    assert [start // T for start in starts(rows, range(100, 108))] == [13, 28, 88, 53, 18, 59, 12, 46]


def test_rows_are_read_across_file_borders(tmp_path):
    whole, parts = corpus(tmp_path / "a", 401), corpus(tmp_path / "b", 3, 100, 1, 1, 150, 146)
    assert parts.count == 50
    assert [row(parts, i) for i in range(100)] == [row(whole, i) for i in range(100)]


# Mixtures


def mixture(folder: Path, weights: list[float], rows: int = 40) -> tuple[Mixture, list[CorpusRows]]:
    """Sources with `rows` rows each; the first token tells the source, since each begins at a multiple of 100,000."""
    sources = [
        corpus(folder / str(s), rows * T + 1, key=(1, s), first=100_000 * s) for s in range(len(weights))
    ]  # fmt: skip
    return Mixture(sources, weights, "fingerprint"), sources


def test_a_mixture_takes_each_sources_rows_in_their_own_order(tmp_path):
    rows, sources = mixture(tmp_path, [0.7, 0.2, 0.1])
    read = [row(rows, i) for i in range(3 * 1024)]
    for s, source in enumerate(sources):
        mine = [tokens for tokens in read if tokens[0] // 100_000 == s]
        assert len(mine) > 300
        assert mine == [row(source, k) for k in range(len(mine))]


def test_a_single_source_is_not_rearranged(tmp_path):
    rows, [source] = mixture(tmp_path, [2.5])
    assert [row(rows, i) for i in range(1500)] == [row(source, i) for i in range(1500)]
    assert [rows.epoch(i) for i in (0, 39, 40, 1024)] == [0, 0, 1, 25]


def test_the_epoch_of_a_mixtures_row_is_its_sources(tmp_path):
    rows, _ = mixture(tmp_path, [3.0, 1.0])
    seen = Counter()
    for i in range(1024):
        source = row(rows, i)[0] // 100_000
        assert rows.epoch(i) == seen[source] // 40
        seen[source] += 1


def test_random_rows_are_uniform_and_pure():
    rows = RandomRows(vocab_size=50, seed=3)
    counts = np.bincount([token for i in range(2000) for token in row(rows, i)], minlength=50)
    assert len(counts) == 50
    assert abs(counts - 360).max() < 5 * 360**0.5
    assert row(rows, 7) == row(RandomRows(50, 3), 7)
    assert row(rows, 7) != row(rows, 8)
    assert row(rows, 7) != row(RandomRows(50, 4), 7)


# Batches


def batches_of(rows: Rows, config: Config, rank: int, size: int, first_step: int, count: int) -> list[torch.Tensor]:
    reader = RowBatches(rows, config, rank, size, first_step, pin=False)
    try:
        return [batch for _, batch in zip(range(count), reader)]
    finally:
        reader.close()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_together_read_the_global_batch_in_order(size, tmp_path):
    rows, _ = mixture(tmp_path, [2.0, 1.0])
    config = configuration()
    parts = [batches_of(rows, config, rank, size, first_step=5, count=4) for rank in range(size)]
    for n in range(4):
        batch = torch.cat([part[n] for part in parts])
        assert batch.dtype == torch.int64
        assert batch.tolist() == [row(rows, (5 + n) * 8 + k) for k in range(8)]


def test_the_state_counts_what_was_handed_out_not_what_was_read_ahead(tmp_path):
    rows, _ = mixture(tmp_path, [1.0])
    reader = RowBatches(rows, configuration(), 0, 1, first_step=3, pin=False)
    stretches = [Stretch(0, 0, 0, 8, 8 * T)]
    assert reader.state() == asdict(DataState(0, 1, rows_consumed=24, fingerprint="fingerprint", stretches=stretches))
    for n, _ in zip(range(1, 4), reader):
        assert reader.state()["rows_consumed"] == (3 + n) * 8
        assert reader.state()["epoch"] == ((3 + n) * 8 - 1) // 40
    reader.close()


def after(step: int, state: dict, rows: Rows, config: Config) -> RowCounts:
    return counts_after(Resumed(Path(), step, json.loads(json.dumps(state))), rows, config)


@pytest.mark.parametrize(("before", "later"), [(1, 1), (1, 4), (4, 2), (8, 1)])
def test_a_resumed_reader_goes_on_where_any_other_number_of_ranks_stopped(before, later, tmp_path):
    rows, _ = mixture(tmp_path, [2.0, 1.0])
    config = configuration()
    straight = batches_of(rows, config, 0, 1, first_step=0, count=9)
    reader = RowBatches(rows, config, 0, before, first_step=0, pin=False)
    for _ in zip(range(5), reader):
        state = reader.state()
    reader.close()
    assert after(5, state, rows, config).rows(5) == 40
    resumed = [batches_of(rows, config, rank, later, 5, count=4) for rank in range(later)]
    for n in range(4):
        assert torch.equal(torch.cat([part[n] for part in resumed]), straight[5 + n])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([4, 8, 12, 20])), min_size=1, max_size=6))
def test_rows_are_read_once_in_order_whatever_batch_sizes_a_run_is_resumed_with(parts):
    """Each part of the run is (steps, batch size); what a step is said to have had is what it was given."""
    rows, given_rows, step, state, tokens = Failing(10**9), [], 0, None, 0
    for steps, size in parts:
        config = configuration("--training.global_batch_size", size)
        counts = None if state is None else after(step, state, rows, config)
        reader = RowBatches(rows, config, 0, 2, step, False, counts)
        other = RowBatches(rows, config, 1, 2, step, False, counts)
        for _, mine, theirs in zip(range(steps), reader, other):
            given_rows.append([*mine[:, 0].tolist(), *theirs[:, 0].tolist()])
        step, tokens = step + steps, tokens + steps * size * T
        state = reader.state()
        assert reader.counts.tokens(step) == tokens
        assert [list(reader.counts.rows_of(n)) for n in range(1, step + 1)] == given_rows
        reader.close()
        other.close()
    assert [row for batch in given_rows for row in batch] == list(range(state["rows_consumed"]))
    assert len(state["stretches"]) <= len(parts)


def test_a_state_without_a_record_of_its_steps_counts_from_there(tmp_path):
    """As checkpoints of earlier versions are: how many rows there were is known, but not which step had which."""
    rows, _ = mixture(tmp_path, [1.0])
    state = {"epoch": 0, "seed": 1, "rows_consumed": 24, "fingerprint": "fingerprint"}
    counts = after(5, state, rows, configuration("--training.global_batch_size", 16))
    assert (counts.rows(5), counts.tokens(5)) == (24, 24 * T)
    assert counts.rows_of(7) == range(40, 56)
    with pytest.raises(ValueError, match="steps up to 5 trained on is not recorded"):
        counts.rows_of(5)


def test_a_step_taken_again_with_another_batch_replaces_its_record():
    counts = RowCounts.beginning(8, T).resumed(10, 4, T).resumed(20, 16, T)
    again = counts.resumed(15, 2, T)
    assert again.stretches == [*counts.stretches[:2], Stretch(15, 100, 100 * T, 2, 2 * T)]
    assert counts.resumed(10, 8, T).stretches == [Stretch(0, 0, 0, 8, 8 * T)]


def test_tokens_are_counted_where_the_length_of_rows_has_changed():
    counts = RowCounts.beginning(8, 32).resumed(3, 8, 64)
    assert [counts.tokens(step) for step in (3, 4)] == [3 * 8 * 32, 3 * 8 * 32 + 8 * 64]
    assert counts.rows(4) == 32


def test_a_state_of_other_data_or_another_seed_is_refused(tmp_path):
    rows, _ = mixture(tmp_path, [1.0])
    with pytest.raises(DataError, match="trained on other data"):
        after(3, asdict(DataState(0, 1, 24, "another")), rows, configuration())
    with pytest.raises(DataError, match=r"run\.seed 7, this run's seed is 1"):
        after(3, asdict(DataState(0, 7, 24, "fingerprint")), rows, configuration())
    stretches = [Stretch(0, 0, 0, 8, 64)]
    with pytest.raises(DataError, match=r"says 25 rows in one place, and 24 until step 3"):
        after(3, asdict(DataState(0, 1, 25, "fingerprint", stretches)), rows, configuration())


class Failing:
    """Rows of which number `at` and the later ones cannot be read."""

    fingerprint = "failing"

    def __init__(self, at: int):
        self.at = at

    def epoch(self, i: int) -> int:
        return 0

    def read(self, i: int, out: np.ndarray) -> None:
        if i >= self.at:
            raise OSError(f"row {i} is gone")
        out[:] = i


@pytest.mark.timeout(60)
@pytest.mark.parametrize("good_steps", [0, 1, 5])
def test_a_readers_failure_reaches_the_consumer_in_its_turn(good_steps):
    reader = RowBatches(Failing(8 * good_steps + 3), configuration(), 0, 1, first_step=0, pin=False)
    batches = iter(reader)
    for step in range(good_steps):
        assert next(batches)[:, 0].tolist() == list(range(8 * step, 8 * step + 8))
    with pytest.raises(OSError, match=f"row {8 * good_steps + 3} is gone"):
        next(batches)
    assert reader.state()["rows_consumed"] == 8 * good_steps
    reader.close()


@pytest.mark.timeout(60)
def test_closing_stops_the_thread_though_nobody_takes_its_batches(tmp_path):
    rows, _ = mixture(tmp_path, [1.0])
    reader = RowBatches(rows, configuration(), 0, 1, first_step=0, pin=False)
    next(iter(reader))
    reader.close()
    assert not reader._thread.is_alive()


# Held-out rows


def held_out(folder: Path, *rows: int) -> HeldOut:
    parts = [corpus(folder / str(s), n * T + 1, first=100_000 * s) for s, n in enumerate(rows)]
    return HeldOut(parts, tokens_per_byte=0.25)


def test_held_out_rows_are_in_the_order_of_the_corpora(tmp_path):
    rows = held_out(tmp_path, 5, 0, 3)
    assert rows.count == 8
    assert starts(rows, range(8)) == [0, 8, 16, 24, 32, 200_000, 200_008, 200_016]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_rows", "micro_batch"), [(1, 4), (7, 2), (12, 3), (13, 1), (24, 4)])
def test_validation_covers_every_row_once_on_any_number_of_ranks(num_rows, micro_batch, size, tmp_path):
    rows = held_out(tmp_path, num_rows)
    config = configuration()
    ranks = [list(validation_batches(rows, config, rank, size, micro_batch)) for rank in range(size)]
    assert {len(batches) for batches in ranks} == {-(-num_rows // (micro_batch * size))}, "equally many on every rank"
    assert all(batch.shape == (micro_batch, T + 1) for batches in ranks for batch in batches)
    read = torch.cat([batch for batches in ranks for batch in batches])
    real = read[read[:, 0] != IGNORE]
    assert sorted(real[:, 0].tolist()) == [T * i for i in range(num_rows)]
    assert torch.equal(real, real[:, :1] + torch.arange(T + 1))
    assert (read[read[:, 0] == IGNORE] == IGNORE).all()


def test_validation_steps_take_rows_from_all_over_the_held_out_text(tmp_path):
    rows = held_out(tmp_path, 50, 50)
    config = configuration("--validation.steps", 2, "--training.global_batch_size", 8)
    read = torch.cat(list(validation_batches(rows, config, 0, 1, micro_batch=4)))[:, 0].tolist()
    numbers = [start // T if start < 100_000 else 50 + (start - 100_000) // T for start in read]
    assert len(numbers) == 16
    assert max(abs(number - 100 * i / 16) for i, number in enumerate(numbers)) <= 1
    many = configuration("--validation.steps", 1000)
    assert torch.cat(list(validation_batches(rows, many, 0, 1, micro_batch=4))).shape[0] == 100


def test_no_held_out_text_gives_no_batches(tmp_path):
    assert list(validation_batches(held_out(tmp_path, 0), configuration(), 0, 1, 4)) == []


# Opening a prepared corpus


@pytest.fixture
def prepared(tmp_path):
    """Corpora of the letters a and b; gives a function from weights and flags to the opened data."""
    for name, count in (("a", 300), ("b", 200)):
        lines = [json.dumps({"text": name * 30}) for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def opened(weights: tuple[float, float] = (3.0, 1.0), *flags: object):
        tables = [
            f'{{source = "files", paths = ["{tmp_path / name}.jsonl"], weight = {weight}, validation_fraction = 0.2}}'
            for name, weight in zip("ab", weights)
        ]
        sources = [
            "--data.dir",
            tmp_path / "data",
            "--tokenizer.kind",
            "bytes",
            "--data.sources",
            f"[{', '.join(tables)}]",
        ]
        config = configuration(*sources, *flags)
        prepare(config, say=lambda text: None)
        return open_data(config, run_tokenizer(config), 257)

    return opened


def test_a_prepared_mixture_is_read_by_its_weights(prepared):
    rows, validation = prepared()
    letters = Counter("".join({chr(token) for token in row(rows, i) if token != 256}) for i in range(1024))
    assert letters == {"a": 768, "b": 256}
    assert validation is not None
    for s, part in enumerate(validation.parts):
        assert set(row(part, 0)) <= {256, ord("ab"[s])}
        assert part.count > 50


def test_more_sources_than_files_may_be_open(tmp_path):
    """As the usual limit of 1,024 is for a mixture of thousands."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limit[1]))
    try:
        rows, sources = mixture(tmp_path, [1.0] * 50, rows=2)
        assert {row(rows, i)[0] // 100_000 for i in range(50)} == set(range(50))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len(sources) == 50


def test_what_a_run_leaves_out_of_a_mixture_is_said(prepared):
    _, validation = prepared((3.0, 1e-9))
    config = configuration(
        "--data.sources", '[{source = "files", paths = "a.md"}, {weight = 1e-9, validation_fraction = 0}]'
    )
    [unread] = mixture_warnings(config, validation, 1000)
    assert unread == "a run of 1,000 rows reads none of data.sources.1 (embedded): the weight is too small"
    validation.parts[1].count = 0
    _, silent = mixture_warnings(config, validation, 1000)
    assert silent.startswith("the validation loss is without data.sources.1 (embedded)")
    assert list(mixture_warnings(configuration(), validation, 1000)) == []
    enough = configuration("--data.sources", '[{source = "files", paths = "a.md"}, {weight = 1.0}]')
    validation.parts[1].count = 1
    assert list(mixture_warnings(enough, validation, 1000)) == []


def test_the_fingerprint_is_that_of_what_is_read(prepared):
    plain = prepared()[0].fingerprint
    assert prepared((6.0, 2.0))[0].fingerprint == plain, "only the ratio of weights counts"
    assert prepared((3.0, 1.0), "--run.seed", 9, "--training.global_batch_size", 16)[0].fingerprint == plain
    assert prepared((1.0, 1.0))[0].fingerprint != plain
    assert prepared((3.0, 1.0), "--training.sequence_length", 16)[0].fingerprint != plain


def test_tokens_per_byte_counts_boundary_tokens_and_bytes(tmp_path):
    text = "ü" * 9 + "\n"  # 19 bytes a line
    (tmp_path / "a.txt").write_text(text * 100)
    (tmp_path / "b.txt").write_text(text * 10)
    config = configuration(
        "--data.dir", tmp_path / "data", "--tokenizer.kind", "bytes", "--data.source", "files",
        "--data.paths", json.dumps([str(tmp_path / "a.txt")]),
        "--data.validation_paths", json.dumps([str(tmp_path / "b.txt")]),
    )  # fmt: skip
    prepare(config, say=lambda text: None)
    _, validation = open_data(config, run_tokenizer(config), 257)
    assert validation is not None
    assert validation.tokens_per_byte == 191 / 190


def test_where_nothing_is_held_out_bits_per_byte_are_of_the_training_text(tmp_path):
    """Three quarters of the rows come from text of one byte a token, the rest from text of four bytes a token."""
    for name, text in (("a", "x" * 400), ("b", "\N{GRINNING FACE}" * 100)):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    sources = [f'{{paths = ["{tmp_path}/a.txt"], weight = 3}}', f'{{paths = ["{tmp_path}/b.txt"]}}']
    flags = ["--data.source", "files", "--data.sources", f"[{', '.join(sources)}]", "--data.dir", tmp_path / "data"]
    tokenizer = Tokenizer(WordLevel({"<bos>": 0, "x": 1, "\N{GRINNING FACE}": 2}, unk_token="<bos>"))
    tokenizer.pre_tokenizer = SplitText(Regex("."), "isolated")
    tokenizer.add_special_tokens(["<bos>"])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    hf = ["--tokenizer.kind", "hf", "--tokenizer.path", tmp_path / "tokenizer"]
    config = configuration(*flags, *hf, "--data.validation_fraction", 0)
    prepare(config, lambda line: None)
    _, held_out = open_data(config, run_tokenizer(config), 257)
    assert held_out.count == 0
    assert 1 / held_out.tokens_per_byte == pytest.approx(0.75 * 400 / 401 + 0.25 * 400 / 101)


def test_random_data_is_opened_without_a_tokenizer():
    rows, validation = open_data(configuration("--data.source", "random"), None, 100)
    assert isinstance(rows, RandomRows)
    assert max(max(row(rows, i)) for i in range(50)) < 100
    assert validation is None
