"""What a trace says, in numbers: where a step's time goes, without opening a viewer.

On a GPU the time looked at runs from the first activity of the device to its last one; on a CPU from the first traced step's
start to the last one's end. Each moment of it counts once, however many streams or threads are busy:

- computing: a kernel that is no communication runs (GPU), or the main thread is in an operator that is none (CPU);
- exposed communication: communication runs and nothing computes, so a faster network would shorten the step;
- idle: neither runs, nor a copy by the device's copy engines. Idle intervals are the gaps.

Communication includes waiting for the other processes: a kernel of NCCL runs, and an operation of gloo lasts, until the last
of them has come. Torch-free; cost: a sort of the events.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from train.trace_events import (
    Event,
    Interval,
    Segment,
    Trace,
    TraceError,
    by_thread,
    clip,
    nest,
    read_trace,
    subtract,
    total,
    union,
)
from train.trace_names import COMMUNICATION, kernel_group, operator_group, short_name

DEVICE_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
RUNTIME_CATEGORIES = frozenset({"cuda_runtime", "cuda_driver"})
ANNOTATION = "user_annotation"
HOST_CATEGORIES = RUNTIME_CATEGORIES | {"cpu_op", "python_function", ANNOTATION}
STEP = re.compile(r"ProfilerStep#(\d+)")
BLOCKING = re.compile(r"(cuda|hip|cu)(\w*Synchronize|StreamWaitValue\w*|Memcpy|MemcpyDtoH_v2|MemcpyHtoD_v2)$")
KEPT_GAPS = 10


@dataclass
class Row:
    """All events of one name or group."""

    name: str
    group: str
    count: int
    ms: float
    bytes: int = 0


@dataclass
class Gap:
    """An idle interval; `at_ms` counts from the beginning of the time looked at."""

    at_ms: float
    ms: float
    host: str
    """What the host was doing meanwhile."""


@dataclass
class Summary:
    """One trace; times in milliseconds over all its steps, rows by falling time.

    A row's time is a sum over events, and several streams may be busy at once: rows can add up to more than the whole.
    """

    file: str
    device: str
    rank: int | None
    world_size: int | None
    steps: list[int]
    """Numbers of the traced steps; empty where the trace does not mark them."""
    host_step_ms: list[float]
    ms: float
    computing_ms: float
    communication_ms: float
    exposed_communication_ms: float
    idle_ms: float
    groups: list[Row]
    top: list[Row]
    """Kernels by time on the device, or operators by their own time on the main thread."""
    communication: list[Row]
    gap_count: int
    gaps: list[Gap]
    """The largest ones."""
    synchronizations: list[Row]
    """Calls in which the host waited for the device."""
    copies: list[Row]
    notes: list[str]


def summarize(path: Path) -> Summary:
    """Read a trace and sum it up.

    Raises:
        TraceError: the file is no trace, or has nothing in it to sum up.
        OSError: it cannot be read.
    """
    trace = read_trace(path)
    if any(event.category in DEVICE_CATEGORIES for event in trace.events):
        return _summarize_device(trace)
    return _summarize_host(trace)


def _summarize_device(trace: Trace) -> Summary:
    on_devices = [event for event in trace.events if event.category in DEVICE_CATEGORIES]
    devices: dict[str, float] = defaultdict(float)
    for event in on_devices:
        devices[_device(event)] += event.duration
    device = max(devices, key=lambda name: devices[name])
    events = [event for event in on_devices if _device(event) == device]
    groups = {event.name: kernel_group(event.name) for event in events}
    busy = union(event.interval for event in events)
    computing = union(e.interval for e in events if e.category == "kernel" and groups[e.name] != COMMUNICATION)
    communicating = union(e.interval for e in events if groups[e.name] == COMMUNICATION)
    if not busy:
        raise TraceError(f"{trace.file}: no kernel or copy in this trace took any time")
    window = busy[0][0], busy[-1][1]
    gaps = subtract([window], busy)
    calls = [event for event in trace.events if event.category in RUNTIME_CATEGORIES]
    notes = [f"{len(devices)} devices in this trace; the others than {device} are left out"] if len(devices) > 1 else []
    rows = _rows(events, lambda e: short_name(e.name), lambda e: groups[e.name])
    return Summary(
        **_head(trace),
        device="gpu",
        ms=(window[1] - window[0]) / 1e3,
        computing_ms=total(computing) / 1e3,
        communication_ms=total(communicating) / 1e3,
        exposed_communication_ms=total(subtract(communicating, computing)) / 1e3,
        idle_ms=total(gaps) / 1e3,
        groups=_grouped(rows),
        top=rows,
        communication=[row for row in rows if row.group == COMMUNICATION],
        gap_count=len(gaps),
        gaps=_device_gaps(gaps, window, events, trace),
        synchronizations=_rows((e for e in calls if BLOCKING.match(e.name)), lambda e: e.name, lambda e: "wait"),
        copies=_rows((e for e in events if e.category != "kernel"), lambda e: e.name, lambda e: groups[e.name]),
        notes=notes,
    )


def _summarize_host(trace: Trace) -> Summary:
    """Without a device: the main thread's operators, and communication on whatever thread."""
    threads = by_thread(event for event in trace.events if event.category in HOST_CATEGORIES)
    main = _main_thread(trace, threads)
    if main is None:
        raise TraceError(f"{trace.file}: neither kernels nor operators in this trace, nothing to sum up")
    segments = {name: nest(events) for name, events in threads.items()}[main]
    window = _host_window(_step_marks(trace) or threads[main])
    transfers = [e for events in threads.values() for e in events if _begins_communication(e)]
    inside = [Segment(*part, s.event) for s in segments for part in clip([(s.start, s.end)], window)]
    computing = union((s.start, s.end) for s in inside if _operator(s.event) and not _communicates(s.event))
    communicating = union(clip((e.interval for e in transfers), window))
    gaps = subtract(subtract([window], computing), communicating)
    rows = _self_time(inside)
    launched = any(event.category in RUNTIME_CATEGORIES for event in trace.events)
    notes = ["calls to a GPU but none of its kernels: the profiler had no access to it (CUPTI)"] if launched else []
    return Summary(
        **_head(trace),
        device="cpu",
        ms=(window[1] - window[0]) / 1e3,
        computing_ms=total(computing) / 1e3,
        communication_ms=total(communicating) / 1e3,
        exposed_communication_ms=total(subtract(communicating, computing)) / 1e3,
        idle_ms=total(gaps) / 1e3,
        groups=_grouped(rows),
        top=rows,
        communication=_transfer_rows([e for e in transfers if clip([e.interval], window)]),
        gap_count=len(gaps),
        gaps=_host_gaps(gaps, window, threads[main], segments),
        synchronizations=[],
        copies=[],
        notes=notes,
    )


