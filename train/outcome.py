"""How a process of a run ends: its exit code, and how the launcher learns of it.

torchrun knows two ends, done and failed, and restarts whatever failed. A wrong setting or a damaged checkpoint comes back
with every restart, and a preempted run must leave the node. So a process that `launch/elastic.py` started writes such a
final code, with its message, into a file of its own and exits with 0: torchrun leaves the others time to end by themselves,
and the launcher prints each message once and exits with the code. Without the launcher the process exits with the code.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

EXIT_OTHER = 1
EXIT_SETUP = 2
EXIT_NON_FINITE = 3
EXIT_CHECKPOINT = 4
EXIT_HANG = 5
EXIT_PREEMPTED = 75
"""The run was asked to stop, has saved and can go on: EX_TEMPFAIL of sysexits.h, on which schedulers requeue."""

FINAL = (EXIT_SETUP, EXIT_NON_FINITE, EXIT_CHECKPOINT, EXIT_PREEMPTED)
"""Ends that starting the same processes once more cannot change."""

LAUNCHER_VARIABLE = "NEWCOMPUTE_LAUNCHER"
"""Environment variable with the process id of the launcher."""

OUTCOME_VARIABLE = "NEWCOMPUTE_OUTCOME"
"""Environment variable naming the folder of one attempt on one node, to which each process adds `RANK.json`."""


def tell_launcher(code: int, message: str = "") -> bool:
    """Leave a final code and its message to the launcher; to be called before this process's peers can notice its end.

    Returns:
        True when the launcher will report them: end with exit code 0 and say nothing. False when there is no launcher, the
        code is none of `FINAL`, or the file cannot be written: print the message and exit with the code.
    """
    folder = os.environ.get(OUTCOME_VARIABLE)
    if not folder or code not in FINAL:
        return False
    file = Path(folder) / f"{os.environ.get('RANK', 0)}.json"
    if file.exists():
        return True  # the first word counts: a signal that comes while the process ends changes nothing
    try:
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"code": code, "message": message}), encoding="utf-8")
        os.replace(unfinished, file)
    except OSError:
        return False
    return True


def stop_without_launcher() -> None:
    """Have the system send SIGTERM when the launcher that started this process is gone, as if it had been asked to stop.

    Nobody else would end it: a launcher that is killed leaves its processes training, and under SLURM they keep the step, and
    so the job that is to come back, waiting for more than a minute. Elsewhere than on Linux this does nothing.
    """
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
    try:
        os.kill(int(launcher), 0)
    except ProcessLookupError:  # it was gone before that
        os.kill(os.getpid(), signal.SIGTERM)


def leave_at_once() -> NoReturn:
    """End this process, which was asked to stop before it has anything to save."""
    message = "asked to stop, with nothing to be saved; start the same command again"
    told = tell_launcher(EXIT_PREEMPTED, message)
    if not told:
        os.write(2, f"{message}\n".encode())  # in a handler: a print may be under way
    os._exit(0 if told else EXIT_PREEMPTED)


def read_outcomes(folder: Path) -> dict[int, tuple[int, str]]:
    """What the processes of one attempt left in its folder: (code, message) by rank."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        outcome = json.loads(file.read_text(encoding="utf-8"))
        found[int(file.stem)] = (outcome["code"], outcome["message"])
    return found
