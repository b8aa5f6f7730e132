"""A process as `train/main.py` is one to the launcher, without torch: what it does is said by its argument.

`worker.py FOLDER PLAN...`: each plan is RANK:ATTEMPT:ACTION (`*` for any); the first that fits is carried out. It appends to
FOLDER/RANK: "start ATTEMPT", then each signal's name as it comes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train.outcome import stop_without_launcher, tell_launcher

folder, plans = Path(sys.argv[1]), sys.argv[2:]
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
if "SLURM_RESTART_COUNT" in os.environ or "SLURM_JOB_ID" in os.environ:
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")


def note(text: str) -> None:
    with open(folder / rank, "a") as file:
        file.write(text + "\n")


def leave(code: int, message: str) -> None:
    raise SystemExit(0 if tell_launcher(code, message) else code)


def stop_on_signal(delay: float = 0.0, count: int = 1) -> None:
    """Save and leave on the `count`-th signal, `delay` seconds after it: a preempted run."""
    received: list[int] = []

    def heard(number: int, frame: object) -> None:
        received.append(number)
        note(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, heard)
    note("ready")
    while len(received) < count:
        time.sleep(0.02)
    time.sleep(delay)
    note("saved")
    leave(130 if signal.SIGINT in received else 75, "stopped and saved")


def all_have_started() -> bool:
    files = [folder / str(other) for other in range(int(os.environ["WORLD_SIZE"]))]
    return all(file.exists() and f"start {attempt}" in file.read_text().splitlines() for file in files)


def act(action: str) -> None:
    name, _, value = action.partition("=")
    if name in ("exit", "late", "kill"):  # the launcher then stops the others, wherever they are
        while not all_have_started():
            time.sleep(0.02)
    if name == "tell":  # a final code, with the same message on every process
        leave(int(value), f"code {value}")
    elif name == "after":  # the same, once another process has told its own
        while not list(Path(os.environ["NEWCOMPUTE_OUTCOME"]).glob("*.json")):
            time.sleep(0.02)
        leave(int(value), f"code {value}")
    elif name == "exit":
        raise SystemExit(int(value))
    elif name == "late":  # what a peer of a process that has ended does
        time.sleep(0.5)
        raise SystemExit(int(value))
    elif name == "kill":
        os.kill(os.getpid(), int(value))
    elif name == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note("ready")
        time.sleep(600)
    elif name == "deaf":  # still starting: no handler yet
        note("ready")
        time.sleep(600)
    elif name == "stop":
        delay, _, count = value.partition(",")
        stop_on_signal(float(delay or 0), int(count or 1))
    elif name != "end":
        raise SystemExit(f"no such action: {action}")


stop_without_launcher()
note(f"start {attempt}")
for plan in plans:
    who, when, what = plan.split(":", 2)
    if who in ("*", rank) and when in ("*", attempt):
        act(what)
        break
