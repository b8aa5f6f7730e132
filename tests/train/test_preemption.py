"""Being asked to stop, in every phase of a run, on any of its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT, fork_python, losses, quietly, read_metrics, tiny_flags

from train.checkpoint import committed_steps
from train.config_sources import load_config
from train.outcome import EXIT_INTERRUPTED, EXIT_PREEMPTED
from train.preemption import Preempted, Signals

SETTINGS = {"training__steps": 8, "checkpoint__interval": 3, "validation__interval": 4, "schedule__warmup_steps": 2}
# Phase, the steps made before, what is saved (None: not looked at, or nothing yet), and what is received. Flags are
# exchanged before the gradients are clipped: what comes after that is everyone's in the next step.
PHASES = [
    ("start", 0, None, "SIGTERM"),
    ("build", 0, None, "SIGUSR1"),
    ("data", 0, None, "SIGTERM"),
    ("step", 0, 1, "SIGTERM"),
    ("forward", 2, 3, "SIGUSR1"),
    ("clip", 4, 6, "SIGTERM"),
    ("validate", 4, 4, "SIGUSR1"),
    ("validate", 8, 8, "SIGTERM"),
    ("build", 0, None, "SIGINT"),
    ("forward", 1, 2, "SIGINT"),
    ("validate", 4, 4, "SIGINT"),
    ("begin save", 3, None, "SIGTERM twice"),
    ("copy", 3, None, "SIGUSR1"),
    ("write", 3, None, "SIGUSR1 and SIGTERM"),
    ("commit", 3, None, "SIGTERM twice"),
    ("verify", 6, None, "SIGUSR1 and SIGTERM"),
    ("delete", 6, None, "SIGTERM"),
]
# Before the loop, in a step, between steps, and in a save; each way to be told.
FAST = {("start", 0), ("forward", 1), ("forward", 2), ("begin save", 3), ("write", 3)}


@pytest.fixture(scope="module")
def corpus_and_straight(tmp_path_factory, text_corpus):
    """(a folder with the prepared corpus, the losses of a run that nobody disturbs)."""
    folder = tmp_path_factory.mktemp("preempted")
    flags = tiny_flags(folder, text_corpus, "straight", **SETTINGS)
    quietly(load_config([], flags))
    fork_python(folder, "train/main.py", *flags)
    return folder, losses(read_metrics(folder / "straight"))


def run(folder, corpus, name, faults, processes=1, **changes):
    flags = tiny_flags(folder, corpus, name, **(SETTINGS | changes))
    arguments = ["tests/faulty.py", json.dumps(faults), *flags] if faults else ["train/main.py", *flags]
    return fork_python(folder, *arguments, processes=processes, check=False)


@pytest.mark.parametrize(
    ("phase", "step", "saved", "action"),
    [
        pytest.param(
            phase,
            step,
            saved,
            action,
            id=f"{action} in {phase} at {step}",
            marks=[] if (phase, step) in FAST else [pytest.mark.slow],
        )
        for phase, step, saved, action in PHASES
    ],
)
def test_a_stop_in_any_phase_loses_nothing(corpus_and_straight, text_corpus, phase, step, saved, action):
    folder, straight = corpus_and_straight
    name = f"{phase}-{step}-{action}".replace(" ", "-")
    done = run(folder, text_corpus, name, [{"phase": phase, "step": step, "action": action}])
    assert done.returncode == (EXIT_INTERRUPTED if action == "SIGINT" else EXIT_PREEMPTED), done.stdout + done.stderr
    assert f"{action} in {phase}" in done.stderr
    steps = committed_steps(folder / name / "checkpoints")
    if saved is not None:
        assert max(steps) == saved
        assert f"step {saved} is saved in {folder / name / 'checkpoints'}" in done.stderr
        assert "the same command goes on from there" in done.stderr
    again = run(folder, text_corpus, name, [])
    assert again.returncode == 0, again.stderr
    assert losses(read_metrics(folder / name)) == straight


@pytest.mark.parametrize(
    ("phase", "step"),
    [
        ("step", 2),
        pytest.param("validate", 4, marks=pytest.mark.slow),
        pytest.param("write", 3, marks=pytest.mark.slow),
        pytest.param("load", 3, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_is_everyones(corpus_and_straight, text_corpus, phase, step):
    folder, _ = corpus_and_straight
    name = f"two-{phase}".replace(" ", "-")
    if phase == "load":
        run(folder, text_corpus, name, [], processes=2, parallel__shard=2, training__stop_after=3)
    fault = {"phase": phase, "step": 0 if phase == "load" else step, "rank": 1, "action": "SIGUSR1"}
    done = run(folder, text_corpus, name, [fault], processes=2, parallel__shard=2)
    assert done.returncode == EXIT_PREEMPTED, done.stdout + done.stderr
    again = run(folder, text_corpus, name, [], processes=2, parallel__shard=2)
    assert again.returncode == 0, again.stderr
    found = losses([row for row in read_metrics(folder / name) if "loss" in row])
    expected = losses([row for row in read_metrics(folder / "straight") if "loss" in row])
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-5)


def test_ctrl_c_on_one_process_is_everyones(corpus_and_straight, text_corpus):
    """Also where no checkpoint was due for long: all agree on the step, save, and end with 130."""
    folder, _ = corpus_and_straight
    fault = {"phase": "step", "step": 2, "rank": 1, "action": "SIGINT"}
    done = run(folder, text_corpus, "two-ctrl-c", [fault], processes=2, parallel__shard=2, checkpoint__interval=1000)
    assert done.returncode == EXIT_INTERRUPTED, done.stdout + done.stderr
    assert list(committed_steps(folder / "two-ctrl-c" / "checkpoints")) == [3]
    assert done.stderr.count("step 3 is saved") == 1


def test_a_second_ctrl_c_ends_at_once_without_saving(corpus_and_straight, text_corpus):
    folder, _ = corpus_and_straight
    fault = {"phase": "forward", "step": 1, "action": "SIGINT twice"}
    done = run(folder, text_corpus, "twice", [fault])
    assert done.returncode == EXIT_INTERRUPTED, done.stdout + done.stderr
    assert "interrupted again: ended without saving" in done.stderr
    assert not committed_steps(folder / "twice" / "checkpoints")


@pytest.mark.slow
def test_ctrl_c_saves_nothing_where_nothing_is_ever_saved(corpus_and_straight, text_corpus):
    folder, _ = corpus_and_straight
    fault = {"phase": "forward", "step": 1, "action": "SIGINT"}
    done = run(folder, text_corpus, "never", [fault], checkpoint__interval=0)
    assert done.returncode == EXIT_INTERRUPTED, done.stdout + done.stderr
    assert "nothing is saved, since checkpoint.interval is 0" in done.stderr


def test_programs_that_a_run_starts_survive_the_signals():
    """A compiler that the scheduler signals as well must not die of it, and not swallow the run's own signal."""
    with Signals() as signals:
        signals.leave_to_agreements()
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(child.pid, number)
        assert child.wait() == 0
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while signals.received is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert signals.received == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_long_call_before_the_first_step_is_left_at_once():
    def long_call() -> None:
        with Signals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

    with pytest.raises(Preempted):
        long_call()


def test_a_call_that_cannot_be_left_ends_the_process(tmp_path):
    """Joining a process group whose other members never come is C++ that no Python handler interrupts."""
    script = tmp_path / "waits.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch.distributed as dist\n"
        "from train import preemption\n"
        "preemption.PATIENCE = 0.2\n"
        "with preemption.Signals():\n"
        "    print('waiting', flush=True)\n"
        "    dist.TCPStore('127.0.0.1', 0, 2, True, wait_for_workers=True)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_PREEMPTED