def _head(trace: Trace) -> dict:
    marks = _step_marks(trace)
    return {
        "file": trace.file,
        "rank": trace.rank,
        "world_size": trace.world_size,
        "steps": sorted({int(STEP.fullmatch(mark.name)[1]) for mark in marks}),  # type: ignore[index]
        "host_step_ms": [mark.duration / 1e3 for mark in marks],
    }


def _step_marks(trace: Trace) -> list[Event]:
    return [event for event in trace.events if event.category == ANNOTATION and STEP.fullmatch(event.name)]


def _host_window(events: list[Event]) -> Interval:
    return min(event.start for event in events), max(event.end for event in events)


def _device(event: Event) -> str:
    return str(event.args.get("device", event.thread[0]))


def _main_thread(trace: Trace, threads: dict[tuple[str, str], list[Event]]) -> tuple[str, str] | None:
    """The thread that marks the steps, or else the one that is longest in operators."""
    marks = _step_marks(trace)
    if marks:
        return marks[0].thread
    times = {name: total(union(e.interval for e in events if _is_operator(e))) for name, events in threads.items()}
    best = max(times, key=lambda name: times[name], default=None)
    return best if best is not None and times[best] > 0 else None


def _is_operator(event: Event) -> bool:
    """Compiled code stands under an annotation, and inside it nothing is recorded: it counts as an operator."""
    if event.category == ANNOTATION:
        return operator_group(event.name) == "compiled code"
    return event.category == "cpu_op"


def _operator(innermost: Event | None) -> Event | None:
    """The operator that a thread works for, or None while Python does something of its own or waits.

    Python functions are part of the operator that calls them. Annotations are not: autograd's operators call the hooks of
    FSDP, which say their names and then wait.
    """
    while innermost is not None and innermost.category == "python_function":
        innermost = innermost.parent
    return innermost if innermost is not None and _is_operator(innermost) else None


def _communicates(event: Event | None) -> bool:
    """Whether an event is an operation between processes, or part of one."""
    while event is not None:
        if event.category in ("cpu_op", ANNOTATION) and operator_group(event.name) == COMMUNICATION:
            return True
        event = event.parent
    return False


def _begins_communication(event: Event) -> bool:
    """An operation between processes that is not part of another one."""
    return _communicates(event) and not _communicates(event.parent)


def _rows(events: Iterable[Event], name: Callable[[Event], str], group: Callable[[Event], str]) -> list[Row]:
    """Events by name, longest first."""
    rows: dict[str, Row] = {}
    for event in events:
        key = name(event)
        row = rows.setdefault(key, Row(key, group(event), 0, 0.0))
        row.count += 1
        row.ms += event.duration / 1e3
        size = event.args.get("bytes")
        row.bytes += size if isinstance(size, int) else 0
    return _by_time(rows)


