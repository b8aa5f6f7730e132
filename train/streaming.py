"""Direct streaming (`data.streaming`): documents are read and tokenised while training, and nothing is prepared.

A corpus is a list of shards: local files, or the files behind a Hub dataset. Each epoch permutes them; a rank reads
some alone, and those that the division leaves over are shared out document by document: each document goes to one rank.
Rows are cut from its tokens as in `train/data.py` and shuffled in windows. What is held out is decided by a hash of the
text (of a text file: its end), which no rank, order or repetition can change.

The price: a place in this stream is that of one rank among so many. A run resumes on as many processes as before, and
first reads its window again, and the shard up to it. A place is a count of documents: of the means of `datasets`,
`state_dict()` starts over at a second resume in 5.0.0, `skip` repeats documents in 4.8.5, a shuffle buffer is lost on
resume, and what `set_epoch` permutes depends on the release; they read the shard from its beginning, too.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from parallel.mesh import Mesh
from train import records
from train.config import Config, SourceConfig
from train.corpus import DataError, Document, documents, hub_dataset, hub_text, input_files, is_held_out
from train.data import TOO_LITTLE_HELD_OUT, CorpusRows, HeldOut, Resumed
from train.prepare import run_tokenizer, source_content
from train.row_counts import DataState, RowCounts
from train.text_files import Intake
from train.tokenizer import Tokenizer, text_fingerprint

BATCH_DOCUMENTS = 64  # encoded at a time: enough to keep a tokenizer's threads busy, little to encode again on resume
HELD_OUT_SEARCH = 200_000  # documents among which held-out ones are looked for: a bound on what is read before step 1
HELD_OUT_BATCHES = 20

State = dict[str, Any]
START: State = {"epoch": 0, "shard": 0, "num_read": 0}
"""A rank's first place: which of the epoch's shards, and how many of its documents have been read."""
BEGINNING: State = {"place": START, "carry": [], "num_tokens": 0, "skip": 0}
"""Arguments of `_Batches._rows` for the first row."""


def _say_skipped(counts: str) -> None:
    print(f"streaming, so far: {counts}", file=sys.stderr, flush=True)


class Shards:
    """The numbered shards of a source. It travels to the worker process, which thus reads the very same files.

    Raises:
        DataError: a glob matches nothing, the Hub cannot be reached, or the number of documents is limited.
    """

    def __init__(self, source: SourceConfig):
        if source.max_documents:
            raise DataError("data.max_documents: streaming ends with training.steps; leave it out, or prepare the data")
        self.source = source
        self.intake = Intake(source, report=_say_skipped)
        self.held_out_paths = source.validation_paths if source.source == "files" else []
        self.fraction = 0.0 if self.held_out_paths else source.validation_fraction
        self.dataset = hub_dataset(source) if source.source == "hub" else None
        self.files = [] if self.dataset is not None else input_files(source.model_copy(update={"validation_paths": []}))
        self.count = self.dataset.num_shards if self.dataset is not None else len(self.files)

    def identity(self) -> list[Any]:
        """What makes it this corpus and no other; where local files lie does not matter."""
        content = source_content(self.source, without={"paths", "validation_paths"})
        return [content, self.fraction, self.count, [(path.name, path.stat().st_size) for path in self.files]]

    def read(self, index: int, skip: int = 0) -> Iterator[Document]:
        """The documents of one shard after its first `skip`."""
        if self.dataset is None:
            yield from self._local(self.files[index], skip)
            return
        shard = self.dataset.shard(num_shards=self.count, index=index)
        for record in islice(shard, skip, None):
            # A document that is left out stays in the count of what was read, as an empty one.
            yield self._record(hub_text(record, self.source, self.intake) or "")

    def _local(self, path: Path, skip: int) -> Iterator[Document]:
        # A text file is one document, the end of which is held out; of records, whole ones are.
        is_text = Path(path.name.removesuffix(".gz")).suffix not in (".jsonl", ".json", ".parquet")
        fraction = self.fraction if is_text else 0.0
        only = {"paths": [glob.escape(str(path))], "validation_paths": [], "validation_fraction": fraction}
        for document in documents(self.source.model_copy(update=only), skip, intake=self.intake):
            yield document if is_text else self._record(document.text)

    def _record(self, text: str) -> Document:
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Document(text, is_held_out(digest, self.fraction))

    def held_out_texts(self) -> Iterator[str]:
        """The held-out documents: those of `validation_paths`, or those found at the beginning of the corpus."""
        if self.held_out_paths:
            yield from (document.text for document in documents(self.source.model_copy(update={"paths": []})))
        found = (document for index in range(self.count) for document in self.read(index))
        for document in islice(found, HELD_OUT_SEARCH if self.fraction else 0):
            if document.held_out and document.text:
                yield document.text


class TrainingTexts:
    """The training documents of one rank, epoch after epoch, from a place such as `START` on."""

    def __init__(self, shards: Shards, rank: int, size: int, seed: int, place: State):
        self.shards, self.rank, self.size, self.seed, self._at = shards, rank, size, seed, dict(place)

    def batches(self) -> Iterator[tuple[State, list[str]]]:
        """Texts to encode at once, each time with the place from which they come again; none at the end of an epoch."""
        while True:
            epoch = self._epoch()
            texts = [""]
            while texts:
                place = dict(self._at)
                texts = list(islice(epoch, BATCH_DOCUMENTS))
                yield place, texts
            self._at = {**START, "epoch": self._at["epoch"] + 1}

    def _epoch(self) -> Iterator[str]:
        at = self._at
        for index, shared in self._order(at["epoch"])[at["shard"] :]:
            for document in self.shards.read(index, at["num_read"]):
                at["num_read"] += 1
                # Counted on from the shard's number, so that files of one document each do not all go to one rank.
                mine = not shared or (index + at["num_read"]) % self.size == self.rank
                if mine and document.text and not document.held_out:
                    yield document.text
            at.update(shard=at["shard"] + 1, num_read=0)

    def _order(self, epoch: int) -> list[tuple[int, bool]]:
        """This rank's shards of an epoch, each with whether all ranks share it."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.shards.count).tolist()
        alone = len(order) - len(order) % self.size
        return [(i, False) for i in order[self.rank : alone : self.size]] + [(i, True) for i in order[alone:]]


