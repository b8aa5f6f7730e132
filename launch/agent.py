"""The launcher's part on each node: a torchelastic agent that knows exit codes which a restart cannot cure.

torch's `LocalElasticAgent` restarts or gives up; which of the two is decided in `_monitor_workers`, the method it offers for
overriding. Here the final codes (`train/outcome.py`) count as the end of the job: the agent publishes them in the store that
all agents of a rendezvous share, so that the other nodes end too instead of waiting for this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher import api as launcher_api

from launch.elastic import STOP_SIGNALS, StopRequests
from train.outcome import (
    EXIT_HANG,
    EXIT_INTERRUPTED,
    EXIT_OTHER,
    EXIT_PREEMPTED,
    FINAL,
    LAUNCHER_VARIABLE,
    OUTCOME_VARIABLE,
    read_outcomes,
)

SETTLE = 2.0
"""Seconds from a process's failure until its cause must be known: the process that met the cause says so before it ends, on
its own node, but its peers fail at the same time and another node is asked only once a second."""
ASKED_TO_STOP = (EXIT_PREEMPTED, EXIT_INTERRUPTED)
"""Codes of processes that were asked to stop and have saved."""
LINGER = dict.fromkeys(ASKED_TO_STOP, 300.0)
"""Seconds that other processes have to end by themselves once one has told a final code; after an error 30, for they may
wait for it forever. A preempted one has saved together with all others, and a last upload may take minutes."""
LINGER_AFTER_ERROR = 30.0
STORE_INTERVAL = 1.0
STOP_CODES = tuple(-int(number) for number in STOP_SIGNALS)


class Stopped(Exception):
    """A stop signal came while no process was running: there is nothing to save."""


class Agent(LocalElasticAgent):
    """Starts, watches and restarts the processes of this node.

    Attributes:
        code: the exit code of the job, once a final one is known on any node.
    """

    _remaining_restarts: int  # torch's own, which it does not annotate

    def __init__(self, requests: StopRequests, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.code: int | None = None
        self._requests, self._idle = requests, False
        self._outcomes = Path(tempfile.mkdtemp(prefix="newcompute-outcomes-"))
        self._attempt = -1
        self._told_at: float | None = None
        self._asked_store_at = 0.0
        self._passed_on = False
        requests.listener = self._on_signal

    # Signals. Handlers run on the main thread, between two lines of this class or of torch's.

    def _on_signal(self, number: int) -> None:
        if self._idle:
            raise Stopped
        self._send(number)

    def _send(self, number: int) -> None:
        """To each process that still runs, and not to its children: the process decides what becomes of them."""
        for handler in getattr(self._pcontext, "subprocess_handlers", {}).values():
            handler.proc.send_signal(number)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._idle = True
        try:
            if self._requests.received:
                raise Stopped
            super()._rendezvous(worker_group)
        finally:
            self._idle = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._agree_on_attempt(worker_group)
        # A folder for each attempt: what a process of the last one wrote while it was being stopped is not of this one.
        self._told_at, self._passed_on = None, False
        self._folder.mkdir()
        os.environ[OUTCOME_VARIABLE], os.environ[LAUNCHER_VARIABLE] = str(self._folder), str(os.getpid())
        started = super()._start_workers(worker_group)
        if self._requests.received:  # it came when they were not yet there
            self._send(self._requests.received[-1])
        return started

    def _agree_on_attempt(self, worker_group: WorkerGroup) -> None:
        """Number the attempt alike on all nodes, and count a restart on all.

        torch takes TORCHELASTIC_RESTART_COUNT from each agent's own failures: a node that only follows another's restart, or
        is new, has another number. Processes of different numbers do not find each other where agents share their store
        with them, and a node that fails again and again would use up its own restarts only.
        """
        attempts, left = [self._attempt], [self._remaining_restarts]
        if worker_group.group_world_size > 1:
            store = worker_group.store
            mine = json.dumps([self._attempt, self._remaining_restarts])
            store.set(f"newcompute/attempt/{worker_group.group_rank}", mine)
            told = [json.loads(store.get(f"newcompute/attempt/{i}")) for i in range(worker_group.group_world_size)]
            attempts, left = [one[0] for one in told], [one[1] for one in told]
        self._attempt, self._remaining_restarts = max(attempts) + 1, min(left)
        worker_group.spec.max_restarts = self._attempt + self._remaining_restarts  # torch's count is their difference

    @property
    def _folder(self) -> Path:
        return self._outcomes / f"attempt-{self._attempt}"

    # What has become of the processes.

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        failed = result.state in {WorkerState.FAILED, WorkerState.UNHEALTHY}
        code = self._final_code(worker_group, result, patience=SETTLE if failed else 0.0)
        if code is None:
            if failed:
                self._explain_failure(worker_group, result)
            return result
        if result.state == WorkerState.HEALTHY and self._give_time(code):
            return result
        if result.state == WorkerState.HEALTHY:
            # Nothing is left to save or to say: a process that is still here waits for one that has ended.
            self._shutdown(signal.SIGKILL)
            self._final_code(worker_group, result)  # to print what came last
        self.code = code
        self._requests.ignore()
        return RunResult(
            state=WorkerState.SUCCEEDED, return_values={worker.global_rank: None for worker in worker_group.workers}
        )

    def _final_code(self, worker_group: WorkerGroup, result: RunResult, patience: float = 0.0) -> int | None:
        """The code with which the job ends, if any process of any node told a final one; waits for it up to `patience`."""
        deadline = time.monotonic() + patience
        while True:
            code = self._own_code(worker_group, result)
            if code is not None:
                self._publish(worker_group, code)
            shared = self._shared_code(worker_group, at_once=patience > 0 or result.state == WorkerState.SUCCEEDED)
            codes = [one for one in (code, shared) if one is not None]
            if codes or time.monotonic() > deadline:
                return min(codes, default=None)
            time.sleep(0.1)

    def _own_code(self, worker_group: WorkerGroup, result: RunResult) -> int | None:
        told = read_outcomes(self._folder)
        for rank, (_, message) in told.items():
            self._say_once(worker_group, rank, message)
        ended = [failure.exitcode for failure in result.failures.values()]
        codes = {code for code, _ in told.values()} | {code for code in ended if code in FINAL}
        asked = bool(self._requests.received)
        errors = codes.difference(ASKED_TO_STOP)
        if errors:
            return min(errors)
        # torch stops the others with SIGTERM when one has died. They may say "preempted", and must not be believed.
        died = [code for code in ended if code not in (*ASKED_TO_STOP, *STOP_CODES)]
        if codes and (asked or not died):
            return max(codes)
        if asked and ended and not died:
            return self._requests.code  # they were not yet so far that they could handle the signal: nothing to save
        return None

    def _give_time(self, code: int) -> bool:
        """Whether processes that still run may go on for now, after one has told `code`."""
        now = time.monotonic()
        if self._told_at is None:
            self._told_at = now
        if code in ASKED_TO_STOP and not self._requests.received and not self._passed_on:
            # Another node was asked. Those that train with it agree with it anyway; those still starting would wait.
            self._passed_on = True
            self._send(signal.SIGTERM)
        return now - self._told_at < LINGER.get(code, LINGER_AFTER_ERROR)

    def _explain_failure(self, worker_group: WorkerGroup, result: RunResult) -> None:
        if self._requests.received:
            self._remaining_restarts = 0  # asked to leave: no new attempt
        left = self._remaining_restarts
        next_step = f"starting again from the latest checkpoint, {left} restarts left" if left else "no restarts left"
        print(f"newcompute: {describe(result.failures)}; {next_step}", file=sys.stderr, flush=True)

    # What the nodes tell each other, in the store of their rendezvous. A store that cannot be reached tells nothing: then
    # its node is gone, and the agents find that out by themselves.

    def _publish(self, worker_group: WorkerGroup, code: int) -> None:
        if worker_group.group_world_size > 1:
            try:
                worker_group.store.set(f"newcompute/ended/{code}", "1")
                worker_group.store.set("newcompute/ended", "1")
            except (RuntimeError, OSError):
                return

    def _shared_code(self, worker_group: WorkerGroup, at_once: bool) -> int | None:
        now = time.monotonic()
        if worker_group.group_world_size <= 1 or (not at_once and now - self._asked_store_at < STORE_INTERVAL):
            return None
        self._asked_store_at = now
        store = worker_group.store
        try:
            if not store.check(["newcompute/ended"]):
                return None
            return min((code for code in FINAL if store.check([f"newcompute/ended/{code}"])), default=None)
        except (RuntimeError, OSError):
            return None

    def last_shared_code(self) -> int | None:
        """What other nodes published before they left the last rendezvous."""
        return None if self._worker_group.store is None else self._shared_code(self._worker_group, at_once=True)

    def _say_once(self, worker_group: WorkerGroup, rank: int, message: str) -> None:
        """Print a message unless another process, on any node, has told the same."""
        if not message:
            return
        key = f"newcompute/said/{hashlib.sha256(message.encode()).hexdigest()[:16]}"
        first = not (self._folder / Path(key).name).exists()
        (self._folder / Path(key).name).touch()
        if first and worker_group.group_world_size > 1:
            try:
                first = worker_group.store.add(key, 1) == 1
            except (RuntimeError, OSError):
                first = True
        if first:
            process = "" if rank == 0 else f"process {rank}: "
            print(f"newcompute: {process}{message}", file=sys.stderr, flush=True)

    def remove_outcomes(self) -> None:
        shutil.rmtree(self._outcomes, ignore_errors=True)


def launch(arguments: list[str], requests: StopRequests) -> int:
    """Run torchrun's command line with `Agent`; the exit code."""
    options = torchrun.parse_args(arguments)
    ours = {number.name for number in STOP_SIGNALS}
    theirs = [name.strip() for name in options.signals_to_handle.split(",")]
    options.signals_to_handle = ",".join(name for name in theirs if name not in ours)
    # Agents that share one store with their processes announce it in their first rendezvous only: a node that replaces a lost
    # one waits for it in vain (torch 2.13). Without sharing, process 0 of each attempt opens a store of its own.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    agents: list[Agent] = []

    def build(*positional: Any, **named: Any) -> Agent:
        agents.append(Agent(requests, *positional, **named))
        return agents[-1]

    launcher_api.LocalElasticAgent = build  # torchrun has no option for the agent's class
    try:
        torchrun.run(options)
        known = agents[-1].code if agents else None
        return 0 if known is None else known
    except ChildFailedError as error:
        return exit_code(error.failures)
    except SignalException as error:
        return 128 + int(error.sigval)
    except Stopped:
        print("newcompute: asked to stop before anything had started", file=sys.stderr, flush=True)
        return requests.code
    except RendezvousError as error:
        shared = agents[-1].last_shared_code() if agents else None
        if shared is not None or requests.received:
            return requests.code if shared is None else shared
        print(
            f"newcompute: the nodes did not come together: {type(error).__name__} {error}\n  Each node must start the same "
            "command with the same --rdzv_id, --nnodes and --rdzv_endpoint, whose host must be one of them; or another node "
            "has given up, and its log says why.",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_OTHER
    finally:
        requests.ignore()
        for agent in agents:
            agent.remove_outcomes()


def exit_code(failures: dict[int, ProcessFailure]) -> int:
    """One code for the failures of a node: a hang says most, then a death by a signal other than torch's own SIGTERM."""
    codes = [failure.exitcode for failure in failures.values()]
    if EXIT_HANG in codes:
        return EXIT_HANG
    signals = [code for code in codes if code < 0 and code != -signal.SIGTERM]
    chosen = (signals or [code for code in codes if code > 0] or codes or [EXIT_OTHER])[0]
    return 128 - chosen if chosen < 0 else chosen


def describe(failures: dict[int, ProcessFailure]) -> str:
    """Which processes failed and how, those that torch stopped because of it left out."""
    telling = {rank: one.exitcode for rank, one in failures.items() if one.exitcode != -signal.SIGTERM}
    parts = [
        f"process {rank} died of {signal.Signals(-code).name}" if code < 0 else f"process {rank} exited with {code}"
        for rank, code in sorted(telling.items())
    ]
    return ", ".join(parts) or "a process failed"
