"""`launch/*.sh` under a stand-in SLURM, for what must be fast; the rest is `test_real_slurm.py`'s.

Launchers and processes are real, one "node" per address of the loopback interface.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest
from cluster import Slurm, lines, wait_until
from support import ROOT

OPTIONS = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=1")
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN_SLURM", str(tmp_path / "slurm"))
    cluster = Slurm(tmp_path)
    yield cluster
    cluster.end()
    for job in cluster.jobs:
        (ROOT / f"slurm-{job}.requeues").unlink(missing_ok=True)


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
