"""What tests of `launch/slurm.sh` share, under whichever SLURM their file's fixture `slurm` is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cluster import WORKER
from support import ROOT


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The launch scripts in a folder whose `train/main.py` is the stand-in for a run."""
    folder = tmp_path / "checkout"
    for name in ("launch", "train", "models", "transforms"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "train" / "main.py").write_text(Path(WORKER).read_text().replace("parents[2]", "parents[1]"))
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def submit(request, slurm, checkout):
    """Submit `slurm.sh` with the file's `OPTIONS` and plans of `worker.py`, without the check of the hardware."""

    def submit(*plans: str, options: tuple[str, ...] = (), **environment: str) -> str:
        words = (*request.module.OPTIONS, *options, "launch/slurm.sh", str(checkout / "notes"), *plans)
        return slurm.sbatch(*words, cwd=checkout, **({"PREFLIGHT": "0"} | environment))

    return submit
