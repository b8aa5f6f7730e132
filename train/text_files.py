"""Texts of files as they come: byte order marks, bytes that are not UTF-8, records without the text.

A document that cannot be used ends the reading with an error that says where and what to do, or is left out and counted
where `data.skip_invalid` says so.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from train.config import SourceConfig
from train.tokenizer import without_halves

# What one file or line may unpack to: more is a mistake, or a compressed file made to fill the memory.
LONGEST_TEXT = 1 << 32
LONGEST_LINE = 1 << 28
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks of encodings that are not read; UTF-32 first, whose mark begins with that of UTF-16."""
_SAMPLE = 1 << 12
"""Bytes of a file's beginning that are looked at for zeros."""


class DataError(Exception):
    """The data cannot be used as configured; the message says what, where and what to do."""


class Intake:
    """What becomes of documents that are not as they should be, and how many there were.

    Args:
        source: `errors` and `skip_invalid` decide.
        skipped, replaced: counts of what came before.
        report: told the counts now and then, for readers that nobody asks for them at the end.
    """

    def __init__(
        self,
        source: SourceConfig,
        skipped: dict[str, int] | None = None,
        replaced: int = 0,
        report: Callable[[str], None] | None = None,
    ):
        self.source, self.report = source, report
        self.skipped = dict(skipped or {})
        """Documents that were left out, by reason."""
        self.replaced = replaced
        """Bytes that are not UTF-8 and were replaced, three of them for half a surrogate pair, which only JSON can hold."""

    def skip(self, reason: str, message: str) -> None:
        """Leave out one document.

        Raises:
            DataError: `data.skip_invalid` is not set.
        """
        if not self.source.skip_invalid:
            raise DataError(f"{message}; data.skip_invalid = true leaves out such documents and counts them")
        before = sum(self.skipped.values())
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self._tell(before, before + 1)

    def _tell(self, before: int, after: int) -> None:
        """Report the counts where one of them has begun, or has one digit more."""
        if self.report is not None and (before == 0 or len(str(after)) > len(str(before))):
            self.report(describe_intake(self.skipped, self.replaced))

    def _replace(self, num_bytes: int) -> None:
        self.replaced += num_bytes
        self._tell(self.replaced - num_bytes, self.replaced)

    def text(self, data: bytes, where: str) -> str | None:
        """UTF-8 as text; None where the document is left out."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = len(data) - len(data.decode("utf-8", "ignore").encode())
            if self.source.errors == "replace":
                self._replace(bad)
                return data.decode("utf-8", "replace")
            self.skip(
                "not UTF-8",
                f"{where}: {_count(bad, 'byte')} not UTF-8, the first at position {error.start:,}: convert the file, or set "
                'data.errors = "replace", which puts U+FFFD in their place and counts them',
            )
            return None

    def field(self, record: Any, where: str) -> str | None:
        """The text of a record; None where the document is left out."""
        column = self.source.column
        if not isinstance(record, dict):
            kind = type(record).__name__
            self.skip("no object", f"{where}: expected a JSON object with a field {column!r}, found {kind}")
        elif column not in record:
            self.skip("no such field", f"{where}: {no_field(column, list(record))}")
        elif not isinstance(record[column], str):
            kind = type(record[column]).__name__
            self.skip("no text", f"{where}: field {column!r} holds {kind}, not text; {other_fields(list(record))}")
        else:
            return self._without_halves(record[column])
        return None

    def _without_halves(self, text: str) -> str:
        """A text with "?" for halves of surrogate pairs: too common in crawled JSON to end a long `prepare`."""
        valid = without_halves(text)
        if valid is not text:
            self._replace(3 * (valid.count("?") - text.count("?")))
        return valid


def describe_intake(skipped: dict[str, int], replaced: int) -> str:
    """The counts of an `Intake` in words; empty where all was well."""
    parts = []
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
        total = sum(skipped.values())
        parts.append(f"{total:,} invalid {'document' if total == 1 else 'documents'} left out ({reasons})")
    if replaced:
        parts.append(f"{_count(replaced, 'byte')} not UTF-8 and replaced")
    return ", ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what} is" if number == 1 else f"{number:,} {what}s are"


def no_field(column: str, fields: list[str]) -> str:
    """That the configured field is not there, and what to do."""
    return f"there is no field {column!r}; {other_fields(fields)}"


def other_fields(fields: list[str]) -> str:
    shown = ", ".join(map(str, fields[:20])) + (f" and {len(fields) - 20} more" if len(fields) > 20 else "")
    return f"it has {shown or 'none'}: name the one with the text in data.column"


def ending(path: Path) -> str:
    """What is in a file of this name: "txt", "jsonl" or "parquet"; empty if nothing that is read."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    last = suffixes[-1] if suffixes else ""
    known = {".txt": "txt", ".text": "txt", ".md": "txt", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
    return known.get(last, "")


def read_texts(path: Path, intake: Intake) -> Iterator[str]:
    """The texts of a file: of a text file its whole content, of records the text column without the empty ones.

    Raises:
        DataError: it is damaged, or a document cannot be used and is not left out.
    """
    readers = {"txt": _whole, "jsonl": _jsonl, "parquet": _parquet}
    with _naming(path):
        yield from readers[ending(path)](path, intake)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into a `DataError` that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def without_mark(path: Path, data: bytes) -> bytes:
    """The beginning of a file without its byte order mark.

    Raises:
        DataError: the mark is another encoding's, or a quarter of the bytes is zero, as in UTF-16 and UTF-32.
    """
    for mark, encoding in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise DataError(f"{path} is {encoding}, by its byte order mark: convert it to UTF-8")
    sample = data[:_SAMPLE]
    if sample.count(0) * 4 >= len(sample) > 0:
        raise DataError(f"{path} is no UTF-8, many of its bytes are zero, as in UTF-16 or UTF-32: convert it to UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def _whole(path: Path, intake: Intake) -> Iterator[str]:
    with _open(path) as file:
        data = file.read(LONGEST_TEXT + 1)
    if len(data) > LONGEST_TEXT:
        raise DataError(f"{path} unpacks to more than {LONGEST_TEXT:,} bytes: cut it into several files")
    text = intake.text(without_mark(path, data), str(path))
    if text is not None:
        yield text


def _jsonl(path: Path, intake: Intake) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
            if len(line) == LONGEST_LINE:
                raise DataError(f"{path}:{number}: a line of more than {LONGEST_LINE:,} bytes")
            where = f"{path}:{number}"
            decoded = intake.text(without_mark(path, line) if number == 1 else line, where)
            if decoded is None or not decoded.strip():
                continue
            try:
                record = json.loads(decoded)
            except (ValueError, RecursionError) as error:
                column = intake.source.column
                intake.skip("no JSON", f"{where}: expected a JSON object with a field {column!r} ({error})")
                continue
            text = intake.field(record, where)
            if text:
                yield text


def _parquet(path: Path, intake: Intake) -> Iterator[str]:
    column = intake.source.column
    parquet = pyarrow.parquet.ParquetFile(path)
    schema = parquet.schema_arrow
    if column not in schema.names:
        raise DataError(f"{path}: {no_field(column, schema.names)}")
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column {column!r} holds {kind}, not text; {other_fields(schema.names)}")
    # Strings of other writers are not always UTF-8, which pyarrow finds out only when it makes them Python's.
    as_bytes = pyarrow.large_binary() if pyarrow.types.is_large_string(kind) else pyarrow.binary()
    row = 0
    for batch in parquet.iter_batches(columns=[column]):
        for data in batch.column(0).cast(as_bytes).to_pylist():
            row += 1
            text = intake.text(data, f"{path}: row {row}") if data else None
            if text:
                yield text
