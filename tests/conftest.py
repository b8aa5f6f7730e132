"""Shared fixtures: the real inputs beside a checkout, and small prepared corpora."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_INPUTS = ROOT.parent / "shared" / "data"

# Tests never reach for the network, and a few threads per process keep two-process tests from fighting for cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def real_inputs() -> Path:
    """A folder with a pretrained model, the Llama-3 tokenizer and text, which is not part of the project."""
    if not REAL_INPUTS.is_dir():
        pytest.skip(f"needs the real inputs in {REAL_INPUTS}")
    return REAL_INPUTS


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory) -> Path:
    """A folder with one text file of about 200 kB, the source text of a few standard modules."""
    import argparse
    import inspect
    import typing

    folder = tmp_path_factory.mktemp("corpus")
    text = "\n".join(inspect.getsource(module) for module in (argparse, inspect, typing))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    return folder


def run_python(*arguments: str, check: bool = True, processes: int = 1, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the project, under torchrun with several processes; output is captured as text."""
    command = [sys.executable, *arguments]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
