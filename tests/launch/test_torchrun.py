"""Under plain torchrun: whose error its last lines show, and processes whose torchrun is killed."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
from cluster import lines, wait_until
from support import fork_script, quietly, tiny_flags

from train import outcome
from train.config_sources import load_config

WORKER = str(Path(__file__).parent / "plain_worker.py")


@pytest.fixture
def torchrun(tmp_path):
    """Start plain torchrun with two processes, in a process that has torch imported; killed at the end."""
    started = []

    def start(*arguments: str, **environment: str):
        spec = importlib.util.find_spec("torch.distributed.run")
        assert spec is not None
        assert spec.origin is not None
        options = (spec.origin, "--standalone", "--nproc_per_node=2", "--local_addr=127.0.0.1")
        started.append(fork_script(tmp_path / "torchrun", *options, *arguments, OMP_NUM_THREADS="1", **environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pid_of(file: Path) -> int:
    wait_until(lambda: file.exists() and file.read_text(), str(file))
    return int(file.read_text())


@pytest.mark.parametrize("actions", [("wait", "fail"), ("fail", "wait"), ("late", "fail")])
def test_the_last_lines_are_the_message_of_the_process_that_failed(torchrun, tmp_path, actions):
    process = torchrun(WORKER, str(tmp_path), *actions)
    process.join(120)
    assert process.exitcode == 1
    said = lines(tmp_path / "torchrun.err")
    rank = actions.index("fail")
    assert [line.strip() for line in said[-3:-1]] == [f"newcompute: process {rank}: the ink is out", "fill it"]
    assert "<NO_OTHER_FAILURES>" in "".join(said), "what torchrun ended because of it is not listed"
    assert "exitcode  : 75" not in "".join(said)


def test_torchrun_that_starts_again_shows_nothing_so_the_process_speaks(torchrun, tmp_path):
    process = torchrun("--max-restarts=1", WORKER, str(tmp_path), "wait", "fail")
    process.join(120)
    assert process.exitcode == 1
    said = "\n".join(lines(tmp_path / "torchrun.err"))
    assert said.count("process 1: the ink is out") == 2, "once for each attempt, the last time in the table"


def test_processes_whose_torchrun_is_killed_end_at_once(torchrun, tmp_path):
    process = torchrun(WORKER, str(tmp_path), "wait", "wait")
    pids = [pid_of(tmp_path / rank) for rank in ("0", "1")]
    os.kill(process.pid, signal.SIGKILL)
    for pid in pids:
        wait_until(lambda pid=pid: not alive(pid), f"process {pid}", 20)


def test_a_process_that_comes_too_late_finds_its_torchrun_gone(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setattr(outcome, "_is_python", lambda pid: pid == os.getppid())
    assert not outcome.launcher_is_gone()
    monkeypatch.setattr(outcome, "_is_python", lambda pid: False)
    assert outcome.launcher_is_gone()
    monkeypatch.setenv(outcome.LAUNCHER_VARIABLE, str(os.getppid()))
    assert not outcome.launcher_is_gone()
    monkeypatch.setenv(outcome.LAUNCHER_VARIABLE, str(os.getpid()))  # no ancestor
    assert outcome.launcher_is_gone()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start", "build", "forward"])
def test_a_run_whose_torchrun_is_killed_frees_its_folder(torchrun, tmp_path, text_corpus, phase):
    """In the process group's rendezvous, in a collective before the first step, and in training, where it saves."""
    flags = tiny_flags(tmp_path, text_corpus, training__steps=100_000, validation__interval=0, checkpoint__interval=0)
    quietly(load_config([], flags))
    # Process 1 hangs where process 0 waits for it; in training both go on.
    faults = [] if phase == "forward" else [{"phase": phase, "rank": 1, "action": "hang"}]
    process = torchrun("tests/faulty.py", json.dumps(faults), *flags)
    lock = tmp_path / "run" / ".lock"

    def is_locked() -> bool:
        if not lock.exists():
            return False
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    wait_until(is_locked, "the run's lock", 120)
    said = tmp_path / ("torchrun.out" if phase == "forward" else "torchrun.err")
    mark = "step 1/" if phase == "forward" else f"hang in {phase}"
    wait_until(lambda: mark in said.read_text(), mark, 120)
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not is_locked(), "the lock is free", 30)