class _Batches(IterableDataset):
    """What the worker runs: endless (rows, T + 1) uint32 batches. Its state is the place after the last one given."""

    def __init__(self, config: Config, tokenizer: Tokenizer, shards: Shards, rank: int, size: int):
        self.config, self.shards, self.rank, self.size = config, shards, rank, size
        self.tokenizer: Tokenizer | None = tokenizer
        # The place of the window being given, its number, and how many of its rows were given.
        self._state: State = {"start": BEGINNING, "window": 0, "given": 0}

    def __getstate__(self) -> State:
        # The worker opens its own tokenizer: a pickled `tokenizers.Tokenizer` forgets `encode_special_tokens`, and the
        # spelling of a special token in a document would become that token.
        return {**self.__dict__, "tokenizer": None}

    def state_dict(self) -> State:
        return self._state

    def load_state_dict(self, state: State) -> None:
        self._state = state

    def __iter__(self) -> Iterator[np.ndarray | DataError]:
        rows, count = self._shuffled(), self.config.training.global_batch_size // self.size
        try:
            while True:
                yield np.stack([next(rows) for _ in range(count)])
        except DataError as error:
            yield error  # handed over as an item: raised here, its message would arrive as a traceback

    def _shuffled(self) -> Iterator[np.ndarray]:
        """Rows (T + 1,) in the order of training."""
        number, given = self._state["window"], self._state["given"]
        source, size = self._rows(**self._state["start"]), self.config.data.shuffle_window
        window = list(islice(source, size))
        while True:
            following = []
            order = np.random.default_rng([self.config.run.seed, self.rank, number]).permutation(size)
            for k, index in enumerate(order, start=1):
                # One row in for one row out: training never waits for a whole window to be tokenised.
                following.append(next(source))
                if k > given:
                    self._state = {"start": window[0][0], "window": number, "given": k}
                    yield window[index][1]
            window, number, given = following, number + 1, 0

    def _rows(self, place: State, carry: list[int], num_tokens: int, skip: int) -> Iterator[tuple[State, np.ndarray]]:
        """Rows in the order of the stream, epoch after epoch, each with the arguments that start at it.

        Args:
            place: before the next documents to encode.
            carry: tokens that precede theirs.
            num_tokens: tokens of the epoch up to there.
            skip: rows to leave out.
        """
        tokenizer, length = self.tokenizer or run_tokenizer(self.config), self.config.training.sequence_length
        bos, rest = np.array([tokenizer.bos_id], np.uint32), np.array(carry, np.uint32)
        for before, texts in TrainingTexts(self.shards, self.rank, self.size, self.config.run.seed, place).batches():
            if not texts:
                if num_tokens <= length:
                    raise DataError(
                        f"the training text of process {self.rank} (of {self.size}) has {num_tokens} tokens, less than "
                        f"one row of training.sequence_length + 1 = {length + 1}: take more text or fewer processes"
                    )
                num_tokens = 0
                continue
            tokens = np.concatenate([rest, *(part for ids in tokenizer.encode_batch(texts) for part in (bos, ids))])
            start = {"place": before, "carry": rest.tolist(), "num_tokens": num_tokens}
            num_tokens += len(tokens) - len(rest)
            count = (len(tokens) - 1) // length
            for k in range(skip, count):
                yield {**start, "skip": k}, tokens[k * length : (k + 1) * length + 1]
            rest, skip = tokens[count * length :].copy(), 0


