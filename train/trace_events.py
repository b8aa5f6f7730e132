"""Reading a profiler's trace (Kineto, in Chrome's format), and arithmetic on intervals of time.

A trace is a JSON object with a list of events; the ones with a duration ("X") are kept. Times are microseconds. Torch-free,
so that a trace can be looked at on any machine.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Interval = tuple[float, float]
"""Start and end, microseconds. Functions that take lists of them want sorted, disjoint ones: those of `union`."""


class TraceError(ValueError):
    """A file is no trace that can be summed up; the message says why."""


@dataclass(slots=True, eq=False)
class Event:
    """Something with a duration, on a thread of the host or a stream of a device."""

    name: str
    category: str
    start: float
    end: float
    thread: tuple[str, str]
    args: dict[str, Any] = field(default_factory=dict)
    parent: Event | None = None
    """The event around this one on its thread, once `nest` has been there."""

    @property
    def interval(self) -> Interval:
        return self.start, self.end

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass
class Trace:
    """The events of one process, by start; `rank` and `world_size` where the trace has them."""

    file: str
    events: list[Event]
    rank: int | None = None
    world_size: int | None = None


def read_trace(path: Path) -> Trace:
    """The timed events of a `.json` or `.json.gz` trace.

    Raises:
        TraceError: the file is damaged, something else than a trace, or has no timed event.
        OSError: it cannot be read.
    """
    found = _read_json(path)
    listed = found.get("traceEvents") if isinstance(found, dict) else found
    if not isinstance(listed, list):
        raise TraceError(f"{path}: no trace, it has no list of traceEvents; expected what torch.profiler exports")
    events = [event for event in map(_event, listed) if event is not None]
    if not events:
        raise TraceError(f"{path}: the trace is empty, none of its {len(listed)} entries has a time and a duration")
    about = found.get("distributedInfo") if isinstance(found, dict) else None
    about = about if isinstance(about, dict) else {}
    events.sort(key=lambda event: (event.start, -event.end))
    return Trace(str(path), events, _whole(about.get("rank")), _whole(about.get("world_size")))


def _read_json(path: Path) -> Any:
    data = path.read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return json.loads(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"{path}: damaged or cut short: {error}") from error
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: no complete JSON ({error}); was it cut short while being written?") from error


def _event(entry: Any) -> Event | None:
    """None for what has no duration or is not understood."""
    if not isinstance(entry, dict) or entry.get("ph") != "X":
        return None
    start, duration = _number(entry.get("ts")), _number(entry.get("dur"))
    if start is None or duration is None or duration < 0:
        return None
    args = entry.get("args")
    thread = str(entry.get("pid")), str(entry.get("tid"))
    category = str(entry.get("cat", "")).lower()
    return Event(
        str(entry.get("name", "")), category, start, start + duration, thread, args if isinstance(args, dict) else {}
    )


def _number(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as sorted intervals that neither overlap nor touch."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def total(intervals: Iterable[Interval]) -> float:
    return math.fsum(end - start for start, end in intervals)


def subtract(intervals: list[Interval], others: list[Interval]) -> list[Interval]:
    """The moments of `intervals` that are in none of `others`."""
    rest: list[Interval] = []
    first = 0
    for start, end in intervals:
        while first < len(others) and others[first][1] <= start:
            first += 1
        at = first
        while at < len(others) and others[at][0] < end:
            if others[at][0] > start:
                rest.append((start, others[at][0]))
            start = max(start, others[at][1])
            at += 1
        if start < end:
            rest.append((start, end))
    return rest


def clip(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """The parts of the intervals inside a window."""
    inside = ((max(start, window[0]), min(end, window[1])) for start, end in intervals)
    return [(start, end) for start, end in inside if start < end]


@dataclass(slots=True)
class Segment:
    """A stretch of time in which `event` was the innermost one of its thread."""

    start: float
    end: float
    event: Event


def by_thread(events: Iterable[Event]) -> dict[tuple[str, str], list[Event]]:
    threads: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        threads[event.thread].append(event)
    return dict(threads)


def nest(events: Iterable[Event]) -> list[Segment]:
    """Set the parents of one thread's events, and cut its time into segments of self time, in order.

    A child that ends after its parent, as rounding makes them, ends with it. Events sorted as in `Trace`.
    """
    segments: list[Segment] = []
    stack: list[tuple[Event, float]] = []  # with the end that counts
    cursor = -math.inf

    def emit(end: float) -> None:
        nonlocal cursor
        if stack and end > cursor:
            segments.append(Segment(cursor, end, stack[-1][0]))
        cursor = max(cursor, end)

    for event in events:
        while stack and stack[-1][1] <= event.start:
            emit(stack[-1][1])
            stack.pop()
        emit(event.start)
        end = event.end
        if stack:
            event.parent, end = stack[-1][0], min(end, stack[-1][1])
        stack.append((event, end))
    while stack:
        emit(stack[-1][1])
        stack.pop()
    return segments