def _transfer_rows(transfers: list[Event]) -> list[Row]:
    """Operations of the backend (gloo:...), or where it recorded none, the calls that lead to them (c10d::...)."""
    backend = [event for event in transfers if "::" not in event.name]
    return _rows(backend or transfers, lambda e: e.name, lambda e: COMMUNICATION)


def _self_time(segments: Iterable[Segment]) -> list[Row]:
    """The main thread's operators by the time in which they were the innermost one."""
    rows: dict[str, Row] = {}
    seen: set[int] = set()
    for segment in segments:
        event = _operator(segment.event)
        if event is None:
            continue
        row = rows.setdefault(event.name, Row(event.name, operator_group(event.name), 0, 0.0))
        row.ms += (segment.end - segment.start) / 1e3
        while event.parent is not None and event.parent.name == event.name:
            event = event.parent  # an overload that calls another one: one call
        if id(event) not in seen:
            seen.add(id(event))
            row.count += 1
    return _by_time(rows)


def _grouped(rows: list[Row]) -> list[Row]:
    groups: dict[str, Row] = {}
    for row in rows:
        group = groups.setdefault(row.group, Row(row.group, row.group, 0, 0.0))
        group.count += row.count
        group.ms += row.ms
        group.bytes += row.bytes
    return _by_time(groups)


def _by_time(rows: dict[str, Row]) -> list[Row]:
    return sorted(rows.values(), key=lambda row: (-row.ms, row.name))


def _largest(gaps: list[Interval]) -> list[Interval]:
    return sorted(gaps, key=lambda gap: (gap[0] - gap[1], gap[0]))[:KEPT_GAPS]


def _device_gaps(gaps: list[Interval], window: Interval, events: list[Event], trace: Trace) -> list[Gap]:
    """The largest gaps, each with what the thread did that launched the activity after it: the device waited for that."""
    threads = by_thread(event for event in trace.events if event.category in HOST_CATEGORIES)
    launches = {e.args.get("correlation"): e.thread for e in trace.events if e.category in RUNTIME_CATEGORIES}
    starts = [event.start for event in events]
    main = _main_thread(trace, threads)
    nested: dict[tuple[str, str], list[Segment]] = {}
    found = []
    for start, end in _largest(gaps):
        after = events[bisect.bisect_left(starts, end)].args.get("correlation")
        thread = main if after is None else launches.get(after, main)
        host = "nothing recorded"
        if thread is not None:
            if thread not in nested:
                nested[thread] = nest(threads[thread])
            host = _described(_doing(nested[thread], start, end))
        found.append(Gap((start - window[0]) / 1e3, (end - start) / 1e3, host))
    return found


def _doing(segments: list[Segment], start: float, end: float) -> Event | None:
    """The innermost event of a thread for most of an interval; None where nothing was recorded for longer."""
    times: dict[int, float] = defaultdict(float)
    events: dict[int, Event] = {}
    # Segments neither overlap nor come out of order, so the ends are sorted too.
    for segment in segments[bisect.bisect_right(segments, start, key=lambda s: s.end) :]:
        if segment.start >= end:
            break
        times[id(segment.event)] += min(end, segment.end) - max(start, segment.start)
        events[id(segment.event)] = segment.event
    longest = max(times, key=lambda key: times[key], default=None)
    if longest is None or times[longest] < end - start - math.fsum(times.values()):
        return None
    return events[longest]


def _described(event: Event | None) -> str:
    if event is None:
        return "nothing recorded"
    names = _around(event)
    if event.category == ANNOTATION:
        names = ["no operator (Python, or waiting)", *names]
    elif event.category in RUNTIME_CATEGORIES:
        names = [event.name, *names]
    return " in ".join(names)


def _around(event: Event | None) -> list[str]:
    """The innermost operator, Python function and annotation, from the event itself outwards."""
    names: list[str] = []
    wanted = {"cpu_op", "python_function", ANNOTATION}
    while event is not None and wanted:
        if event.category in wanted and not STEP.fullmatch(event.name):
            names.append(event.name if len(event.name) <= 64 else f"{event.name[:61]}...")
            wanted.discard(event.category)
        event = event.parent
    return names


def _host_gaps(gaps: list[Interval], window: Interval, events: list[Event], segments: list[Segment]) -> list[Gap]:
    """The largest gaps of the main thread, each with where in the program it is."""
    operators = [event for event in events if _is_operator(event) or _begins_communication(event)]
    starts = [event.start for event in operators]
    by_end = sorted(operators, key=lambda event: event.end)
    ends = [event.end for event in by_end]
    found = []
    for start, end in _largest(gaps):
        before = bisect.bisect_right(ends, start)
        after = bisect.bisect_left(starts, end)
        where = f"after {by_end[before - 1].name}" if before else "at the beginning"
        if after < len(operators):
            where += f", before {operators[after].name}"
        around = _around(_doing(segments, start, end))
        where += f", in {' in '.join(around)}" if around else ""
        found.append(Gap((start - window[0]) / 1e3, (end - start) / 1e3, where))
    return found
