"""Every device gives the same training in every layout: processes, sharding, tensor, context and pipeline parallelism, resume.

Roundings carry the last place of a sum to a whole level, so losses agree less closely than without quantisers; the noise
itself is the same, which is what makes them agree at all: with another seed they differ by far more.
"""

from __future__ import annotations

import pytest
import torch
from devices import DEVICES, SHAPE
from safetensors.torch import load_file
from support import fork_python, quietly, read_metrics, tiny_flags

from train.config_sources import load_config
from train.export import export, open_trained
from train.job import run_job

STEPS = 3
TOLERANCE = 1e-5
"""Of a loss, relative."""


def train(folder, corpus, device: str, name: str = "run", processes: int = 1, **changes) -> tuple[list[float], dict]:
    """Training and validation losses of a run, and the ranges that it ends with."""
    settings = {
        "transforms": f"[{DEVICES[device]}]",
        "training__steps": STEPS,
        "schedule__warmup_steps": 1,
        "optimizer__lr": 3e-4,
        "checkpoint__interval": 2,
        "validation__interval": 3,
    }
    flags = tiny_flags(folder, corpus, name, **{**settings, **SHAPE, **changes})
    config = load_config([], flags, processes)
    quietly(config)
    if processes > 1:
        fork_python(folder, "train/main.py", *flags, processes=processes)
    else:
        run_job(config)
    rows = read_metrics(folder / name)
    found = [row["loss"] for row in rows if "loss" in row] + [row["val_loss"] for row in rows[-1:] if "val_loss" in row]
    return found, open_trained(folder / name).ranges()


@pytest.fixture(scope="module")
def references(tmp_path_factory, text_corpus):
    """(losses, ranges) by device, of one process, eager, whole batches; made when asked for."""
    made = {}

    def reference(device: str):
        if device not in made:
            made[device] = train(tmp_path_factory.mktemp(device), text_corpus, device)
        return made[device]

    return reference


def check(expected, found):
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


LAYOUTS = {
    "accumulated, recomputed": (1, {"training__micro_batch_size": 2, "activation_checkpointing__mode": "full"}),
    "FSDP 2": (2, {"parallel__shard": 2}),
    "TP 2": (2, {"parallel__tensor": 2}),
    "CP 2": (2, {"parallel__context": 2}),
    "PP 2": (2, {"parallel__pipeline": 2, "training__micro_batch_size": 2}),
    "TP 2 x FSDP 2": (4, {"parallel__tensor": 2, "parallel__shard": 2, "training__micro_batch_size": 2}),
    "TP 2 x CP 2": (4, {"parallel__tensor": 2, "parallel__context": 2}),
    "PP 2 x TP 2": (4, {"parallel__pipeline": 2, "parallel__tensor": 2, "training__micro_batch_size": 4}),
    "TP 2 compiled": (2, {"parallel__tensor": 2, "compile__enabled": "true", "compile__backend": "aot_eager"}),
}
FAST = {("optical", "TP 2"), ("optical", "CP 2"), ("optical", "PP 2"), ("b158", "TP 2"), ("learned", "TP 2"),
        ("optical", "accumulated, recomputed")}  # fmt: skip
EVERYWHERE = ("TP 2", "CP 2", "PP 2", "TP 2 x FSDP 2")
"""Layouts that every device goes through; the others are for those with the most state. Bit errors have test_layouts.py."""
CELLS = [
    pytest.param(device, layout, marks=[] if (device, layout) in FAST else pytest.mark.slow, id=f"{device}, {layout}")
    for device in DEVICES
    if device != "bitflip"
    for layout in LAYOUTS
    if layout in EVERYWHERE or device == "learned" or (device == "optical" and "compiled" not in layout)
]


@pytest.mark.parametrize(("device", "layout"), CELLS)
def test_same_training(references, tmp_path, text_corpus, device, layout):
    processes, changes = LAYOUTS[layout]
    check(references(device), train(tmp_path, text_corpus, device, processes=processes, **changes))


@pytest.mark.parametrize("device", ["optical", pytest.param("optical-tiled", marks=pytest.mark.slow)])
def test_other_noise_is_told_apart(references, tmp_path, text_corpus, device):
    """What the tolerance is worth."""
    expected, _ = references(device)
    found, _ = train(tmp_path, text_corpus, device, noise__seed=77)
    assert max(abs(a / b - 1) for a, b in zip(expected, found, strict=True)) > 3 * TOLERANCE


@pytest.mark.parametrize("device", ["learned", pytest.param("optical", marks=pytest.mark.slow)])
def test_resumed(references, tmp_path, text_corpus, device):
    train(tmp_path, text_corpus, device, training__stop_after=2)
    losses, ranges = train(tmp_path, text_corpus, device)
    expected = references(device)
    assert losses[-2:] == expected[0][-2:]
    assert all(torch.equal(ranges[name], value) for name, value in expected[1].items())


def test_a_clean_checkpoint_goes_on_under_a_device_and_back(tmp_path, text_corpus):
    clean = {"transforms": "[]", "training__stop_after": 2, "validation__interval": 2}
    train(tmp_path, text_corpus, "optical", **clean)
    onwards = {"checkpoint__resume": str(tmp_path / "run")}
    losses, ranges = train(tmp_path, text_corpus, "learned", "noisy", **onwards)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert ranges
    assert all(value > 0 for name, value in ranges.items() if name.endswith(".range"))
    back, none = train(
        tmp_path, text_corpus, "optical", "back", transforms="[]", training__steps=5,
        checkpoint__resume=str(tmp_path / "noisy"), validation__interval=5,
    )  # fmt: skip
    assert not none
    assert len(back) == 3


def test_an_export_brings_its_ranges(tmp_path, text_corpus):
    _, ranges = train(tmp_path, text_corpus, "optical")
    export(open_trained(tmp_path / "run"), tmp_path / "export")
    found = load_file(tmp_path / "export" / "transforms.safetensors")
    assert found.keys() == ranges.keys()
    assert all(torch.equal(found[name], value) for name, value in ranges.items())
