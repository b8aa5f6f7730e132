"""`launch/*.sh` under a stand-in SLURM: real launchers and processes, one "node" per address of the loopback interface."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import WORKER, Slurm, lines, wait_until
from support import ROOT, fork_python, losses, read_metrics, run_python, tiny_flags

NODES = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=1")
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN_SLURM", str(tmp_path / "slurm"))
    cluster = Slurm(tmp_path)
    yield cluster
    cluster.end()
    for job in cluster.jobs:
        (ROOT / f"slurm-{job}.requeues").unlink(missing_ok=True)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The launch scripts in a folder whose `train/main.py` is the stand-in for a run."""
    folder = tmp_path / "checkout"
    for name in ("launch", "train", "models", "transforms"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = Path(WORKER).read_text().replace("parents[2]", "parents[1]")
    (folder / "train" / "main.py").write_text(text)
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def submit(slurm, checkout):
    """Submit `slurm.sh` with plans of `worker.py`, without the check of the hardware."""

    def submit(*plans: str, options: tuple[str, ...] = (), **environment: str) -> str:
        words = (*NODES, *options, "launch/slurm.sh", str(checkout / "notes"), *plans)
        return slurm.sbatch(*words, cwd=checkout, **({"PREFLIGHT": "0"} | environment))

    return submit


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_scripts_are_sound_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_a_run_ends_with_its_code_and_is_not_requeued(slurm, submit, checkout):
    job = submit("*:*:tell=3")
    record = slurm.wait(job)
    assert (record["state"], record["code"], record["starts"]) == ("FAILED", 3, 1), slurm.log(job)
    assert slurm.log(job).count("code 3") == 1
    assert {(checkout / "notes" / str(rank)).exists() for rank in range(4)} == {True}


@pytest.mark.slow  # the signal comes after 15 s; the same by hand follows
def test_the_signal_before_the_time_limit_requeues_the_job(slurm, submit):
    job = submit("*:0:stop", "*:*:end", options=("--time=5:00", "--signal=USR1@285"))  # after 15 s
    record = slurm.wait(job)
    assert (record["state"], record["starts"]) == ("COMPLETED", 2), slurm.log(job)
    assert "preempted: back into the queue" in slurm.log(job)


def test_a_signal_to_every_process_of_the_job_is_one_preemption(slurm, submit, checkout):
    """Both SLURM and the launcher signal a process, which may hear the second when it has already left."""
    job = submit("*:0:stop=1", "*:*:end")
    for rank in range(4):
        wait_until(lambda rank=rank: lines(checkout / "notes" / str(rank))[-1:] == ["ready"], "ready")
    slurm.signal(job)
    record = slurm.wait(job)
    assert (record["state"], record["starts"]) == ("COMPLETED", 2), slurm.log(job)
    for rank in range(4):
        notes = lines(checkout / "notes" / str(rank))
        assert [note for note in notes if note != "SIGUSR1"] == ["start 0", "ready", "saved", "start 1"]
        assert "SIGUSR1" in notes


@pytest.mark.slow
def test_a_lost_node_ends_the_step_and_the_job_is_requeued(slurm, submit, checkout):
    job = submit("*:0:stop", "*:*:end")
    for rank in range(4):
        wait_until(lambda rank=rank: lines(checkout / "notes" / str(rank))[-1:] == ["ready"], "ready")
    slurm.kill_node(job, 1)
    record = slurm.wait(job)
    assert (record["state"], record["starts"]) == ("COMPLETED", 2), slurm.log(job)


@pytest.mark.slow
def test_failures_are_requeued_only_so_often(slurm, submit):
    job = submit("*:*:exit=1", MAX_REQUEUES="1", MAX_RESTARTS="0")
    record = slurm.wait(job)
    assert (record["state"], record["code"], record["starts"]) == ("FAILED", 1, 2), slurm.log(job)
    assert "after 1 requeues for failures: giving up" in slurm.log(job)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_does_not_come_back(slurm, submit, checkout):
    job = submit("*:*:stop")
    for rank in range(4):
        wait_until(lambda rank=rank: lines(checkout / "notes" / str(rank))[-1:] == ["ready"], "ready")
    slurm.cancel(job)
    record = slurm.wait(job)
    assert (record["state"], record["starts"]) == ("CANCELLED", 1), slurm.log(job)
    assert "saved" in lines(checkout / "notes" / "0")


@pytest.mark.slow
def test_each_task_of_an_array_runs_its_line(slurm, checkout):
    notes = checkout / "notes"
    runs = checkout / "runs.txt"
    runs.write_text(f"# name  what\n\n'{notes}/first run' *:*:end\n{notes}/second *:*:tell=2\n")
    for name in ("first run", "second"):
        (notes / name).mkdir()
    options = ("--gpus-per-node=1", "--array=0-2")
    first = slurm.sbatch(*options, "launch/array.sh", "runs.txt", cwd=checkout, PREFLIGHT="0")
    jobs = [str(int(first) + task) for task in range(3)]
    slurm.jobs += jobs
    assert [slurm.wait(job)["code"] for job in jobs] == [0, 2, 2], slurm.log(jobs[0])
    assert lines(notes / "first run" / "0") == lines(notes / "second" / "0") == ["start 0"]
    assert "runs.txt has 2 runs" in slurm.log(jobs[2])


# The trainer itself


def curve(run: Path) -> dict[tuple[int, bool], float]:
    """Training and validation losses by step; a step must not be there twice."""
    rows = [row for row in read_metrics(run) if "loss" in row or "val_loss" in row]
    found = {(row["step"], "loss" in row): loss for row, (_, loss) in zip(rows, losses(rows), strict=True)}
    assert len(found) == len(rows), "a step is recorded twice"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def training(folder, text_corpus):
    """Flags of a run long enough to be interrupted, by name; its text is prepared."""
    changes = {"training__steps": 150, "checkpoint__interval": 10, "validation__interval": 50, "checkpoint__keep": 3}
    run_python("launch/cli.py", "prepare", *tiny_flags(folder, text_corpus, **changes))
    return lambda name: tiny_flags(folder, text_corpus, name, **changes)


def reached(run: Path, step: int) -> bool:
    file = run / "metrics.jsonl"
    if not file.exists():
        return False
    text = file.read_text()
    complete = text[: text.rfind("\n") + 1].splitlines()
    return any(f'"step": {number},' in line for line in complete[-5:] for number in range(step, step + 60))


@pytest.fixture(scope="module")
def uninterrupted(folder, training) -> dict[tuple[int, bool], float]:
    fork_python(folder, "train/main.py", *training("straight"), processes=4)
    return curve(folder / "straight")


@pytest.mark.slow
def test_a_run_that_loses_a_process_and_a_node_and_is_preempted_twice_has_the_uninterrupted_curve(
    slurm, training, uninterrupted, folder
):
    """The process is replaced within the job; after a preemption and for a lost node the job is requeued."""
    run = folder / "disturbed"
    job = slurm.sbatch(*NODES, "launch/slurm.sh", *training("disturbed"))
    wait_until(lambda: reached(run, 15), "step 15")
    step = (slurm.folder / job / "step").read_text()
    workers = [pid for pid in slurm.standin.processes(f"{job}/{step}/0.") if is_worker(pid)]
    subprocess.run(["kill", "-9", str(workers[-1])], check=True)
    wait_until(lambda: "starting again from the latest checkpoint" in slurm.log(job), "restart")
    wait_until(lambda: slurm.log(job).count("resuming from") == 1, "resumed")
    for start, step in ((1, 40), (2, 70)):
        wait_until(lambda step=step: reached(run, step), f"step {step}")
        slurm.signal(job)
        wait_until(lambda start=start: slurm.read(job)["starts"] == start + 1, "requeue")
    wait_until(lambda: reached(run, 100), "step 100")
    slurm.kill_node(job, 1)
    record = slurm.wait(job)
    assert (record["state"], record["starts"]) == ("COMPLETED", 4), slurm.log(job)
    assert slurm.log(job).count("pre-flight check") == 4
    reasons = (ROOT / f"slurm-{job}.requeues").read_text().splitlines()
    assert [reason.split(": ")[1].split()[0] for reason in reasons] == ["preempted", "preempted", "failed"]
    assert curve(run) == uninterrupted


def is_worker(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"train/main.py" in words and b"launch.elastic" not in words
