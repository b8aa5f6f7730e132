"""From text to token shards: `newcompute prepare`, and the embedded corpus at the first start of a run.

Work happens in a folder named `.partial` that becomes the real one by a rename, after its manifest is written; whatever
interrupts it leaves nothing that looks finished. Each time a shard file is full, the position is noted, and a later
`prepare` goes on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train import records
from train.config import Config, SourceConfig
from train.corpus import DataError, Document, DocumentStream, documents, embedded_files, input_files
from train.shards import MANIFEST, Manifest, Split, SplitWriter
from train.text_files import Intake, describe_intake
from train.tokenizer import HFTokenizer, Tokenizer, load_tokenizer, train_bpe

TOKENS_PER_FILE = 100_000_000
BATCH_CHARACTERS = 4_000_000
BPE_SAMPLE_CHARACTERS = 20_000_000

# Keys that do not change what is written; they stay out of the folder's name.
_NOT_CONTENT = {"weight"}
# Keys that were added later, with what was done before: at that value they stay out as well, and no folder is renamed.
_ADDED = {"errors": "strict", "skip_invalid": False}


def tokenizer_key(config: Config) -> str:
    """What distinguishes one tokenizer from another before it exists; part of every folder's name."""
    tokenizer = config.tokenizer
    if tokenizer.kind == "bpe":
        corpus = [source_content(source) for source in config.data.all_sources]
        return f"bpe{tokenizer.vocab_size}-{_digest(corpus)}"
    return f"{tokenizer.kind}-{_digest(tokenizer.path)}" if tokenizer.path else tokenizer.kind


def tokenizer_folder(config: Config) -> Path:
    """Where the BPE trained on this corpus is kept."""
    return Path(config.data.dir) / f"tokenizer-{tokenizer_key(config)}"


def corpus_folder(config: Config, source: SourceConfig, key: str | None = None) -> Path:
    """Where the shards of one source are kept: named by the source and the tokenizer (`key`, where it is known already)."""
    label = source.dataset.rpartition("/")[2] if source.source == "hub" else source.source
    return Path(config.data.dir) / f"{label}-{_digest([source_content(source), key or tokenizer_key(config)])}"


