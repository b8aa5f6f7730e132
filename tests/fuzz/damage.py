"""What can happen to the files of a folder, as hypothesis strategies, and how many examples a run takes."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# NEWCOMPUTE_FUZZ=100 takes a hundred times as many examples, drawn anew each time.
FACTOR = int(os.environ.get("NEWCOMPUTE_FUZZ", "1"))


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples * FACTOR,
        deadline=None,
        derandomize=FACTOR == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damages(draw, contents: dict[str, bytes]) -> dict[str, bytes]:
    """`contents` (file name: bytes) after one to three accidents."""
    files = dict(contents)
    for _ in range(draw(st.integers(1, 3)) if draw(st.booleans()) else 1):
        name = draw(st.sampled_from(sorted(files)))
        data = files[name]
        place = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(
            st.sampled_from(["flip", "flip", "flip", "byte", "cut", "zeros", "insert", "delete", "swap", "drop"])
        )
        if how == "flip" and data:
            bit = 1 << draw(st.integers(0, 7))
            files[name] = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
        elif how == "byte" and data:
            files[name] = data[:place] + draw(st.binary(min_size=1, max_size=1)) + data[place + 1 :]
        elif how == "cut":
            files[name] = data[:place]
        elif how == "zeros":
            count = min(draw(st.integers(1, 600)), len(data) - place)
            files[name] = data[:place] + bytes(count) + data[place + count :]
        elif how == "insert":
            files[name] = data[:place] + draw(st.binary(min_size=1, max_size=20)) + data[place:]
        elif how == "drop":
            files[name] = data[:place] + data[place + draw(st.integers(1, 20)) :]
        elif how == "swap":
            other = draw(st.sampled_from(sorted(files)))
            files[name], files[other] = files[other], files[name]
        elif how == "delete" and len(files) > 1:
            del files[name]
    return files


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write_to(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "", "uint16", "train", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def edits(draw, record: object) -> object:
    """A JSON value with one place changed, removed or added to."""
    if isinstance(record, dict) and record and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(record)))
        how = draw(st.integers(0, 9))
        if how == 0:
            return {name: value for name, value in record.items() if name != key}
        if how == 1:
            return record | {draw(st.text(max_size=8)): draw(json_values)}
        return record | {key: draw(edits(record[key]))}
    if isinstance(record, list) and record and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(record) - 1))
        return [*record[:place], draw(edits(record[place])), *record[place + 1 :]]
    return draw(json_values)
