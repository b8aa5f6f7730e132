"""Start a run's processes on this node, as torchrun does and with its flags, for machines that fail and queues that preempt.

    python -m launch.elastic --standalone --nproc_per_node 8 train/main.py --config configs/llama3_8b.toml

What it adds to torchrun (the rest is in `launch/agent.py`):

- The processes' own exit code comes through: 0, 2, 3, 4, 5, 75 or 130 as docs/cluster.md lists them, 128 + N for a process
  that died of signal N. torchrun always says 1.
- `--max-restarts` restarts after a process that died, hung (5) or failed otherwise (1). What a restart cannot cure ends the
  run on all nodes: 2, 3, 4, 75 and 130.
- SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) are passed on to every process, each time they come, and then waited for without a
  limit: a checkpoint takes as long as it takes. torchrun kills 30 s after SIGTERM and SIGINT and dies of SIGUSR1 itself.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [_ROOT] + [entry for entry in sys.path if entry not in (_ROOT, str(Path(__file__).resolve().parent))]

from train.outcome import EXIT_INTERRUPTED, EXIT_PREEMPTED, installed_packages  # noqa: E402

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Asked to save and leave: what SLURM sends before a time limit (`--signal`), a preemption and a cancellation; Ctrl-C."""


class StopRequests:
    """The stop signals that this process has received, and who is to hear of the next one."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.listener: Callable[[int], None] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    @property
    def code(self) -> int:
        """Exit code of a job that was asked to stop before it had anything to save."""
        return EXIT_INTERRUPTED if signal.SIGINT in self.received else EXIT_PREEMPTED

    def ignore(self) -> None:
        """From when the exit code is known: srun sends SIGTERM to the other nodes' launchers as soon as one exits with 75, and
        Python takes handlers back before it ends, so that a late one would turn the code into 143."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> Any:
        self.received.append(number)
        if self.listener is not None:
            self.listener(number)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line to its end and exit with the processes' code."""
    requests = StopRequests()  # first: torch takes seconds to import, and an unhandled SIGUSR1 would kill
    with installed_packages():
        from launch.agent import launch

    raise SystemExit(launch(sys.argv[1:] if arguments is None else arguments, requests))


if __name__ == "__main__":
    main()
