"""Exchanges of activations against plain torch."""

from __future__ import annotations

from support import fork_python


def test_gather_along_any_dimension_and_its_gradient(tmp_path):
    fork_python(tmp_path, "tests/parallel/gathering.py", processes=2)
