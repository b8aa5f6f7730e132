"""Help of the training command."""

from __future__ import annotations

import os
import subprocess
import sys

from support import ROOT


def test_help_for_a_reader_who_has_had_enough():
    """As in `python train/main.py --help optimizer | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "train/main.py", "--help", "optimizer"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
