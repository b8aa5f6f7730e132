"""What a process can tell of itself when a run stands still or breaks, and the one line that names the guilty rank.

`look` writes stacks and collectives of this process to files and returns what the others need to know of it. `diagnose`
reads what all have told and is a pure function. The threads and exchanges around them are in `train/watchdog.py`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

PHASES = ("start", "load", "data", "forward/backward", "optimizer", "log", "validate", "save")
"""What a process may be doing, in the order of a step."""

RUNS, HURT, ENDED, DONE = "runs", "hurt", "ended", "done"
"""States of a process: HURT met the failure of another one, ENDED failed by itself, DONE has come to its end."""


@dataclass
class Report:
    """What a process tells the others of itself."""

    rank: int
    host: str
    pid: int
    phase: str = "start"
    step: int | None = None
    quiet: float = 0.0
    """Seconds since its last sign of progress."""
    limit: float = 0.0
    """Seconds after which that counts as hanging."""
    tick: int = 0
    """Grows with each report: a process whose tick stands still is stopped or gone."""
    state: str = RUNS
    message: str = ""
    """The error that ended it."""
    answered: str = ""
    """The alarm to which it has answered with the fields below."""
    place: str = ""
    """Where its main thread is."""
    waiting: str = ""
    """The exchange in which it waits for others, if it does."""
    groups: dict[str, Group] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def position(self) -> tuple[int, int]:
        return (-1 if self.step is None else self.step, PHASES.index(self.phase))

    @property
    def doing(self) -> str:
        return self.phase if self.step is None else f"{self.phase} at step {self.step}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        values = json.loads(text)
        groups = {name: Group(**group) for name, group in values.pop("groups").items()}
        return cls(**values, groups=groups)


@dataclass(frozen=True)
class Group:
    """What the flight recorder knows of one process group in one process."""

    last: int
    """Number of the last collective that this process has begun; the members of a group number alike."""
    pending: int | None = None
    """Number of the first one that is not complete."""
    operation: str = ""
    """What that one is."""


def this_process(rank: int) -> Report:
    return Report(rank, socket.gethostname(), os.getpid())


def is_broken_exchange(error: BaseException) -> bool:
    """Whether an error says that an exchange with other processes failed, which is then their doing."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo/transport")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


# Looking at this process


def look(report: Report, folder: Path, stamp: str, error: BaseException | None = None) -> None:
    """Write stacks (or an error's traceback) and the flight recorder to `folder`, and fill in the report."""
    if error is None:
        report.place, report.waiting = place_and_waiting(threading.main_thread().ident or 0)
        _quietly(lambda: _write_stacks(report, folder / f"{stamp}-rank-{report.rank}.txt"))
    else:
        _quietly(lambda: _write_traceback(report, error, folder / f"{stamp}-rank-{report.rank}.txt"))
    # The recorder's lock may be held by the very thread that hangs.
    recorded = _within(5.0, lambda: _flight_recorder(folder, stamp, report.rank))
    report.groups = recorded or {}
    pending = [group.operation for group in report.groups.values() if group.pending is not None]
    if report.waiting and pending:
        report.waiting = pending[0]


def place_and_waiting(thread: int) -> tuple[str, str]:
    """Where a thread is in code that is not torch's, and the function of torch.distributed in which it waits, if any."""
    frames: list[FrameType] = []
    frame = sys._current_frames().get(thread)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    if not frames:
        return "", ""
    inside = frames[0].f_code.co_filename
    waiting = ""
    if f"torch{os.sep}distributed{os.sep}" in inside:
        named = [f.f_code.co_name for f in frames if f.f_code.co_filename.endswith("distributed_c10d.py")]
        waiting = named[0] if named else frames[0].f_code.co_name
    packages = f"{os.sep}site-packages{os.sep}"
    standard = os.path.dirname(threading.__file__)
    own = [f for f in frames if packages not in f.f_code.co_filename and not _is_under(f, standard)] or frames
    code = own[0].f_code
    return f"{code.co_name} ({os.path.basename(code.co_filename)}:{own[0].f_lineno})", waiting


