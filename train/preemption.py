"""Being asked to stop: signals on any process, and flags on which all processes agree at the same step.

A scheduler that takes a machine back, or a job whose time is up, sends SIGTERM or SIGUSR1; a person presses Ctrl-C (SIGINT).
Before the first step the job ends at once. After that a process only notes the signal: the next agreement tells all, they
save together and end with exit code 75, on which the same command is to be started again, or 130 after Ctrl-C. A second
Ctrl-C ends a process wherever it is, without saving.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from train.outcome import EXIT_INTERRUPTED, EXIT_PREEMPTED, launcher_is_gone, leave_at_once, stopped_with_peer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPT = signal.SIGUSR2
"""What our own thread sends to the main thread, which would sleep through the others: they are blocked there."""
END = b"\0"
INTERVAL = 0.1
"""Seconds between interrupts of the main thread: one that comes just before a call begins does not end it."""
PATIENCE = 5.0
"""Seconds until a process that is to end at once, but sits in a call that Python cannot interrupt, is ended."""


class Preempted(BaseException):
    """The job was asked to stop; the message says what is saved, and `code` is the exit code.

    Not an `Exception`: no error handling on the way may swallow it.
    """

    def __init__(self, message: str = "", code: int = EXIT_PREEMPTED):
        super().__init__(message)
        self.code = code


class Signals:
    """Notes SIGTERM, SIGUSR1 and SIGINT while it is entered.

    They are blocked for threads and programs started meanwhile (compilers, data workers), which a scheduler signals along
    with this process: such a program would die of them, and the run with it. A thread of our own takes them, and hears
    through Python's wake-up pipe of those that reach a thread from before; the main thread may be deep in a long call.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.at_once = True
        """Whether to raise `Preempted` in the main thread, rather than leave it to the next agreement."""
        self.can_save = False
        """Whether there are agreements, and something to save at the next one."""
        self._left = threading.Event()
        self._insisting: threading.Thread | None = None
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Signals:
        if self._active:
            handlers = {**dict.fromkeys(SIGNALS, lambda number, frame: None), INTERRUPT: self._interrupt}
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
            self._thread = threading.Thread(target=self._listen, daemon=True, name="signals")
            self._thread.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        if not self._active:
            return
        self.at_once = False
        self._left.set()
        signal.set_wakeup_fd(self._old_wakeup)
        os.write(self._write, END)
        self._thread.join()
        if self._insisting is not None:
            self._insisting.join()  # before its interrupts would meet another handler
        for end in (self._read, self._write):
            os.close(end)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _listen(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while (number := os.read(self._read, 1)) != END:
            if number[0] in SIGNALS:
                self._note(number[0])

    def _note(self, number: int) -> None:
        if stopped_with_peer():
            os._exit(0)
        first = self.received is None
        if not first and (number == signal.SIGINT or (number == signal.SIGTERM and self.interrupted)):
            # Plain torchrun sends SIGTERM for the second Ctrl-C.
            leave_at_once(signal.SIGINT, "interrupted again: ended without saving")
        self.received = self.received or signal.Signals(number)
        # Without a launcher no agreement may come any more. The system says that it is gone once for each of its threads.
        now = self.at_once or (not self.can_save and launcher_is_gone())
        if now and self._insisting is None:
            self.at_once = True
            self._insisting = threading.Thread(target=self._insist, daemon=True, name="insist on the end")
            self._insisting.start()
        elif now or not first:
            return  # whatever it began is under way
        elif number != signal.SIGINT:
            self._say(
                f"process {os.environ.get('RANK', 0)}: {self.received.name}: saving at the end of this step, then stopping"
            )
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            self._say(
                "interrupted: stopping at the end of this step, with a checkpoint; Ctrl-C once more ends at once, without"
            )

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _insist(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.at_once:
            if time.monotonic() > deadline:
                leave_at_once(self.received or signal.SIGTERM)
            signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPT)
            self._left.wait(INTERVAL)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.at_once:
            self.at_once = False
            raise Preempted(code=self.code)

    @property
    def interrupted(self) -> bool:
        """Whether it was a person who asked, with Ctrl-C."""
        return self.received == signal.SIGINT

    @property
    def code(self) -> int:
        return EXIT_INTERRUPTED if self.interrupted else EXIT_PREEMPTED

    def leave_to_agreements(self) -> None:
        """From now on (the process group stands) a signal is everyone's, at the next agreement."""
        self.at_once = False


class Agreement:
    """Flags that any process may raise, learnt by all of them at the same step.

    One exchange of a few bytes between the hosts (gloo), begun in the middle of a step and read at its end, so that
    nobody waits for it, and no device at all. Collective, like everything here.
    """

    FLAGS = ("stop", "interrupted", "saving")

    def __init__(self, world_size: int, timeout: timedelta):
        self.group = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        self.waited_seconds = 0.0
        """Time this process has stood waiting for the others here: the last to arrive waits least."""
        self.interrupted = False
        """Whether any process was stopped with Ctrl-C, as of the last agreement."""
        self._work: Any = None
        self._flags = torch.zeros(len(self.FLAGS), dtype=torch.int32)

    def begin(self, **raised: bool) -> None:
        """Send this process's flags."""
        self._flags = torch.tensor([int(raised.get(name, False)) for name in self.FLAGS], dtype=torch.int32)
        if self.group is not None:
            self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def finish(self) -> dict[str, bool]:
        """The flags of which any process has raised any."""
        if self._work is not None:
            start = time.perf_counter()
            self._work.wait()
            self.waited_seconds += time.perf_counter() - start
            self._work = None
        flags = {name: bool(flag) for name, flag in zip(self.FLAGS, self._flags.tolist())}
        self.interrupted = flags["interrupted"]
        return flags

    def ask(self, **raised: bool) -> dict[str, bool]:
        """`begin` and `finish`, where nothing else is to be done meanwhile."""
        self.begin(**raised)
        return self.finish()
