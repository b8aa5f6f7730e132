"""A checkpoint knows nothing of the layout: saved on one, resumed on any other, nothing is lost or repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import Record, flags, run, run_on
from support import quietly

from train.config_sources import load_config

STEPS, SAVED = 8, 4
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one process": (1, {}),
    "FSDP 2": (2, {"parallel__shard": 2}),
    "TP 2": (2, {"parallel__tensor": 2}),
    "FSDP 4": (4, {"parallel__shard": 4}),
    "PP 2": (2, {"parallel__pipeline": 2, "training__micro_batch_size": 2}),
    "PP 2 x TP 2": (4, {"parallel__pipeline": 2, "parallel__tensor": 2, "training__micro_batch_size": 2}),
}
# Every way to divide a model is left once and taken up once; the other pairs, and those of four processes, are slow.
FAST = {("one process", "FSDP 2"), ("FSDP 2", "TP 2"), ("TP 2", "PP 2"), ("PP 2", "one process")}
PAIRS = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b]


@pytest.fixture(scope="module")
def train(tmp_path_factory, text_corpus):
    """Train on a layout; keyword arguments change settings."""
    folder = tmp_path_factory.mktemp("resume")

    def on(layout: str, name: str, **changes: object) -> tuple[Record, str]:
        processes, degrees = LAYOUTS[layout]
        given = {"training__steps": STEPS, "validation__interval": 0, **degrees, **changes}
        arguments = flags(folder, text_corpus, name.replace(" ", "-"), data__dir=folder / "data", **given)
        if processes == 1:
            quietly(load_config([], arguments, 1))
            return run(arguments), str(folder / name.replace(" ", "-"))
        return run_on(processes, folder, arguments), str(folder / name.replace(" ", "-"))

    return on


@pytest.fixture(scope="module")
def straight(train):
    """One process, without a stop."""
    return train("one process", "straight")[0]


@pytest.fixture(scope="module")
def saved(train, straight):
    """(record, run folder) of each layout, stopped in the middle."""
    found: dict[str, tuple[Record, str]] = {}

    def on(layout: str) -> tuple[Record, str]:
        if layout not in found:
            how = {"training__stop_after": SAVED, "checkpoint__interval": SAVED}
            found[layout] = train(layout, f"saved on {layout}", **how)
        return found[layout]

    return on


@pytest.mark.parametrize(
    ("first", "second"),
    [pytest.param(*pair, id=" to ".join(pair), marks=[] if pair in FAST else [pytest.mark.slow]) for pair in PAIRS],
)
def test_resumed_on_another_layout(train, saved, straight, first, second):
    before, folder = saved(first)
    after, _ = train(second, f"{first} to {second}", checkpoint__resume=folder)
    assert after.loaded.keys() == before.final.keys()
    assert len(after.loaded) == 4 * len(after.weights), "weights, two moments and a step count each"
    for name, tensor in before.final.items():
        assert torch.equal(after.loaded[name], tensor), f"{name} has other bits"
    assert any(not torch.equal(after.weights[name], after.loaded[name]) for name in after.weights), "nothing was loaded"
    assert before.losses + after.losses == pytest.approx(straight.losses, abs=2e-5)
    assert not before.rows.keys() & after.rows.keys()
    assert before.rows | after.rows == straight.rows
    assert len(straight.rows) == STEPS * 8


def test_export_from_a_pipeline_of_split_matrices(saved, tmp_path):
    """An export is made from the checkpoint alone: it has what the four devices held together."""
    from safetensors.torch import load_file

    from train.export import export, open_trained

    record, folder = saved("PP 2 x TP 2")
    export(open_trained(Path(folder)), tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == record.weights.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, record.final[name][: len(tensor)]), name