def run_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer a run uses; a trained BPE must have been prepared.

    Raises:
        DataError: it cannot be read, or was not prepared yet.
    """
    path = config.tokenizer.path
    if config.tokenizer.kind == "bpe":
        path = str(tokenizer_folder(config))
        if not (Path(path) / "tokenizer.json").exists():
            raise DataError(f"the tokenizer {path} is not there yet: run `newcompute prepare` with this configuration")
    try:
        return load_tokenizer(config.tokenizer.kind, path)
    except ValueError as error:
        raise DataError(f"tokenizer: {error}") from error


def prepare(config: Config, say: Callable[[str], None] = print) -> list[Path]:
    """Write token shards for every source of a configuration, or find them already written.

    Returns:
        The folders, in the order of the sources.

    Raises:
        DataError: the text or the tokenizer cannot be used.
    """
    sources = config.data.all_sources
    if any(source.source == "random" for source in sources):
        return []
    with _exclusive(Path(config.data.dir) / ".lock", say):
        if config.tokenizer.kind == "bpe":
            _train_tokenizer(config, say)
        tokenizer = run_tokenizer(config)
        key = tokenizer_key(config)
        folders = [_prepare_source(s, corpus_folder(config, s, key), tokenizer, say) for s in sources]
    held_out = [Manifest.read(folder).splits["validation"].tokens for folder in folders]
    if not all(held_out) and any(held_out):
        names = [describe_source(source) for source, tokens in zip(sources, held_out, strict=True) if not tokens]
        say(f"warning: the validation loss will be without {', '.join(names)}, of which nothing is held out")
    return folders


def _prepare_source(source: SourceConfig, folder: Path, tokenizer: Tokenizer, say: Callable[[str], None]) -> Path:
    inputs = inputs_hash(source)
    if (folder / MANIFEST).exists():
        manifest = _readable_manifest(folder)
        if manifest is None:
            what = "is damaged"
        elif manifest.inputs != inputs:
            what = "was made from other text"
        elif other := manifest.other_tokenizer(tokenizer):
            what = f"was made with {other}"
        else:
            say(f"{folder} is prepared: {_summary(manifest)}")
            return folder
        say(f"{folder} {what}; making it again")
    partial = folder.with_name(folder.name + ".partial")
    job = _Tokenization(partial, source, tokenizer, inputs)
    manifest = job.run(say)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(partial, folder)
    say(f"{folder}: {_summary(manifest)}")
    return folder


def _readable_manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.read(folder)
    except DataError:
        return None


@dataclass(frozen=True)
class _Position:
    """How far an interrupted attempt came."""

    __pydantic_config__ = records.STRICT
    identity: str
    documents: records.Count
    hub_state: dict[str, Any] | None
    splits: dict[str, Split]
    skipped: dict[str, records.Count] = field(default_factory=dict)
    replaced: records.Count = 0


class _Tokenization:
    """One source being tokenised into its `.partial` folder."""

    def __init__(self, folder: Path, source: SourceConfig, tokenizer: Tokenizer, inputs: str):
        self.folder, self.source, self.tokenizer, self.inputs = folder, source, tokenizer, inputs
        self.dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self.identity = _digest([inputs, tokenizer.fingerprint, source_content(source)])

    def run(self, say: Callable[[str], None]) -> Manifest:
        position = self._resume()
        splits = {name: position.splits.get(name, Split()) for name in ("train", "validation")}
        writers = {name: SplitWriter(self.folder, name, self.dtype, TOKENS_PER_FILE, splits[name]) for name in splits}
        # Local files are read again up to the position, and what is invalid in them is counted again.
        before = position if position.hub_state is not None else _Position(self.identity, 0, None, {})
        intake = Intake(self.source, before.skipped, before.replaced)
        stream = documents(self.source, position.documents, position.hub_state, intake)
        progress = _Progress(say, f"tokenising {self.source.source}")
        try:
            self._tokenise(stream, writers, progress)
        finally:
            progress.close()
        if not splits["train"].tokens:
            files = [str(path) for path in input_files(self.source)][:3] if self.source.source != "hub" else []
            invalid = describe_intake(intake.skipped, intake.replaced)
            raise DataError(
                f"there is no text to train on in {', '.join(files) or self.source.dataset}"
                + (f": {invalid}" if invalid else "")
            )
        content, tokenizer = source_content(self.source), self._tokenizer_record()
        manifest = Manifest(content, self.inputs, tokenizer, self.dtype, splits, intake.skipped, intake.replaced)
        (self.folder / "position.json").unlink(missing_ok=True)
        manifest.write(self.folder)
        return manifest

    def _tokenise(self, stream: DocumentStream, writers: dict[str, SplitWriter], progress: _Progress) -> None:
        """Write every document of the stream, noting the position each time a file is full."""
        for batch in _batches(iter(stream)):
            ids = self.tokenizer.encode_batch([document.text for document in batch])
            closed = False
            for document, body in zip(batch, ids):
                row = np.concatenate([[self.tokenizer.bos_id], body])
                num_bytes = len(document.text.encode("utf-8", "replace"))
                closed |= writers["validation" if document.held_out else "train"].add(row, num_bytes)
            progress.update(stream.consumed, sum(writer.split.tokens for writer in writers.values()))
            if closed:
                self._note_position(writers, stream)
        for writer in writers.values():
            writer.close_file()

    def _tokenizer_record(self) -> dict:
        tokenizer = self.tokenizer
        return {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id}

    def _note_position(self, writers: dict[str, SplitWriter], stream: DocumentStream) -> None:
        """Both files are closed at a common document boundary, so that the position is exact for both splits."""
        for writer in writers.values():
            writer.close_file()
        position = {
            "identity": self.identity,
            "documents": stream.consumed,
            "hub_state": stream.hub_state(),
            "splits": {name: asdict(writer.split) for name, writer in writers.items()},
            "skipped": stream.intake.skipped,
            "replaced": stream.intake.replaced,
        }
        temporary = self.folder / "position.tmp"
        temporary.write_text(records.sealed(position), encoding="utf-8")
        os.replace(temporary, self.folder / "position.json")

    def _resume(self) -> _Position:
        """The noted position of an interrupted attempt at the same work, or a fresh start."""
        with suppress(DataError):
            position = records.read(_Position, self.folder / "position.json", DataError)
            if position.identity == self.identity:
                return position
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return _Position(self.identity, 0, None, {})


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in stream:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= 1024:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _train_tokenizer(config: Config, say: Callable[[str], None]) -> HFTokenizer:
    folder = tokenizer_folder(config)
    inputs = _digest([inputs_hash(source) for source in config.data.all_sources])
    note = folder / "inputs"
    if note.exists() and note.read_text() == inputs:
        return HFTokenizer(folder)
    say(f"training a byte-pair encoding of {config.tokenizer.vocab_size} ids")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = train_bpe(_bpe_sample(config), config.tokenizer.vocab_size, partial)
    if tokenizer.vocab_size < config.tokenizer.vocab_size:
        say(f"the text yields only {tokenizer.vocab_size} ids")
    (partial / "inputs").write_text(inputs)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return HFTokenizer(folder)


def _bpe_sample(config: Config) -> Iterator[str]:
    """Every third training document of every source, up to a number of characters that fits in memory."""
    for source in config.data.all_sources:
        characters = number = 0
        for document in documents(source):
            if document.held_out:
                continue
            if number % 3 == 0:
                yield document.text
                characters += len(document.text)
            number += 1
            if characters > BPE_SAMPLE_CHARACTERS:
                break


def inputs_hash(source: SourceConfig) -> str:
    """Changes when the input changes: the text itself (embedded), or the files' names, sizes and times."""
    if source.source == "embedded":
        digest = hashlib.sha256()
        for path in embedded_files():
            digest.update(f"{path.name}\0".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()
    if source.source == "hub":
        return _digest([source.dataset, source.subset, source.split, source.revision])
    records = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in input_files(source)]
    return _digest(records)


