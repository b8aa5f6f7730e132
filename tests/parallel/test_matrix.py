"""Every layout is the same training: ten steps on two or four processes against one process, eager and unsharded."""

from __future__ import annotations

import pytest
import torch
from cells import CELLS, Cell
from layouts import Record, difference, flags, run, run_on
from support import quietly, write_documents

from train.config_sources import load_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the runs and a corpus of many short documents."""
    folder = tmp_path_factory.mktemp("matrix")
    write_documents(folder)
    return folder


@pytest.fixture(scope="module")
def references(folder):
    """What one process computes, by the settings that change what is computed."""
    found: dict[str, Record] = {}

    def reference(of_both: dict[str, object]) -> Record:
        key = str(of_both)
        if key not in found:
            arguments = settings(folder, f"reference-{len(found)}", of_both)
            quietly(load_config([], arguments, 1))
            found[key] = run(arguments)
        return found[key]

    return reference


def settings(folder, name: str, changes: dict[str, object]) -> list[str]:
    return flags(folder, folder, name, data__paths=f'["{folder}/document-*.txt"]', **changes)


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=cell.name, marks=[pytest.mark.slow] if cell.slow else []) for cell in CELLS]
)
def test_same_training(folder, references, cell: Cell):
    expected = references(cell.of_both)
    arguments = settings(folder, cell.name.replace(" ", "-").replace(",", ""), cell.of_both | cell.changes)
    found = run_on(cell.processes, folder, arguments)
    assert len(found.losses) == 10
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), f"{name} starts with other bits"
    assert found.losses == pytest.approx(expected.losses, abs=cell.loss)
    assert found.validation == pytest.approx(expected.validation, abs=cell.loss)
    first, largest, where = difference(expected, found)
    assert first < cell.first_gradient
    assert cell.gradient is None or largest < cell.gradient, where


def test_a_difference_is_seen(folder, references):
    """The comparison itself: a weight decay that is off by a little shows in gradients, another seed in everything."""
    expected = references({})
    other = run(settings(folder, "other", {"optimizer__weight_decay": 0.2}))
    first, largest, _ = difference(expected, other)
    assert first == 0.0
    assert largest > 5e-3
