"""Results that grow: a JSON file that is whole after each part of a long measurement, and that a later run goes on with."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any


def write_result(file: Path, content: dict[str, Any]) -> None:
    """Write a result as JSON; whoever reads finds the old file or the new one, never a part."""
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


class GrowingResult:
    """A result whose parts (the points of a sweep, the sets of a comparison) are measured one after the other.

    The file is written after each part. A later run with the same settings finds the parts that are there; with other
    settings it is refused.

    Args:
        file: None keeps the result in memory only.
        parts: the key of the list of parts.
        settings: what is known of how they are measured before a model is loaded.

    Raises:
        ValueError: the file is something else, or has parts of other settings.
    """

    def __init__(self, file: Path | None, parts: str, settings: dict[str, Any]):
        self.file = file
        self.parts = parts
        self._earlier = _read(file, parts) if file is not None and file.exists() else {}
        self._check(settings)
        self.content = {**settings, parts: list(self._earlier.get(parts, []))}

    @property
    def found(self) -> list[dict[str, Any]]:
        """The parts so far, those of an earlier run first."""
        return self.content[self.parts]

    def begin(self, settings: dict[str, Any], clean: dict[str, Any]) -> None:
        """Go on with what the model tells: further settings, and the clean figures that all parts are compared with.

        The clean figures are measured each time: they tell whether model and text still are what they were.

        Raises:
            ValueError: the file has parts of other settings, or of another model or text.
        """
        self._check(settings)
        for name, value in clean.items():
            if self._earlier and not _close(self._earlier.get(name), json.loads(json.dumps(value))):
                raise ValueError(
                    f"--out {self.file}: the clean model gave other figures there, so the model or a library has changed; "
                    "give another name, or remove it to begin anew"
                )
        self.content = {**settings, **clean, **self.content}
        self._write()

    def add(self, part: dict[str, Any]) -> None:
        self.found.append(part)
        self._write()

    def _write(self) -> None:
        if self.file is not None:
            write_result(self.file, self.content)

    def _check(self, settings: dict[str, Any]) -> None:
        now = json.loads(json.dumps(settings))
        differing = [name for name in now if self._earlier and self._earlier.get(name) != now[name]]
        if differing:
            lines = [
                f"\n  {name}: {_short(self._earlier.get(name))} there, {_short(now[name])} now" for name in differing
            ]
            raise ValueError(
                f"--out {self.file}: holds results of other settings; give another name, or remove it to begin anew"
                f"{''.join(lines)}"
            )


def _read(file: Path, parts: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get(parts), list):
            return found
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"--out {file}: exists, and is no result to go on with; remove it or give another name")


def _close(one: Any, other: Any) -> bool:
    """Whether two results agree but for the rounding of another batch or device."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[name], other[name]) for name in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4)
    return bool(one == other)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def text_hash(file: Path) -> str:
    """SHA-256 of a text file, by which a result knows its text again."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