def source_content(source: SourceConfig, without: Container[str] = ()) -> dict[str, Any]:
    """The settings of a source that change its tokens; folders and streams are named by them."""
    settings = source.model_dump(exclude=_NOT_CONTENT)
    return {k: v for k, v in settings.items() if k not in without and (k not in _ADDED or v != _ADDED[k])}


def describe_source(source: SourceConfig) -> str:
    """A source in a few words."""
    if source.source == "files":
        return ", ".join(source.paths)
    return source.dataset if source.source == "hub" else source.source


def _digest(value) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()


def _summary(manifest: Manifest) -> str:
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    invalid = describe_intake(manifest.skipped, manifest.replaced)
    return (
        f"{train.tokens:,} training tokens of {train.documents:,} documents ({train.bytes / 1e6:.1f} MB), "
        f"{validation.tokens:,} held out" + (f"; {invalid}" if invalid else "")
    )


@contextmanager
def _exclusive(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Two `prepare`s of one folder take turns; the lock goes with the process that holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"data.dir: cannot write to {path.parent}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another prepare in {path.parent}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, say: Callable[[str], None], label: str):
        self.say, self.label = say, label
        self.start = self.last = time.monotonic()
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            # How many documents a corpus has is known only at its end, so the bar moves without a share.
            columns = (TextColumn(label), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, transient=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()

    def update(self, num_documents: int, num_tokens: int) -> None:
        now = time.monotonic()
        line = f"{num_documents:,} documents, {num_tokens:,} tokens, {num_tokens / (now - self.start):,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, description=line)
        elif now - self.last >= 10:
            self.last = now
            self.say(f"{self.label}: {line}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
