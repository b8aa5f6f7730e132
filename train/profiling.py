"""Traces and memory snapshots of chosen steps, written into RUN/profiles.

A trace is what torch.profiler records: every operator of the host and every kernel of the device, with its times, in Chrome's
format. The step before the first traced one runs under the profiler unrecorded, for its first step is slower; and the device
is waited for before the first one, so that no kernel of an earlier step is in the trace. Where no step is traced nothing here
imports torch.profiler or runs more than two comparisons per step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from parallel.mesh import Mesh
from train.config import ProfilingConfig

MEMORY_EVENTS = 1_000_000
"""Allocations and frees of a snapshot's history; a step beyond that keeps its last ones."""


class StepProfiler:
    """Profiles the steps that `[profiling]` names: `start` before the loop, `end_step` in it, `close` after it.

    Args:
        config: which steps, on which processes.
        folder: where the files go.
        mesh: the process and its device.
        say: where the summary of a trace goes (main process).
        step: steps done before the loop.
        last_step: the step at which the loop ends.
    """

    def __init__(
        self, config: ProfilingConfig, folder: Path, mesh: Mesh, say: Callable[[str], None], step: int, last_step: int
    ):
        self.folder, self.mesh, self.say, self.step = folder, mesh, say, step
        writes = mesh.is_main or config.ranks == "all"
        first = config.trace_step if writes and config.trace_step > step else 0
        self.traced = range(first, min(first + config.trace_steps, last_step + 1)) if first else range(0)
        self.memory_step = config.memory_step if writes and config.memory_step > step else 0
        self._profile: Any = None
        self._recording = self._remembering = False
        self._mark: Any = None

    def start(self) -> None:
        """The first step begins."""
        if self.memory_step and self.mesh.device.type != "cuda":
            self.say("profiling.memory_step: only the CUDA allocator keeps a history; on CPU no snapshot is written")
            self.memory_step = 0
        self._begin(self.step + 1)

    def end_step(self, step: int) -> bool:
        """The step of this number has ended, and the next one begins; whether files were written meanwhile."""
        wrote = False
        self._end_mark()
        if self._recording and step == self.traced[-1]:
            self._finish_trace()
            wrote = True
        if self._remembering:
            self._finish_memory(f"memory-step-{step:08}")
            wrote = True
        self._begin(step + 1)
        return wrote

    def close(self) -> None:
        """Give up what was not finished; for a `finally`. A step that runs out of memory leaves its snapshot: it says why."""
        error = sys.exc_info()[1]
        if self._remembering and isinstance(error, torch.OutOfMemoryError):
            self._finish_memory(f"memory-step-{self.memory_step:08}-out-of-memory")
        elif self._remembering:
            torch.cuda.memory._record_memory_history(enabled=None)
        self._end_mark()
        if self._profile is not None:
            with suppress(Exception):  # after an error of the device; that one is to be seen
                if not self._recording:
                    self._profile.start_trace()  # one that is prepared can only be left this way
                self._profile.stop_trace()
            self.say(f"profiling: the run ended before step {self.traced[-1]} did, no trace is written")
        self._profile, self._recording, self._remembering = None, False, False

    def _begin(self, step: int) -> None:
        if self.traced and step == self.traced[0] - 1:
            self._prepare()
        if step in self.traced:
            self._trace(step)
        if step == self.memory_step:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self._remembering = True

    def _prepare(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.prepare_trace()

    def _trace(self, step: int) -> None:
        from torch.profiler import record_function

        if not self._recording:
            if self._profile is None:
                self._prepare()
            if self.mesh.device.type == "cuda":
                torch.cuda.synchronize(self.mesh.device)
            self._profile.start_trace()
            self._recording = True
        # The name by which viewers, and train/trace_summary.py, tell steps.
        self._mark = record_function(f"ProfilerStep#{step}")
        self._mark.__enter__()

    def _end_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _finish_trace(self) -> None:
        profile, self._profile, self._recording = self._profile, None, False
        profile.stop_trace()
        name = f"trace-step-{self.traced[0]:08}-rank-{self.mesh.rank}.json.gz"
        path = self._write(name, lambda file: profile.export_chrome_trace(str(file)))
        if path is None or not self.mesh.is_main:
            return
        from train.trace_summary import TraceError, summarize
        from train.trace_text import trace_text

        try:
            self.say(trace_text(summarize(path)))
        except (TraceError, OSError) as error:
            self.say(f"profiling: the trace cannot be summed up: {error}")

    def _finish_memory(self, name: str) -> None:
        self._remembering = False
        try:
            path = self._write(f"{name}-rank-{self.mesh.rank}.pickle", _dump_snapshot)
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        if path is not None:
            self.say(f"memory snapshot: {path}; to look at it, drop it on https://pytorch.org/memory_viz")

    def _write(self, name: str, write: Callable[[Path], None]) -> Path | None:
        """Make a file whole or not at all. A disk that is full costs the profile, not the run."""
        path = self.folder / name
        temporary = path.with_name(f".{name.partition('.')[0]}.tmp.{name.partition('.')[2]}")  # the end says the format
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            print(f"profiling: {path} could not be written: {error}", file=sys.stderr, flush=True)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            return None
        return path


def _dump_snapshot(file: Path) -> None:
    torch.cuda.memory._dump_snapshot(str(file))
