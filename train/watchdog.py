"""Each process of a run watches itself and answers the others' alarms, so that no fault ends in silence.

The loop calls `beat` at every phase of a step, which sets attributes and nothing else. A thread counts the time without
a beat; when it exceeds the limit on every process, one raises an alarm through the key-value store of the process group,
all write their stacks to RUN/faults/, one prints a line that names the guilty rank (`train/faults.py`), and all exit with
code 5. An error is announced in the same way, so that the others need not wait for an exchange that never ends.

A process that waits for a slow one is no fault: the alarm waits until everybody is quiet, or has ended, or no longer
answers. Time is counted in turns of the thread, not read off a clock: a job that was suspended for an hour, or
whose clock was set, has not been hanging.

Another thread talks to the store, since a call to a store whose host is stopped never returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from train.config import FaultsConfig
from train.faults import DONE, ENDED, HURT, RUNS, Report, diagnose, look, stamp_now, this_process
from train.outcome import EXIT_HANG, EXIT_INTERRUPTED, EXIT_PREEMPTED, tell_torchrun, wait_for_torchrun

HANG = "hang"
EXIT_ENDED = 1
QUICK = 0.1
"""Seconds between two turns once there is an alarm."""
PATIENCE = 5.0
"""Seconds, at least, after which a process that has not answered an alarm counts as silent."""


def group_timeout(limit: float) -> timedelta:
    """Timeout of the process group's exchanges: longer than the watchdog's, whose diagnosis is to come first."""
    return timedelta(seconds=max(1.5 * limit, limit + 120))


class Board:
    """What the processes tell each other, through a store that a thread of its own reads and writes.

    `mine` is published at each turn; `others` is read once `observing` is set. Attributes are set by one thread and read
    by others, without locks.
    """

    def __init__(self, store: dist.Store, mine: Report, world_size: int, interval: float):
        self.store, self.mine, self.world_size, self.interval = store, mine, world_size, interval
        self.observing = False
        self.alarm: dict[str, str] = {}
        """{"stamp": ..., "kind": HANG or ENDED}, the first that any process has raised."""
        self.diagnosis = ""
        self.turns = 0
        self.lost = False
        """The store is gone: its host has ended."""
        self.reports: dict[int, Report] = {rank: Report(rank, "host unknown", 0) for rank in range(world_size)}
        self.reports[mine.rank] = mine
        self._unchanged: dict[int, tuple[int, float]] = {}
        self._to_raise: dict[str, str] = {}
        self._to_say = ""
        self._acquainted = False
        self.alarmed = threading.Event()
        """Set with `alarm`."""
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="watchdog: exchange")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join(PATIENCE)

    def raise_alarm(self, stamp: str, kind: str) -> None:
        """The first alarm of all processes counts; `alarm` holds it soon."""
        self._to_raise = {"stamp": stamp, "kind": kind}
        self.observing = True
        self._wake.set()

    def say(self, diagnosis: str) -> None:
        self._to_say = diagnosis
        self._wake.set()

    def flush(self, patience: float = PATIENCE) -> None:
        """Wait until what was set before this call is published, or the store is gone or does not answer."""
        before = self.turns
        self._wake.set()
        _wait(lambda: self.turns >= before + 2, patience, lambda: self.lost)

    def stands_still(self, rank: int) -> float:
        """Seconds, since `observing` began, without a new report of a rank."""
        return time.monotonic() - self._unchanged[rank][1] if rank in self._unchanged else 0.0

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                self._turn()
            except Exception:  # whatever a store whose host is gone raises
                self.lost = True
                return
            self.turns += 1
            self._wake.wait(QUICK if self.alarm or self.observing else self.interval)
            self._wake.clear()
        with contextlib.suppress(Exception):
            self._publish()

    def _publish(self) -> None:
        self.mine.tick += 1
        self.store.set(f"report {self.mine.rank}", self.mine.to_json())

    def _turn(self) -> None:
        self._publish()
        keys = [f"report {rank}" for rank in range(self.world_size)]
        if not self._acquainted and self.store.check(keys):
            self._acquainted = True
            self._read(keys)  # host and process of each, should this be the last that is heard
        if self._to_raise:
            self.store.compare_set("alarm", "", json.dumps(self._to_raise))
            self._to_raise = {}
        if not self.alarm and self.store.check(["alarm"]):
            self.alarm = json.loads(self.store.get("alarm"))
            self.observing = True
            self.alarmed.set()
        if self._to_say:
            self.store.compare_set("diagnosis", "", self._to_say)
            self._to_say = ""
        if self.alarm and not self.diagnosis and self.store.check(["diagnosis"]):
            self.diagnosis = self.store.get("diagnosis").decode()
        if self.observing:
            self._read(keys)

    def _read(self, keys: list[str]) -> None:
        now = time.monotonic()
        there = [rank for rank, key in enumerate(keys) if self._acquainted or self.store.check([key])]
        for rank in set(range(self.world_size)).difference(there):
            self._unchanged.setdefault(rank, (-1, now))
        for rank, text in zip(there, self.store.multi_get([keys[rank] for rank in there]), strict=True):
            if rank == self.mine.rank:
                continue
            report = Report.from_json(text)
            self.reports[rank] = report
            if self.observing and self._unchanged.get(rank, (-1, 0.0))[0] != report.tick:
                self._unchanged[rank] = (report.tick, now)


class Watchdog:
    """Watches this process while it is entered: `with Watchdog(...) as watchdog: watchdog.beat("data", 1)`.

    Args:
        faults: limits in seconds; `start_timeout` holds to the end of the first step, and while saving.
        folder: where stacks and diagnoses go, RUN/faults/.
        rank: of this process.
        world_size: with more than one process, the default process group must have been started.
    """

    def __init__(self, faults: FaultsConfig, folder: Path, rank: int = 0, world_size: int = 1):
        self.faults, self.folder, self.rank, self.world_size = faults, folder, rank, world_size
        self.phase, self.beats = "start", 0
        self.step: int | None = None
        self.interval = min(max(faults.timeout / 20, 0.05), 2.0)
        self.patience = max(PATIENCE, 5 * self.interval)
        self.mine = this_process(rank)
        self.board: Board | None = None
        if world_size > 1:
            store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store().clone())
            self.board = Board(store, self.mine, world_size, self.interval)
        self._seen_beats, self._last_look = 0, float("inf")
        self._first_step: int | None = None
        self._watched_from, self._turns = 0.0, 0
        self._told = False
        self._leaving, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def beat(self, phase: str, step: int | None = None) -> None:
        """A sign of progress: this process now begins `phase` (one of faults.PHASES) of `step`, or goes on in it."""
        self.phase = phase
        if step is not None:
            self._first_step = step if self.step is None else self._first_step
            self.step = step
        self.beats += 1

    def __enter__(self) -> Watchdog:
        if self.board is not None:
            self.board.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._stop.set()
        asked_to_stop = not isinstance(error, Exception) or getattr(error, "code", None) in (
            EXIT_PREEMPTED,
            EXIT_INTERRUPTED,
        )
        if error is None or asked_to_stop:
            self.mine.state = DONE
        elif self.mine.state != HURT:
            self._announce(error)
        elif self.rank == 0 and not _agent_has_store():
            time.sleep(5 * QUICK)  # the store ends with this process: let the others read
        if self.board is not None:
            self.board.stop()

    def explain(self, error: BaseException) -> tuple[str, int]:
        """An exchange with the others failed in the main thread: the line that says whose doing it is, and the exit code."""
        self._leaving.set()
        self._update()
        self.mine.message, self.mine.state = _short(error), HURT
        board = self.board
        if board is None:
            return _short(error), EXIT_ENDED
        board.raise_alarm(stamp_now(), ENDED)
        _wait(lambda: bool(board.alarm), self.patience, lambda: board.lost)
        stamp = board.alarm.get("stamp", stamp_now())
        self._answer(stamp, error)
        line = self._conclude(stamp)
        fault = any(report.state == ENDED for report in board.reports.values()) or bool(self._silent(stamp))
        return line, EXIT_ENDED if fault else EXIT_HANG

    # The watching thread

    def _watch(self) -> None:
        alarmed = self.board.alarmed if self.board is not None else self._stop
        while not self._stop.is_set():
            alarmed.wait(QUICK if self.board is not None and self.board.observing else self.interval)
            if self._stop.is_set():
                return None
            self._update()
            if self.board is not None and self.board.alarm:
                return self._obey(self.board.alarm)
            if self.mine.quiet > self.mine.limit and not self._leaving.is_set():
                if self.board is None:
                    return self._obey({"stamp": stamp_now(), "kind": HANG})
                self._consider(self.board)
            elif self.board is not None:
                self.board.observing = False

    def _update(self) -> None:
        """Take over what the loop has said, and count the time since."""
        now = time.monotonic()
        mine, beats = self.mine, self.beats
        if beats != self._seen_beats:
            mine.quiet, self._seen_beats = 0.0, beats
        else:
            mine.quiet += max(0.0, min(now - self._last_look, 2 * self.interval))
        self._last_look = now
        mine.phase, mine.step = self.phase, self.step
        first = self._first_step  # noted by the loop, since several steps may pass between two looks
        steady = first is not None and mine.step is not None and mine.step > first
        mine.limit = self.faults.timeout if steady and mine.phase != "save" else self.faults.start_timeout

    def _consider(self, board: Board) -> None:
        """This process is quiet: raise the alarm once nobody else makes progress either."""
        if not board.observing:
            board.observing = True
            self._watched_from = time.monotonic()
            self._turns = board.turns
            return
        if board.turns < self._turns + 2 or board.lost:  # no answer from the store
            if board.lost or time.monotonic() - self._watched_from > self.patience:
                self._obey({"stamp": stamp_now(), "kind": HANG})
            return
        quiet = all(
            report.state != RUNS or report.quiet > 0.9 * report.limit or board.stands_still(rank) > self.patience
            for rank, report in board.reports.items()
        )
        if quiet:
            board.raise_alarm(stamp_now(), HANG)

    def _obey(self, alarm: dict[str, str]) -> None:
        """Answer an alarm, and end this process unless its main thread does so."""
        stamp = alarm["stamp"]
        if alarm["kind"] != HANG and self._leaving.wait(QUICK):
            return
        self._answer(stamp)
        if alarm["kind"] != HANG and self._leaving.wait(self.patience):
            return  # the failed exchange has reached the main thread, which ends by itself
        line = self._conclude(stamp)
        line = f"watchdog of rank {self.rank}: {line}"
        hangs = alarm["kind"] == HANG
        if not self._told and not (hangs and tell_torchrun(line)):
            print(line, file=sys.stderr)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        if self.world_size > 1 and self.rank == 0 and not _agent_has_store():
            time.sleep(5 * QUICK)  # as in __exit__
        if not hangs:
            wait_for_torchrun()
        os._exit(EXIT_HANG if hangs else EXIT_ENDED)

    # What both threads do

    def _answer(self, stamp: str, error: BaseException | None = None) -> None:
        look(self.mine, self.folder, stamp, error)
        self.mine.answered = stamp
        if self.board is not None:
            self.board.flush()

    def _silent(self, stamp: str) -> list[int]:
        if self.board is None:
            return []
        board = self.board
        if board.lost:
            first = board.reports[0]
            gone = first.state == RUNS and first.answered != stamp and self.rank != 0 and not _agent_has_store()
            return [0] if gone else []
        return [
            rank
            for rank, report in board.reports.items()
            if rank != self.rank and report.answered != stamp and report.state not in (DONE, ENDED)
        ]

    def _conclude(self, stamp: str) -> str:
        """The diagnosis: the lowest answering rank makes it for all."""
        board = self.board
        if board is None:
            return self._record(stamp, diagnose({0: self.mine}))

        def settled() -> bool:
            ended = any(report.state == ENDED for report in board.reports.values())
            return bool(board.diagnosis) or ended or not self._silent(stamp)

        responsive = self._board_answers(board)
        if responsive:
            _wait(settled, self.patience, lambda: board.lost)
        silent = self._silent(stamp) if responsive or board.lost else [] if _agent_has_store() else [0]
        speaker = min(
            (r for r in board.reports if r not in silent and board.reports[r].state != DONE), default=self.rank
        )
        if not board.diagnosis and speaker != self.rank and responsive:
            _wait(lambda: bool(board.diagnosis), self.patience, lambda: board.lost)
        if board.diagnosis:
            self._told = self.rank != speaker
            return board.diagnosis
        line = self._record(stamp, diagnose(board.reports, silent))
        if responsive:
            board.say(line)
            board.flush()
        return line

    def _board_answers(self, board: Board) -> bool:
        before = board.turns
        return _wait(lambda: board.turns > before, self.patience, lambda: board.lost)

    def _record(self, stamp: str, diagnosis: str) -> str:
        line = f"{diagnosis}; stacks: {self.folder}/{stamp}-*"
        with contextlib.suppress(OSError):  # another process has written it, or nothing can be written
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"{stamp}-diagnosis.txt", "x", encoding="utf-8") as file:
                file.write(line + "\n")
        return line

    def _announce(self, error: BaseException) -> None:
        """Leave word why this process ends, and stay until the others know."""
        self._update()
        self.mine.message, self.mine.state = _short(error), ENDED
        board = self.board
        if board is not None:
            board.raise_alarm(stamp_now(), ENDED)
            _wait(lambda: bool(board.alarm), self.patience, lambda: board.lost)
        stamp = board.alarm.get("stamp", stamp_now()) if board is not None else stamp_now()
        self._answer(stamp, error)
        self._record(stamp, diagnose({self.rank: self.mine}))
        if board is not None:
            _wait(lambda: not self._silent(stamp), self.patience, lambda: board.lost)


def _agent_has_store() -> bool:
    """Whether torchrun's agent holds the store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _short(error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


def _wait(condition: Any, seconds: float, given_up: Any) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if given_up() or time.monotonic() > deadline:
            return bool(condition())
        time.sleep(0.02)
    return True