def _is_under(frame: FrameType, folder: str) -> bool:
    return frame.f_code.co_filename.startswith((folder, "<"))


def _heading(report: Report) -> str:
    place = f"\nmain thread in {report.place}" if report.place else ""
    waiting = f", waiting in {report.waiting}" if report.waiting else ""
    return f"{report.name}: {report.doing}, no progress for {report.quiet:.0f} s{place}{waiting}"


def _write_stacks(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    names = "\n".join(f"thread {thread.ident:#018x}: {thread.name}" for thread in threading.enumerate())
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(f"{_heading(report)}\n\n{names}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    os.replace(temporary, path)


def _write_traceback(report: Report, error: BaseException, path: Path) -> None:
    before = path.read_text(encoding="utf-8") + "\n" if path.exists() else ""  # stacks, when the alarm came first
    text = "".join(traceback.format_exception(error))
    _write(path, f"{before}{_heading(report)}\n\n{text}".encode())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _flight_recorder(folder: Path, stamp: str, rank: int) -> dict[str, Group]:
    """Write what this process's collectives were (gloo and NCCL), and sum it up by process group."""
    bindings: Any = torch_bindings()
    groups: dict[str, Group] = {}
    for name, backend in (("_dump_fr_trace_json", "gloo"), ("_dump_nccl_trace_json", "nccl")):
        if not hasattr(bindings, name):
            continue
        text = getattr(bindings, name)()
        text = text.encode() if isinstance(text, str) else text
        entries = json.loads(text).get("entries") or []
        if entries:
            _quietly(lambda t=text, b=backend: _write(folder / f"{stamp}-{b}-rank-{rank}.json", t))  # type: ignore[misc]
        for key, group in groups_of(entries).items():
            groups[f"{backend} {key}"] = group
    if hasattr(bindings, "_dump_nccl_trace"):  # the form that torchfrtrace reads
        pickled = bindings._dump_nccl_trace()
        _quietly(lambda: _write(folder / f"{stamp}-nccl-{rank}", pickled))
    return groups


def torch_bindings() -> Any:
    import torch._C._distributed_c10d as bindings

    return bindings


def groups_of(entries: Iterable[dict[str, Any]]) -> dict[str, Group]:
    """By process group, what a flight recorder's entries say; sends and receives do not count."""
    groups: dict[str, Group] = {}
    for entry in entries:
        if entry["is_p2p"]:
            continue
        name, number = entry["process_group"][0], int(entry["collective_seq_id"])
        known = groups.get(name, Group(0))
        pending, operation = known.pending, known.operation
        complete = entry["retired"] or entry["state"] == "completed"
        if not complete and pending is None:
            pending, operation = number, entry["profiling_name"].split(":")[-1]
        groups[name] = Group(max(known.last, number), pending, operation)
    return groups


def _within(seconds: float, act: Callable[[], Any]) -> Any:
    """The result of `act`, or None when it fails or takes longer; it then stays behind in a daemon thread."""
    box: list[Any] = []
    thread = threading.Thread(target=lambda: _quietly(lambda: box.append(act())), daemon=True, name="flight recorder")
    thread.start()
    thread.join(seconds)
    return box[0] if box else None


def _quietly(act: Callable[[], Any]) -> None:
    """What is written about a fault must not hide it: a full disk is said, and the rest goes on."""
    try:
        act()
    except Exception as error:
        print(f"watchdog: could not write: {error}", file=sys.stderr, flush=True)


# Naming the guilty one


def diagnose(reports: dict[int, Report], silent: Iterable[int] = ()) -> str:
    """One line on what stopped a run, with the ranks that are to blame.

    In this order: a rank that ended with an error; ranks that do not answer; else, of those that stand still, the ones
    furthest behind, of them those for which others wait in a collective that they have not begun, and of them
    those that wait in no exchange.

    Args:
        reports: the last report of every rank.
        silent: ranks that did not answer the alarm.
    """
    ended = [report for report in reports.values() if report.state == ENDED]
    if ended:
        return "; ".join(f"{r.name} ended in {r.doing}: {r.message}" for r in ended[:3]) + _more(ended[3:])
    mute = [reports[rank] for rank in sorted(silent) if reports[rank].state != DONE]
    if mute:
        return "; ".join(_silence(report) for report in mute[:3]) + _more(mute[3:])
    alive = [report for report in reports.values() if report.state != DONE]
    if not alive:
        return "every rank has come to its end"
    guilty = _guilty(alive)
    if len(alive) == 1:
        others = ""
        if len(reports) > 1:
            others = ": all others have come to their end"
        return _hang(alive[0]) + others
    if len(guilty) == len(alive):
        first = alive[0]
        where = sorted({r.doing for r in alive})
        waits = sorted({r.waiting for r in alive if r.waiting})
        return (
            f"no rank has made progress for {first.quiet:.0f} s, and which one holds up the others cannot be told: all are in "
            f"{' or '.join(where)}" + (f" ({', '.join(waits)})" if waits else "")
        )
    rest = [report for report in alive if report not in guilty]
    kinds = sorted({r.phase + (f" ({r.waiting})" if r.waiting else "") for r in rest})
    wait = "wait" if len(rest) > 1 else "waits"
    return (
        "; ".join(_hang(r) for r in guilty[:3]) + _more(guilty[3:]) + f": {_ranks(rest)} {wait} in {' or '.join(kinds)}"
    )


def _guilty(alive: list[Report]) -> list[Report]:
    behind = min(report.position for report in alive)
    guilty = [report for report in alive if report.position == behind]
    awaited = [report for report in guilty if _is_awaited(report, alive) and not _awaits(report, alive)]
    guilty = awaited or guilty
    return [report for report in guilty if not report.waiting and report.state != HURT] or guilty


def _is_awaited(report: Report, alive: list[Report]) -> bool:
    """Whether another process is in a collective that this one has not begun."""
    return any(_waits_for(other, report) for other in alive)


def _awaits(report: Report, alive: list[Report]) -> bool:
    return any(_waits_for(report, other) for other in alive)


def _waits_for(one: Report, other: Report) -> bool:
    return any(
        group.pending is not None and name in other.groups and other.groups[name].last < group.pending
        for name, group in one.groups.items()
    )


def _hang(report: Report) -> str:
    place = f", in {report.place}" if report.place else ""
    step = "" if report.step is None else f" at step {report.step}"
    return f"{report.name} hangs in {report.phase} since {report.quiet:.0f} s{step}{place}"


def _silence(report: Report) -> str:
    what = {
        "ended": "has ended without a word (killed, or its node is lost)",
        "stopped": "is stopped (by SIGSTOP or a debugger)",
        "runs": "does not answer (something holds Python's interpreter lock)",
        "": "does not answer (stopped, killed, or its node is lost)",
    }[process_state(report.host, report.pid)]
    heard = f"; last heard of in {report.doing}" if report.phase != PHASES[0] else ""
    return f"{report.name} {what}{heard}"


def process_state(host: str, pid: int) -> str:
    """ "ended", "stopped" or "runs", or "" where it cannot be known: on another node."""
    if host != socket.gethostname() or not os.path.isdir("/proc/self"):
        return ""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "ended"
    return {"Z": "ended", "X": "ended", "T": "stopped", "t": "stopped"}.get(letter, "runs")


def _ranks(reports: list[Report]) -> str:
    """ "rank 1", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(report.rank for report in reports):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"ranks {text}" if len(reports) > 1 else f"rank {text}"


def _more(reports: list[Report]) -> str:
    return f" (and {_ranks(reports)})" if reports else ""


def stamp_now() -> str:
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())
