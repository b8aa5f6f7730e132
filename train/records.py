"""Small JSON records that a run believes later: manifests, markers of checkpoints, positions. Read with every doubt.

A record is sealed with a hash of itself, so that a flipped digit is refused and not believed; records without a seal are
older and count. The types of the dataclass are checked, unknown keys refused, and nothing but the named error is raised.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

SEAL = "blake2b"
STRICT = ConfigDict(strict=True, extra="forbid")
"""`__pydantic_config__` of a dataclass that is read from a file."""
Count = Annotated[int, Field(ge=0, le=1 << 60)]
"""A number of steps, rows, tokens or bytes."""
LARGEST_RECORD = 1 << 30
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

T = TypeVar("T")


def sealed(record: dict[str, Any]) -> str:
    """A record as JSON text with the seal that `parse` checks."""
    return json.dumps(record | {SEAL: _seal(record)}, indent=1) + "\n"


def parse(kind: type[T], text: str | bytes, where: object, error: type[Exception], remedy: str = "") -> T:
    """A dataclass out of JSON text.

    Args:
        where: what the message names.
        error: class of whatever is wrong.
        remedy: end of the message.
    """
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object, found {type(record).__name__}")
        seal = record.pop(SEAL, None)
        if seal is not None and seal != _seal(record):
            raise ValueError("it was changed after it was written (its own hash differs)")
        adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]
        return adapter.validate_json(json.dumps(record), strict=True)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise error(f"{where} cannot be read ({key}: {first['msg']}){remedy}") from wrong
    except (ValueError, RecursionError, TypeError, ArithmeticError) as wrong:
        raise error(f"{where} cannot be read ({str(wrong)[:300]}){remedy}") from wrong


def read(kind: type[T], file: Path, error: type[Exception], remedy: str = "") -> T:
    """`parse` of a file; one that cannot be read raises `error`, too."""
    try:
        if file.stat().st_size > LARGEST_RECORD:
            raise error(f"{file} has {file.stat().st_size} bytes, which is no such record{remedy}")
        text = file.read_bytes()
    except OSError as wrong:
        raise error(f"{file} cannot be read: {wrong.strerror or wrong}{remedy}") from wrong
    return parse(kind, text, file, error, remedy)


def file_inside(folder: Path, name: str, error: type[Exception], remedy: str = "") -> Path:
    """`folder`/`name`, if `name` is the plain name of a file that lies there and does not link to elsewhere."""
    path = folder / name
    if not _PLAIN_NAME.fullmatch(name) or path.resolve().parent != folder.resolve():
        raise error(f"{folder}: {name[:200]!r} leads out of the folder, which no record of ours does{remedy}")
    return path


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _seal(record: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()
