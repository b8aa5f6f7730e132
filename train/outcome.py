"""How a process of a run ends: its exit code, and how the launcher learns of it.

torchrun knows two ends, done and failed, and restarts whatever failed. A wrong setting or a damaged checkpoint comes back
with every restart, and a preempted run must leave the node. So a process that `launch/elastic.py` started writes such a
final code, with its message, into a file of its own and exits with 0: torchrun leaves the others time to end by themselves,
and the launcher prints each message once and exits with the code. Without the launcher the process exits with the code.

Plain torchrun prints a table of the processes that failed as its last words. It shows the error file of the one that failed
first, so that is where the message goes; processes that torchrun ends because of that one leave with 0 and are not listed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

EXIT_OTHER = 1
EXIT_SETUP = 2
EXIT_NON_FINITE = 3
EXIT_CHECKPOINT = 4
EXIT_HANG = 5
EXIT_PREEMPTED = 75
"""The run was asked to stop, has saved and can go on: EX_TEMPFAIL of sysexits.h, on which schedulers requeue."""

EXIT_INTERRUPTED = 130
"""The run was stopped from the keyboard, has saved and can go on: 128 + SIGINT, as shells count."""

FINAL = (EXIT_SETUP, EXIT_NON_FINITE, EXIT_CHECKPOINT, EXIT_PREEMPTED, EXIT_INTERRUPTED)
"""Ends that starting the same processes once more cannot change."""

LAUNCHER_VARIABLE = "NEWCOMPUTE_LAUNCHER"
"""Environment variable with the process id of the launcher."""

OUTCOME_VARIABLE = "NEWCOMPUTE_OUTCOME"
"""Environment variable naming the folder of one attempt on one node, to which each process adds `RANK.json`."""

NOTICE = 12.0
"""Seconds in which a process that failed has said so and ended, and torchrun has noticed."""


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


def under_plain_torchrun() -> bool:
    """Whether torchrun started this process, without our launcher around it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and OUTCOME_VARIABLE not in os.environ


def tell_torchrun(message: str) -> bool:
    """Leave this process's error to plain torchrun, whose closing table then ends with it.

    Returns:
        True when torchrun will show the message: exit with the code and say nothing. False without plain torchrun, when it
        starts the processes again and shows nothing, or when the file cannot be written: print the message.
    """
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    attempt, attempts = (int(os.environ.get(f"TORCHELASTIC_{key}", 0)) for key in ("RESTART_COUNT", "MAX_RESTARTS"))
    if not name or not under_plain_torchrun() or attempt < attempts:
        return False
    file = Path(name)
    if file.exists():
        return True  # what came first is the cause
    # torch takes the earliest for the root cause and compares whole seconds. A process that fails because of this one may be
    # noticed within the same second.
    details = {"py_callstack": f"\n{message}", "timestamp": str(int(time.time()) - 1)}
    try:
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"message": {"message": message, "extraInfo": details}}), encoding="utf-8")
        os.replace(unfinished, file)
    except OSError:
        return False
    return True


def stopped_with_peer() -> bool:
    """Whether a signal that has just come is plain torchrun ending this process because another one has failed.

    The run has failed then, whatever this process exits with.
    """
    told = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "/")).is_file()
    return not told and peer_has_ended()


def peer_has_ended() -> bool:
    """Whether plain torchrun has noticed the end of another of its processes here: it has collected that child (Linux)."""
    if not under_plain_torchrun():
        return False
    # All threads: while torchrun dies, its children pass from one to the next. Then they may be missing altogether.
    lists = Path(f"/proc/{os.getppid()}/task").glob("*/children")
    try:
        children = {int(pid) for file in lists for pid in file.read_text().split()}
    except OSError:
        return False
    return os.getpid() in children and len(children) < int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def wait_for_torchrun() -> None:
    """Leave plain torchrun time to notice the process that failed, before this one, which only suffers from that, ends too."""
    if under_plain_torchrun():
        time.sleep(NOTICE)


def stop_without_launcher() -> None:
    """Have the system send SIGTERM when the launcher that started this process is gone, as if it had been asked to stop.

    Nobody else would end it: a launcher that is killed leaves its processes training, or waiting for each other for as long
    as a rendezvous may take, and they keep the run's lock. Under SLURM they keep the step, and so the job that is to come
    back, waiting for more than a minute. Elsewhere than on Linux this does nothing.
    """
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if (launcher is None and not under_plain_torchrun()) or not sys.platform.startswith("linux"):
        return
    parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
    if launcher_is_gone():  # it was gone before that
        os.kill(os.getpid(), signal.SIGTERM)


def launcher_is_gone() -> bool:
    """Whether the launcher that started this process has ended.

    torchrun does not say which process it is. It is a Python program, and whoever takes its processes over is none: an init,
    a service manager, or the shim of a container. (Where that one is Python as well, this says no.)
    """
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if (launcher is None and not under_plain_torchrun()) or not sys.platform.startswith("linux"):
        return False
    above = list(_ancestors())
    return int(launcher) not in above if launcher is not None else not any(map(_is_python, above))


def _ancestors() -> Iterator[int]:
    """Process ids from the parent up to the init of this namespace (Linux)."""
    pid = os.getppid()
    while pid > 0:
        yield pid
        try:
            # The fields after the command's name, which may hold blanks and parentheses: state, parent, ...
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return


def _is_python(pid: int) -> bool:
    try:
        return "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False


def leave_at_once(number: int, message: str = "") -> NoReturn:
    """End this process on a signal: it has nothing to save, or a person does not want to wait for that."""
    if stopped_with_peer():
        os._exit(0)
    code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
    asked = "interrupted" if number == signal.SIGINT else "asked to stop"
    message = message or f"{asked}, with nothing to be saved; start the same command again"
    told = tell_launcher(code, message)
    if not told and os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"newcompute: {message}\n".encode())  # in a handler: a print may be under way
    os._exit(0 if told else code)


def read_outcomes(folder: Path) -> dict[int, tuple[int, str]]:
    """What the processes of one attempt left in its folder: (code, message) by rank."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        outcome = json.loads(file.read_text(encoding="utf-8"))
        found[int(file.stem)] = (outcome["code"], outcome["message"])
    return found


PACKAGES = ("train", "models", "parallel", "transforms", "evals", "launch")
"""The project's own, whose absence is no matter of installing."""


@contextmanager
def installed_packages() -> Iterator[None]:
    """Around imports: end with exit code 2 and what to do, where one of the packages that this project needs is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if missing_package(error):
            print(f"newcompute: {missing_package(error)}", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_SETUP) from None
        raise


def missing_package(error: ModuleNotFoundError) -> str:
    """What to do about a package that is not installed; nothing for a module of the project itself."""
    name = (error.name or "").partition(".")[0]
    if not name or name in PACKAGES:
        return ""
    root = Path(__file__).resolve().parent.parent
    return (
        f"the package {name} is not installed for {sys.executable}: run `make setup` in {root}, then "
        f"`source {root}/.venv/bin/activate`"
    )