class StreamBatches:
    """This rank's rows of every step, made by a worker process; used as `train.data.RowBatches` is.

    Iterating gives (rows, T + 1) int64 tensors, pinned if `pin`. `waited` sums the seconds the consumer stood still.

    Args:
        state: from `read_state`, to go on from there; `step` is then the step reached.
        num_workers: 1, or 0 to tokenise in this process; torchdata refuses a state of the other.

    Raises:
        DataError: the text cannot be read, or the state is of another stream.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        rank: int,
        size: int,
        pin: bool,
        state: State | None = None,
        num_workers: int = 1,
    ):
        self.pin, self.step, self.waited = pin, 0, 0.0
        shards, training = Shards(config.data.all_sources[0]), config.training
        # Another batch size is another stream, so all steps have taken equally many rows.
        self.counts = RowCounts.beginning(training.global_batch_size, training.sequence_length)
        # A checkpoint notes the boundary token itself.
        text = text_fingerprint(tokenizer.fingerprint)
        stream = [shards.identity(), text, training.sequence_length, training.global_batch_size]
        fingerprint = hashlib.sha256(json.dumps([*stream, config.data.shuffle_window]).encode()).hexdigest()
        self.fingerprint = f"stream-{fingerprint}"
        self.identity: State = {"rank": rank, "size": size, "seed": config.run.seed, "fingerprint": fingerprint}
        batches = _Batches(config, tokenizer, shards, rank, size)
        # Spawned, since a fork would copy the locks of the process group's and CUDA's threads.
        context = "spawn" if num_workers else None
        self._loader: Any = StatefulDataLoader(
            batches, batch_size=None, num_workers=num_workers, multiprocessing_context=context
        )
        if state is not None:
            self._go_on(state)

    def _go_on(self, state: State) -> None:
        if state["size"] != self.identity["size"]:
            raise DataError(
                f"the checkpoint was streamed by {state['size']} processes, this run has {self.identity['size']}: "
                f"resume with {state['size']} processes, or prepare the data: prepared shards resume on any number"
            )
        if any(state[key] != value for key, value in self.identity.items()):
            raise DataError(
                "the checkpoint was trained on another stream: text, tokenizer, run.seed, data.shuffle_window, "
                "training.sequence_length or training.global_batch_size differ"
            )
        self.step = state["step"]
        self._loader.load_state_dict(state["loader"])

    def __iter__(self) -> Iterator[Tensor]:
        batches = iter(self._loader)
        while True:
            start = time.perf_counter()
            item = next(batches)
            if isinstance(item, DataError):
                raise item
            rows = item.to(torch.int64).pin_memory() if self.pin else item.to(torch.int64)
            self.waited += time.perf_counter() - start
            self.step += 1
            yield rows

    def state(self) -> State:
        """This rank's place after the batches that were handed out; JSON-serialisable."""
        return {**self.identity, "step": self.step, "loader": self._loader.state_dict()}

    def close(self) -> None:
        self._loader = None  # with the last reference to the loader its worker ends


