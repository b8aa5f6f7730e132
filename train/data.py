"""Rows of training data: row i is a pure function of (corpora, seed, i).

Rows of T + 1 tokens are cut from a corpus at multiples of T, so that each token is predicted exactly once per epoch.
Their order is a seeded permutation per epoch; in a mixture `train/mixture.py` says which source gives row i. A step trains
on the next B rows, of which data-parallel rank r takes the r-th contiguous part: how many ranks, workers or resumes there
are cannot change what the model sees.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from models.loss import IGNORE
from train.config import Config
from train.corpus import DataError
from train.mixture import Shares, whole_weights
from train.prepare import corpus_folder, describe_source, tokenizer_key
from train.row_counts import DataState, RowCounts
from train.shards import MANIFEST, Manifest, TokenFile, check_files, verify
from train.tokenizer import Tokenizer

TOO_LITTLE_HELD_OUT = (
    "the held-out text is shorter than one row: raise data.validation_fraction, name data.validation_paths, "
    "or set validation.interval = 0"
)


class Rows(Protocol):
    """A numbered, endless supply of rows."""

    fingerprint: str

    def read(self, i: int, out: np.ndarray) -> None:
        """Write row i, T + 1 tokens, into `out`."""
        ...

    def epoch(self, i: int) -> int: ...


class CorpusRows:
    """Rows of one prepared corpus in a permuted order, a new one each epoch."""

    def __init__(self, tokens: TokenFile, sequence_length: int, key: tuple[int, ...]):
        self.tokens, self.sequence_length, self.key = tokens, sequence_length, key
        self.count = max(0, len(tokens) - 1) // sequence_length
        self._order: tuple[int, np.ndarray] | None = None

    def epoch(self, i: int) -> int:
        return i // self.count

    def read(self, i: int, out: np.ndarray) -> None:
        epoch, position = divmod(i, self.count)
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([*self.key, epoch]).permutation(self.count)
            self._order = (epoch, order.astype(np.uint32 if self.count < 1 << 32 else np.uint64))
        self.tokens.read(int(self._order[1][position]) * self.sequence_length, out)


class Mixture:
    """Rows of several sources, each giving its share of the rows, spread evenly."""

    def __init__(self, sources: list[CorpusRows], weights: list[float], fingerprint: str):
        self.sources, self.fingerprint = sources, fingerprint
        self._shares = Shares(weights)

    def read(self, i: int, out: np.ndarray) -> None:
        source, row = self._shares.locate(i)
        self.sources[source].read(row, out)

    def epoch(self, i: int) -> int:
        source, row = self._shares.locate(i)
        return self.sources[source].epoch(row)


class RandomRows:
    """Uniform tokens, for benchmarks."""

    def __init__(self, vocab_size: int, seed: int):
        self.vocab_size, self.seed = vocab_size, seed
        self.fingerprint = f"random-{vocab_size}"

    def epoch(self, i: int) -> int:
        return 0

    def read(self, i: int, out: np.ndarray) -> None:
        out[:] = np.random.default_rng([self.seed, i]).integers(0, self.vocab_size, len(out))


@dataclass
class HeldOut:
    """The validation rows, in the order of the corpus."""

    parts: list[CorpusRows]
    tokens_per_byte: float
    """Of the whole held-out text (without any, of the training text); turns nats per token into bits per byte."""

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    def read(self, i: int, out: np.ndarray) -> None:
        for part in self.parts:
            if i < part.count:
                part.tokens.read(i * part.sequence_length, out)
                return
            i -= part.count


def open_data(
    config: Config, tokenizer: Tokenizer | None, vocab_size: int, check: bool = True
) -> tuple[Rows, HeldOut | None]:
    """Training and validation rows of a prepared configuration.

    Args:
        check: also verify the shards' contents (once per run is enough: rank 0 does).

    Raises:
        DataError: not prepared, damaged, made with another tokenizer, or too short.
    """
    seed, length = config.run.seed, config.training.sequence_length
    if config.data.all_sources[0].source == "random":
        return RandomRows(vocab_size, seed), None
    assert tokenizer is not None
    train, held_out, fingerprints = [], [], []
    manifests, key = [], tokenizer_key(config)
    for s, source in enumerate(config.data.all_sources):
        folder = corpus_folder(config, source, key)
        if not (folder / MANIFEST).exists():
            raise DataError(
                f"the tokens of {source.source!r} are not prepared ({folder}): run `newcompute prepare` first"
            )
        manifest = Manifest.read(folder)
        if what := manifest.other_tokenizer(tokenizer):
            raise DataError(f"{folder} was tokenised with {what}: run `newcompute prepare` again, or put it back")
        (verify if check else check_files)(folder, manifest)
        rows = CorpusRows(TokenFile(folder, manifest, "train"), length, (seed, s))
        if rows.count < 1:
            raise DataError(
                f"{folder} holds {len(rows.tokens):,} training tokens, fewer than one row of "
                f"training.sequence_length + 1 = {length + 1}"
            )
        train.append(rows)
        held_out.append(CorpusRows(TokenFile(folder, manifest, "validation"), length, (seed, s)))
        fingerprints.append(manifest.fingerprint)
        manifests.append(manifest)
    weights = [source.weight for source in config.data.all_sources]
    mixture = Mixture(train, weights, _fingerprint(fingerprints, weights, length))
    return mixture, HeldOut(held_out, _tokens_per_byte(manifests, weights))


def _tokens_per_byte(manifests: list[Manifest], weights: list[float]) -> float:
    """Of the held-out text; where nothing is held out, of the training text in the proportions of the mixture."""
    held_out = [manifest.splits["validation"] for manifest in manifests]
    if num_bytes := sum(split.bytes for split in held_out):
        return sum(split.tokens for split in held_out) / num_bytes
    training = [manifest.splits["train"] for manifest in manifests]
    return sum(weights) / sum(w * split.bytes / split.tokens for w, split in zip(weights, training, strict=True))


def _fingerprint(corpora: list[str], weights: list[float], length: int) -> str:
    """Changes with the text, its tokens, the rows and their order."""
    # One source has only one order; several had another one before their shares were exact.
    order = [1024] if len(weights) == 1 else ["shares", *whole_weights(weights)]
    return hashlib.sha256(json.dumps([corpora, order, length]).encode()).hexdigest()


def _quotas(weights: list[float], total: int) -> list[int]:
    """How many of the first `total` rows of a mixture each source gives."""
    return Shares(weights).counts(total)


def mixture_warnings(config: Config, held_out: HeldOut | None, num_rows: int) -> Iterator[str]:
    """What a run of `num_rows` rows leaves out of a mixture, in words."""
    sources = config.data.all_sources
    names = [f"data.sources.{i} ({describe_source(source)})" for i, source in enumerate(sources)]
    if len(sources) < 2:
        return
    unread = [name for name, rows in zip(names, _quotas([s.weight for s in sources], num_rows)) if not rows]
    if unread:
        yield f"a run of {num_rows:,} rows reads none of {_some(unread)}: the weight is too small"
    if held_out is None or not config.validation.interval:
        return
    silent = [name for name, part in zip(names, held_out.parts) if not part.count]
    if silent and len(silent) < len(sources):
        yield f"the validation loss is without {_some(silent)}: less than one row of the text is held out"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class RowBatches:
    """This rank's rows of every step, read ahead by a thread.

    Iterating gives (rows, T + 1) int64 tensors, pinned where the device is a GPU, for steps `first_step`, `first_step` + 1
    and so on. `waited` sums the seconds that the consumer stood still.

    Args:
        counts: which rows each step takes; by default as if all steps had taken batches of this size.
    """

    def __init__(
        self,
        rows: Rows,
        config: Config,
        rank: int,
        size: int,
        first_step: int,
        pin: bool,
        counts: RowCounts | None = None,
    ):
        self.rows, self.seed, self.fingerprint = rows, config.run.seed, rows.fingerprint
        self.length = config.training.sequence_length
        self.counts = counts or RowCounts.beginning(config.training.global_batch_size, self.length)
        self.per_rank = config.training.global_batch_size // size
        self.rank, self.pin = rank, pin
        self.step = first_step
        self.waited = 0.0
        self._queue: queue.Queue[Tensor | BaseException] = queue.Queue(maxsize=2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(first_step,), daemon=True, name="read rows")
        self._thread.start()

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            try:
                item: Tensor | BaseException = self._read(step)
            except BaseException as error:  # handed to the consumer, who raises it
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            step += 1

    def _read(self, step: int) -> Tensor:
        batch = torch.empty(self.per_rank, self.length + 1, dtype=torch.int64, pin_memory=self.pin)
        first = self.counts.rows(step) + self.rank * self.per_rank
        for k, out in enumerate(batch.numpy()):
            self.rows.read(first + k, out)
        return batch

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            start = time.perf_counter()
            item = self._queue.get()
            self.waited += time.perf_counter() - start
            if isinstance(item, BaseException):
                raise item
            self.step += 1
            yield item

    def state(self) -> dict[str, Any]:
        """The `DataState` after the batches that were handed out."""
        consumed = self.counts.rows(self.step)
        epoch = self.rows.epoch(max(0, consumed - 1))
        return asdict(DataState(epoch, self.seed, consumed, self.fingerprint, self.counts.stretches))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Resumed(NamedTuple):
    """The checkpoint that a run goes on from, as far as its data is concerned."""

    folder: Path
    step: int
    data: dict[str, Any]
    """Its data state."""


class Batches(Protocol):
    """This rank's batches of every step, as the loop uses them."""

    counts: RowCounts
    """Which rows, and how many tokens, each step takes."""
    fingerprint: str
    """Of the rows and their order."""
    waited: float
    """Seconds the consumer stood still so far."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def close(self) -> None: ...


class TrainingData(Protocol):
    """Where a run's batches come from: prepared shards, or a stream."""

    held_out: HeldOut | None

    def open(self, config: Config, rank: int, size: int, pin: bool, resumed: Resumed | None) -> Batches:
        """Batches from the beginning, or as the resumed checkpoint goes on.

        Raises:
            DataError: the checkpoint does not belong to this data.
        """
        ...

    def state(self, batches: Any, rank: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The data state that a checkpoint records, and this rank's own files for its folder."""
        ...


@dataclass
class PreparedData:
    """Rows of prepared shards (or random ones): their whole state is one number."""

    rows: Rows
    held_out: HeldOut | None

    def open(self, config: Config, rank: int, size: int, pin: bool, resumed: Resumed | None) -> RowBatches:
        if resumed is None:
            return RowBatches(self.rows, config, rank, size, 0, pin)
        counts = counts_after(resumed, self.rows, config)
        return RowBatches(self.rows, config, rank, size, resumed.step, pin, counts)

    def state(self, batches: RowBatches, rank: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        return batches.state(), {}


def counts_after(resumed: Resumed, rows: Rows, config: Config) -> RowCounts:
    """Which rows the steps after a checkpoint take: those after the ones it has consumed, in batches of any size.

    Raises:
        DataError: the checkpoint belongs to other data or another seed, or its counts contradict each other.
    """
    saved = DataState.of(resumed.data, DataError)
    if saved.fingerprint != rows.fingerprint:
        raise DataError(
            "the checkpoint was trained on other data: the corpus, the weights, the sequence length or, with several "
            "sources, the order of their rows differ (mixtures had another order before shares were exact)"
        )
    if saved.seed != config.run.seed:
        raise DataError(
            f"the checkpoint's rows were ordered by run.seed {saved.seed}, this run's seed is {config.run.seed}"
        )
    try:
        counts = saved.counts(resumed.step, config.training.global_batch_size, config.training.sequence_length)
        consumed = counts.rows(resumed.step)
    except ValueError as error:
        raise DataError(f"the checkpoint's record of its data: {error}") from error
    if consumed != saved.rows_consumed:
        raise DataError(
            f"the checkpoint's record of its data says {saved.rows_consumed} rows in one place, and {consumed} until step "
            f"{resumed.step} in another: resume from another step"
        )
    return counts


def validation_batches(held_out: HeldOut, config: Config, rank: int, size: int, micro_batch: int) -> Iterator[Tensor]:
    """This rank's (micro batch, T + 1) validation batches; every rank gets equally many, the last filled up with IGNORE.

    With `validation.steps` the rows are taken at even distances over the whole held-out text, so that every source of a
    mixture is among them.
    """
    limit = config.validation.steps * config.training.global_batch_size
    count = min(held_out.count, limit) if limit else held_out.count
    chosen = np.arange(count) * held_out.count // max(1, count)
    per_round = micro_batch * size
    for start in range(0, count, per_round):
        batch = torch.full((micro_batch, config.training.sequence_length + 1), IGNORE, dtype=torch.int64)
        mine = chosen[start + rank * micro_batch : min(start + (rank + 1) * micro_batch, count)]
        for i, out in zip(mine, batch.numpy()):
            held_out.read(int(i), out)
        yield batch
