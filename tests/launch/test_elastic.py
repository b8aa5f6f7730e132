"""The launcher: exit codes, restarts and signals, with real processes on one and two nodes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from cluster import WORKER, Node, lines, rendezvous, wait_until
from support import run_python

PREEMPTED, INTERRUPTED = 75, 130


@pytest.fixture
def start(tmp_path):
    """Start a launcher whose processes follow plans (`worker.py`); killed with all of them at the end."""
    started = []

    def start(*plans: str, options: list[str] | None = None, name: str = "node", notes: Path | None = None) -> Node:
        options = rendezvous(1) if options is None else options
        started.append(Node(tmp_path, name, *options, WORKER, str(notes or tmp_path), *plans))
        return started[-1]

    yield start
    for node in started:
        node.kill()


def starts(folder: Path, rank: int = 0) -> int:
    return sum(line.startswith("start") for line in lines(folder / str(rank)))


def ready(folder: Path) -> None:
    """Wait for both processes: a signal would kill one that has no handler yet."""
    for rank in ("0", "1"):
        wait_until(lambda rank=rank: lines(folder / rank)[-1:] == ["ready"], f"process {rank}")


@pytest.mark.parametrize(
    ("plans", "code"),
    [
        (["*:*:end"], 0),
        (["*:*:tell=2"], 2),
        (["1:*:tell=3", "*:*:late=1"], 3),  # the others fail because process 1 has ended
        (["1:*:tell=4", "*:*:end"], 4),
        (["1:*:exit=2", "*:*:end"], 2),  # a process that knows nothing of the launcher
        (["0:*:after=75", "1:*:tell=4"], 4),  # an error needs a person, whatever else was told
    ],
)
def test_codes_that_a_restart_cannot_cure_come_through_at_once(start, tmp_path, plans, code):
    node = start(*plans, options=rendezvous(1, restarts=2))
    assert node.wait() == code, node.said()
    # One may have been stopped before it could note its start.
    assert max(starts(tmp_path, 0), starts(tmp_path, 1)) == 1
    told = [plan for plan in plans if "tell" in plan]
    for plan in told:
        assert node.said().count(f"code {plan[-1]}") == 1, "each message is printed once, whoever met it"


@pytest.mark.slow
@pytest.mark.parametrize(("action", "code"), [("kill=9", 137), ("kill=11", 139), ("exit=1", 1), ("exit=5", 5)])
def test_processes_that_died_are_restarted_until_no_restart_is_left(start, tmp_path, action, code):
    node = start(f"1:0:{action}", "*:*:end", options=rendezvous(1, restarts=1))
    assert node.wait() == 0, node.said()
    for rank in ("0", "1"):
        assert lines(tmp_path / rank) == ["start 0", "start 1"], "all begin again, not the dead one alone"
    assert "process 1" in node.said()
    again = start(f"1:*:{action}", "*:*:end", options=rendezvous(1, restarts=1), name="again")
    assert again.wait() == code, again.said()


@pytest.mark.slow
def test_a_process_that_the_launcher_stopped_is_not_taken_for_preempted(start, tmp_path):
    """torch ends the others with SIGTERM when one has died: they save or leave, and say 75."""
    node = start("0:0:stop", "1:0:late=1", "*:*:end", options=rendezvous(1, restarts=1))
    assert node.wait() == 0, node.said()
    assert lines(tmp_path / "0") == ["start 0", "ready", "SIGTERM", "saved", "start 1"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, PREEMPTED), (signal.SIGUSR1, PREEMPTED), (signal.SIGINT, INTERRUPTED)]
)
def test_signals_reach_every_process_each_time_they_come(start, tmp_path, number, code):
    node = start("*:*:stop=0.5,2", options=rendezvous(1, restarts=2))
    for received in range(2):
        for rank in ("0", "1"):
            wait_until(lambda rank=rank, n=received: len(lines(tmp_path / rank)) == 2 + n, f"process {rank}")
        node.signal(number)
    assert node.wait() == code, node.said()
    for rank in ("0", "1"):
        assert lines(tmp_path / rank) == ["start 0", "ready", number.name, number.name, "saved"]


def test_processes_whose_launcher_is_killed_save_and_leave(start, tmp_path):
    node = start("*:*:stop")
    ready(tmp_path)
    node.process.kill()
    node.process.join()
    for rank in ("0", "1"):
        wait_until(lambda rank=rank: lines(tmp_path / rank)[-1:] == ["saved"], f"process {rank}")
        # The system sends one signal for each thread of the launcher that takes the process over before it is gone as well.
        notes = lines(tmp_path / rank)
        assert [note for note in notes if note != "SIGTERM"] == ["start 0", "ready", "saved"]
        assert "SIGTERM" in notes


@pytest.mark.slow
def test_a_save_may_take_longer_than_torch_would_wait(start, tmp_path):
    node = start("*:*:stop=35")
    ready(tmp_path)
    node.signal(signal.SIGTERM)
    assert node.wait() == PREEMPTED, node.said()
    assert lines(tmp_path / "0")[-1] == lines(tmp_path / "1")[-1] == "saved"


@pytest.mark.slow
def test_one_process_may_save_long_after_another_has_left(start, tmp_path):
    """As an upload of process 0 does: the first exit must not end the others."""
    node = start("0:*:stop=3", "1:*:stop")
    ready(tmp_path)
    node.signal(signal.SIGUSR1)
    assert node.wait() == PREEMPTED, node.said()
    assert lines(tmp_path / "0")[-2:] == ["SIGUSR1", "saved"]


@pytest.mark.slow
def test_a_signal_while_processes_start_counts_as_preempted(start, tmp_path):
    node = start("*:*:deaf", options=rendezvous(1, restarts=3))
    ready(tmp_path)
    node.signal(signal.SIGUSR1)
    assert node.wait() == PREEMPTED, node.said()
    assert starts(tmp_path) == 1


@pytest.mark.slow
def test_a_signal_while_waiting_for_other_nodes_counts_as_preempted(start, tmp_path):
    node = start("*:*:end", options=rendezvous(2))
    time.sleep(8)  # somewhere on its way into the rendezvous; before it, the signal counts as well
    node.signal(signal.SIGTERM)
    assert node.wait() == PREEMPTED, node.said()
    assert not (tmp_path / "0").exists()


def test_a_signal_after_the_end_does_not_change_the_code(tmp_path):
    """srun sends SIGTERM to the other nodes as soon as one has exited with 75."""
    program = (
        "import os, signal, sys; from launch.elastic import StopRequests; from launch.agent import launch; "
        "code = launch(sys.argv[1:], StopRequests()); os.kill(os.getpid(), signal.SIGTERM); sys.exit(code)"
    )
    done = run_python("-c", program, *rendezvous(1), WORKER, str(tmp_path), "*:*:tell=75", check=False)
    assert done.returncode == PREEMPTED, done.stderr


@pytest.mark.slow
def test_a_process_that_dies_after_the_signal_is_not_started_again(start, tmp_path):
    """Its machine is about to be taken away: the scheduler starts the run again."""
    node = start("0:*:hang", "1:*:deaf", options=rendezvous(1, restarts=3))
    ready(tmp_path)
    node.signal(signal.SIGTERM)  # process 1 dies of it, process 0 never ends by itself
    assert node.wait() != 0, node.said()
    assert starts(tmp_path) == 1


# Two nodes


@pytest.mark.slow
def test_a_final_code_on_one_node_ends_the_other(start, tmp_path):
    options = rendezvous(2, restarts=2)
    first = start("3:*:tell=3", "*:*:late=1", options=options, name="first")
    second = start("3:*:tell=3", "*:*:late=1", options=options, name="second")
    assert (first.wait(), second.wait()) == (3, 3), first.said() + second.said()
    assert (first.said() + second.said()).count("process 3: code 3") == 1
    assert [starts(tmp_path, rank) for rank in range(4)] == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_node_that_is_preempted_takes_the_other_along(start, tmp_path):
    """Also before the first step, when processes cannot yet agree on anything."""
    options = rendezvous(2, restarts=2)
    nodes = [start("*:*:stop", options=options, name=name) for name in ("first", "second")]
    for rank in range(4):
        wait_until(lambda rank=rank: lines(tmp_path / str(rank))[-1:] == ["ready"], "ready")
    nodes[1].signal(signal.SIGUSR1)
    assert [node.wait() for node in nodes] == [PREEMPTED, PREEMPTED]
    assert sorted(lines(tmp_path / str(rank))[2] for rank in range(4)) == ["SIGTERM"] * 2 + ["SIGUSR1"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "peers", ["late=1", "stop"]
)  # they fail because it died, or notice nothing until they are stopped
def test_a_process_that_died_restarts_both_nodes_as_the_same_attempt(start, tmp_path, peers):
    options = rendezvous(2, restarts=1)
    plans = ("3:0:kill=9", f"*:0:{peers}", "*:*:end")
    nodes = [start(*plans, options=options, name=name) for name in ("first", "second")]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].said() + nodes[1].said()
    for rank in range(4):
        # Under this number processes of all nodes find each other (the store's prefix in torch's env:// rendezvous).
        assert [note for note in lines(tmp_path / str(rank)) if "start" in note] == ["start 0", "start 1"]


@pytest.mark.slow
def test_a_lost_node_that_comes_back_is_taken_up(start, tmp_path):
    options = rendezvous(2, restarts=1)
    plans = ("*:0:stop", "*:*:end")
    # The node with the rendezvous store must stay, as slurm.sh's first node: the other one is lost.
    first = start(*plans, options=[*options, "--rdzv_conf=is_host=1"], name="first")
    options += ["--rdzv_conf=is_host=0"]
    lost = start(*plans, options=options, name="second")
    for rank in range(4):
        wait_until(lambda rank=rank: lines(tmp_path / str(rank))[-1:] == ["ready"], "ready")
    lost.kill()
    again = start(*plans, options=options, name="third")
    assert (first.wait(), again.wait()) == (0, 0), first.said() + again.said()
    assert sorted(lines(tmp_path / str(rank))[-1] for rank in range(4)) == ["start 1"] * 4
