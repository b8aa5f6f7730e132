"""`launch/*.sh` under a real SLURM of two nodes on this machine: `make test-slurm` installs what it needs and runs this."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from cluster import lines, wait_until
from support import ROOT, fork_python, losses, read_metrics, run_python, tiny_flags

sys.path.append(str(Path(__file__).parent / "slurm"))
from real import DAEMONS, NODES, RealSlurm, executable

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not all(map(executable, DAEMONS)), reason="needs SLURM: make test-slurm"),
]
OPTIONS = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=30")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = RealSlurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.end()


def wait_until_ready(checkout: Path) -> None:
    for rank in range(4):
        wait_until(lambda rank=rank: lines(checkout / "notes" / str(rank))[-1:] == ["ready"], "ready")


def requeues(checkout: Path, job: str) -> list[str]:
    """Why a job was put back into the queue, each time."""
    return [line.split(": ", 1)[1] for line in lines(checkout / f"slurm-{job}.requeues")]


def test_a_run_ends_with_its_code_and_is_not_requeued(slurm, submit, checkout):
    job = submit("*:*:tell=3")
    assert slurm.wait(job) == ("FAILED", 3, 0), slurm.log(job)
    assert sum(line.startswith("newcompute: ") for line in slurm.log(job).splitlines()) == 1
    assert {(checkout / "notes" / str(rank)).exists() for rank in range(4)} == {True}


def test_the_signal_before_the_time_limit_requeues_the_job(slurm, submit, checkout):
    job = submit("*:0:stop", "*:*:end", options=("--time=2", "--signal=USR1@110"))
    slurm.release(job, 1)
    assert slurm.wait(job) == ("COMPLETED", 0, 1), slurm.log(job)
    assert requeues(checkout, job) == ["preempted"]


@pytest.mark.parametrize("options", [(), ("--full",)], ids=["to the steps", "to the script as well"])
def test_a_signal_to_every_process_of_the_job_is_one_preemption(slurm, submit, checkout, options):
    job = submit("*:0:stop=1", "*:*:end")
    wait_until_ready(checkout)
    slurm.signal(job, *options)
    slurm.release(job, 1)
    assert slurm.wait(job) == ("COMPLETED", 0, 1), slurm.log(job)
    for rank in range(4):
        notes = lines(checkout / "notes" / str(rank))
        assert [note for note in notes if note != "SIGUSR1"] == ["start 0", "ready", "saved", "start 1"]
    assert requeues(checkout, job) == ["preempted"]


def test_a_lost_launcher_ends_the_step_and_the_job_is_requeued(slurm, submit, checkout):
    job = submit("*:0:stop", "*:*:end")
    wait_until_ready(checkout)
    os.kill(slurm.processes(job, NODES[1], "launch.elastic")[0], signal.SIGKILL)
    slurm.release(job, 1)
    assert slurm.wait(job) == ("COMPLETED", 0, 1), slurm.log(job)
    assert requeues(checkout, job) == ["failed with exit code 137"]
    for rank in range(4):
        notes = lines(checkout / "notes" / str(rank))
        assert [note for note in notes if note != "SIGTERM"] == ["start 0", "ready", "saved", "start 1"]
        assert "SIGTERM" in notes


def test_a_lost_node_has_the_job_requeued_by_the_scheduler(slurm, submit, checkout):
    job = submit("*:0:stop", "*:*:end")
    wait_until_ready(checkout)
    slurm.lose_node(NODES[1])
    try:
        wait_until(lambda: slurm.read(job)["Restarts"] == "1", "requeue")
    finally:
        slurm.return_node(NODES[1])
    slurm.release(job, 1)
    assert slurm.wait(job) == ("COMPLETED", 0, 1), slurm.log(job)
    assert requeues(checkout, job) == []  # the script was ended before it could say why


def test_failures_are_requeued_only_so_often(slurm, submit, checkout):
    job = submit("*:*:exit=1", MAX_REQUEUES="1", MAX_RESTARTS="0")
    slurm.release(job, 1)
    assert slurm.wait(job) == ("FAILED", 1, 1), slurm.log(job)
    assert "after 1 requeues for failures: giving up" in slurm.log(job)
    assert requeues(checkout, job) == ["failed with exit code 1"]


def test_a_cancelled_job_saves_and_does_not_come_back(slurm, submit, checkout):
    job = submit("*:*:stop")
    wait_until_ready(checkout)
    slurm.cancel(job)
    state, _, restarts = slurm.wait(job)
    assert (state, restarts) == ("CANCELLED", 0), slurm.log(job)
    wait_until(lambda: "saved" in lines(checkout / "notes" / "0"), "saved", 60)
    assert requeues(checkout, job) == []


def test_each_task_of_an_array_runs_its_line(slurm, checkout):
    notes = checkout / "notes"
    (checkout / "runs.txt").write_text(f"# name  what\n\n'{notes}/first run' *:*:end\n{notes}/second *:*:tell=2\n")
    for name in ("first run", "second"):
        (notes / name).mkdir()
    options = ("--gpus-per-node=1", "--cpus-per-task=1", "--array=0-2", f"--output={slurm.folder}/%A_%a.log")
    job = slurm.sbatch(*options, "launch/array.sh", "runs.txt", cwd=checkout, PREFLIGHT="0")
    assert [slurm.wait(f"{job}_{task}")[1] for task in range(3)] == [0, 2, 2], slurm.log(f"{job}_0")
    assert lines(notes / "first run" / "0") == lines(notes / "second" / "0") == ["start 0"]
    assert "runs.txt has 2 runs" in slurm.log(f"{job}_2")


# The trainer itself


def curve(run: Path) -> dict[tuple[int, bool], float]:
    """Training and validation losses by step; a step must not be there twice."""
    rows = [row for row in read_metrics(run) if "loss" in row or "val_loss" in row]
    found = {(row["step"], "loss" in row): loss for row, (_, loss) in zip(rows, losses(rows), strict=True)}
    assert len(found) == len(rows), "a step is recorded twice"
    return found


def reached(run: Path, step: int) -> bool:
    file = run / "metrics.jsonl"
    if not file.exists():
        return False
    text = file.read_text()
    complete = text[: text.rfind("\n") + 1].splitlines()
    return any(f'"step": {number},' in line for line in complete[-5:] for number in range(step, step + 60))


def test_a_run_that_loses_a_worker_and_is_preempted_twice_has_the_uninterrupted_curve(slurm, tmp_path, text_corpus):
    """The worker is replaced within the job; after a preemption the job is requeued."""
    changes = {"training__steps": 100, "checkpoint__interval": 10, "validation__interval": 50, "checkpoint__keep": 3}
    run_python("launch/cli.py", "prepare", *tiny_flags(tmp_path, text_corpus, **changes))
    fork_python(tmp_path, "train/main.py", *tiny_flags(tmp_path, text_corpus, "straight", **changes), processes=4)

    run = tmp_path / "disturbed"
    job = slurm.sbatch(*OPTIONS, "launch/slurm.sh", *tiny_flags(tmp_path, text_corpus, "disturbed", **changes))
    try:
        wait_until(lambda: reached(run, 15), "step 15")
        # The launcher's command line names the script as well; workers are its children, and younger.
        os.kill(slurm.processes(job, NODES[0], "train/main.py")[-1], signal.SIGKILL)
        wait_until(lambda: "starting again from the latest checkpoint" in slurm.log(job), "restart")
        wait_until(lambda: slurm.log(job).count("resuming from") == 1, "resumed")
        for restarts, step, options in ((1, 30, ()), (2, 50, ("--full",))):
            wait_until(lambda step=step: reached(run, step), f"step {step}")
            slurm.signal(job, *options)
            slurm.release(job, restarts)
        assert slurm.wait(job) == ("COMPLETED", 0, 2), slurm.log(job)
        assert slurm.log(job).count("pre-flight check") == 3
        assert requeues(ROOT, job) == ["preempted", "preempted"]
    finally:
        (ROOT / f"slurm-{job}.requeues").unlink(missing_ok=True)
    assert curve(run) == curve(tmp_path / "straight")
