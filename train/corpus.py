"""Documents of a corpus, in an order that never changes, each marked as training or held-out text.

What is held out is decided by the document itself (its file name, or its number), never by a random state: the same
documents stay out of training however the corpus is read.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from train.config import SourceConfig
from train.local_paths import nothing_at
from train.text_files import DataError as DataError
from train.text_files import Intake, ending, no_field, read_texts


@dataclass(frozen=True)
class Document:
    text: str
    held_out: bool
    """Whether it belongs to the validation split."""


def documents(
    source: SourceConfig, skip: int = 0, hub_state: dict[str, Any] | None = None, intake: Intake | None = None
) -> DocumentStream:
    """All documents of a source from number `skip` on; a Hub stream goes on from `hub_state` instead of re-reading.

    Raises:
        DataError: nothing matches, or nothing can be read.
    """
    return DocumentStream(source, skip, hub_state, intake)


class DocumentStream:
    """Iterates `Document`s; `consumed` counts them from the beginning of the corpus."""

    def __init__(
        self,
        source: SourceConfig,
        skip: int = 0,
        hub_state: dict[str, Any] | None = None,
        intake: Intake | None = None,
    ):
        self.source = source
        self.consumed = skip
        self.intake = intake or Intake(source)
        self._hub: Any = None
        if source.source == "embedded":
            self._documents = _skipped(_embedded(source), skip)
        elif source.source == "files":
            self._documents = _skipped(_files(source, self.intake), skip)
        elif source.source == "hub":
            self._hub = hub_dataset(source)
            if hub_state is not None:
                self._hub.load_state_dict(hub_state)
            self._documents = _hub(source, self._hub, skip, self.intake)
        else:
            raise DataError(f'source = "{source.source}" has no documents')

    def __iter__(self) -> Iterator[Document]:
        for document in self._documents:
            # Named validation files are not limited; `_files` limits the training documents before them.
            limited = self.source.max_documents and not self.source.validation_paths
            if limited and self.consumed >= self.source.max_documents:
                return
            self.consumed += 1
            yield document

    def hub_state(self) -> dict[str, Any] | None:
        """Position in a Hub stream after the last document, JSON-serialisable; None for local sources."""
        return None if self._hub is None else self._hub.state_dict()


def _skipped(stream: Iterator[Document], skip: int) -> Iterator[Document]:
    for i, document in enumerate(stream):
        if i >= skip:
            yield document


def is_held_out(identity: str, fraction: float) -> bool:
    """Whether the document of this name or number is held out: a hash of it, uniform in [0, 1), is below `fraction`."""
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def embedded_files() -> list[Path]:
    """The running Python's standard library as source text, sorted by path; what was installed beside it is left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages", "__pycache__")]
        # _sysconfigdata holds the build machine's settings, not text.
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    if not found:
        raise DataError(f'source = "embedded" found no Python source text under {root}; use source = "files"')
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _embedded(source: SourceConfig) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in embedded_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(text, is_held_out(path.relative_to(root).as_posix(), source.validation_fraction))


def input_files(source: SourceConfig) -> list[Path]:
    """Local files that a source reads, in reading order (none for the Hub).

    Raises:
        DataError: a glob matches nothing, or a file has an unknown ending.
    """
    if source.source == "embedded":
        return embedded_files()
    return [*_matches(source.paths, "paths"), *_matches(source.validation_paths, "validation_paths")]


def _matches(patterns: list[str], key: str) -> list[Path]:
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True))
        matches = [path for path in matches if path.is_file()]
        if not matches and os.path.isdir(os.path.expanduser(pattern)):
            inside = os.path.join(pattern, "*.jsonl")
            raise DataError(f"data.{key}: {pattern!r} is a folder: name the files in it, as in {inside!r}")
        if not matches:
            raise DataError(f"data.{key}: {nothing_at(pattern)}")
        found.update(dict.fromkeys(matches))
    for path in found:
        if not ending(path):
            raise DataError(f"data.{key}: {path} is not .txt, .jsonl or .parquet (.txt, .md and .jsonl also with .gz)")
    return list(found)


def _files(source: SourceConfig, intake: Intake) -> Iterator[Document]:
    validation = _matches(source.validation_paths, "validation_paths")
    held_out = {path.resolve() for path in validation}  # a glob of everything may well match them
    training = [path for path in _matches(source.paths, "paths") if path.resolve() not in held_out]
    limit = source.max_documents if validation and source.max_documents else None
    fraction = 0.0 if validation else source.validation_fraction
    yield from islice(_training_files(training, fraction, intake), limit)
    for path in validation:
        for text in read_texts(path, intake):
            yield Document(text, held_out=True)


def _training_files(paths: list[Path], fraction: float, intake: Intake) -> Iterator[Document]:
    number = 0
    for path in paths:
        for text in read_texts(path, intake):
            if ending(path) == "txt":
                yield from _parts(text, fraction)
                continue
            yield Document(text, is_held_out(str(number), fraction))
            number += 1


def _parts(text: str, fraction: float) -> Iterator[Document]:
    """A text file as one document, and its last `fraction`, cut at a line's end, as held-out text."""
    cut = len(text)
    if fraction > 0:
        wanted = int(len(text) * (1 - fraction))
        line_end = text.rfind("\n", 0, wanted) + 1
        # A text without lines is cut anywhere, rather than handed to validation as a whole.
        cut = line_end if line_end >= wanted - fraction * len(text) else wanted
    for part, held_out in ((text[:cut], False), (text[cut:], True)):
        if part.strip():
            yield Document(part, held_out)


def hub_dataset(source: SourceConfig) -> Any:
    """A streaming `datasets.IterableDataset`, or a `DataError` that says why not."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise DataError(
            f"data.dataset = {source.dataset!r} is on the Hub, but HF_HUB_OFFLINE is set: unset it, or use "
            'source = "files" or "embedded"'
        )
    import datasets

    try:
        return datasets.load_dataset(
            source.dataset, source.subset or None, split=source.split, revision=source.revision, streaming=True
        )
    except Exception as error:
        raise DataError(f"cannot open {source.dataset} ({source.subset}) on the Hub: {error}") from error


def hub_text(record: dict[str, Any], source: SourceConfig, intake: Intake) -> str | None:
    """The text of one record of a dataset, "" where there is none; None where the document is left out.

    Raises:
        DataError: the dataset has no such column, or it holds no text and that is not left out.
    """
    if source.column not in record:
        raise DataError(f"{source.dataset}: {no_field(source.column, list(record))}")
    return "" if record[source.column] is None else intake.field(record, source.dataset)


def _hub(source: SourceConfig, dataset: Any, first: int, intake: Intake) -> Iterator[Document]:
    number = first
    for record in dataset:
        text = hub_text(record, source, intake)
        if text is not None:
            yield Document(text, is_held_out(str(number), source.validation_fraction))
            number += 1