@dataclass(frozen=True)
class StreamState:
    """What `StreamBatches.state` gives."""

    __pydantic_config__ = records.STRICT
    rank: int
    size: int
    seed: int
    fingerprint: str
    step: int
    loader: dict[str, Any]


def read_state(folder: Path, rank: int) -> State:
    """One rank's state out of a checkpoint; with more ranks than wrote it, rank 0's, which `StreamBatches` refuses.

    Raises:
        DataError: the checkpoint was not streamed, or the state has been changed.
    """
    for path in (folder / f"stream-rank-{rank:05d}.json", folder / "stream-rank-00000.json"):
        if path.exists():
            return asdict(records.read(StreamState, path, DataError, "; resume from another step"))
    raise DataError(f"{folder} was not streamed: resume it with data.streaming = false")


@dataclass
class StreamedData:
    """A run's batches out of a stream."""

    tokenizer: Tokenizer
    held_out: HeldOut | None

    @classmethod
    def start(cls, config: Config, mesh: Mesh, tokenizer: Tokenizer) -> StreamedData:
        """Rank 0 looks for the held-out text, once for all.

        Raises:
            DataError: on every rank, if the text cannot be read or too little of it is held out.
        """
        found: HeldOut | DataError | None = None
        if mesh.is_main and config.validation.interval:
            try:
                found = stream_held_out(config, tokenizer) or DataError(TOO_LITTLE_HELD_OUT)
            except DataError as error:
                found = error
        found = mesh.broadcast_object(found)
        if isinstance(found, DataError):
            raise found
        return cls(tokenizer, found)

    def open(self, config: Config, rank: int, size: int, pin: bool, resumed: Resumed | None) -> StreamBatches:
        state = read_state(resumed.folder, rank) if resumed else None
        return StreamBatches(config, self.tokenizer, rank, size, pin, state)

    def state(self, batches: StreamBatches, rank: int) -> tuple[State, dict[str, bytes]]:
        # The same record as of prepared data; its fingerprint keeps it from going on with shards.
        record = DataState(
            0,
            batches.identity["seed"],
            batches.counts.rows(batches.step),
            batches.fingerprint,
            batches.counts.stretches,
        )
        return asdict(record), {f"stream-rank-{rank:05d}.json": records.sealed(batches.state()).encode()}


class _InMemory(np.ndarray):
    """Tokens that `CorpusRows` reads as it does a `TokenFile`."""

    def read(self, start: int, out: np.ndarray) -> None:
        out[:] = self[start : start + len(out)]


def stream_held_out(config: Config, tokenizer: Tokenizer, max_rows: int | None = None) -> HeldOut | None:
    """Held-out rows, at most `max_rows` (default `validation.steps`, or 20, global batches); None if there are none.

    Raises:
        DataError: the text cannot be read.
    """
    length = config.training.sequence_length
    limit = max_rows or (config.validation.steps or HELD_OUT_BATCHES) * config.training.global_batch_size
    parts, num_tokens, num_bytes = [], 0, 0
    for text in Shards(config.data.all_sources[0]).held_out_texts():
        parts += [np.array([tokenizer.bos_id], np.uint32), *tokenizer.encode_batch([text])]
        num_tokens += 1 + len(parts[-1])
        num_bytes += len(text.encode("utf-8", "replace"))
        if num_tokens > limit * length:
            break
    if num_tokens <= length:
        return None
    tokens: Any = np.concatenate(parts)[: limit * length + 1].view(_InMemory)
    return HeldOut([CorpusRows(tokens, length, ())], num_tokens / num_bytes)
