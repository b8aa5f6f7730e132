"""Names that may mean something on this machine or on the Hugging Face Hub, and words for what is not there."""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
OUR_FOLDERS = ("outputs", "data", "configs")
"""First parts of names that no organisation of the Hub is meant by: where runs, prepared text and configurations are kept."""


def is_local(name: str) -> bool:
    """Whether a name that exists nowhere here can only have meant a path: not to be looked up on the Hub."""
    first = name.partition("/")[0]
    return (
        name.startswith((".", "~", "/"))
        or not HUB_ID.fullmatch(name)
        or ("/" in name and (first in OUR_FOLDERS or Path(first).is_dir()))
    )


def refuse_missing(name: str) -> None:
    """
    Raises:
        ValueError: `name` can only be a path, and nothing is there.
    """
    if is_local(name) and not Path(name).expanduser().exists():
        raise ValueError(nothing_at(name))


def nothing_at(name: str) -> str:
    """That a path, or the folder of a pattern of files, does not exist, and how far it does; or that files were meant."""
    path = Path(name).expanduser()
    if path.is_dir():
        return f"{name!r} is a folder: name files in it, as in {str(path / '**' / '*.txt')!r}"
    while "*" in str(path) or "?" in str(path) or "[" in str(path):
        path = path.parent
    if path.exists():
        return f"no file matches {name!r} (seen from {os.getcwd()})"
    there = next(parent for parent in path.absolute().parents if parent.exists())
    kind = "file" if path.suffix else "folder"
    beyond = "" if there == Path.cwd() else f"; {there} is there"
    return f"no such {kind}: {path} (seen from {os.getcwd()}{beyond})"
