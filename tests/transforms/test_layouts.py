"""The same bits flip in every layout: processes, sharding, accumulation, recomputation, compilation, resume."""

from __future__ import annotations

import pytest
from record_flips import Flips, Recorder
from support import ROOT, fork_python, quietly, read_metrics, tiny_flags

from train.config_sources import load_config
from train.job import run_job

DENSE = "{ bits = [0.004, 0, 0, 0, 0, 0, 0, 0, 0, 0.004, 0.004, 0.004, 0.004, 0.004, 0.004, 0.002], zero_above = 30.0 }"
CHUNK = (
    "{ bits = [0.001, 0, 0, 0, 0, 0, 0, 0, 0, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.0005], zero_above = 30.0 }"
)
STEPS = 3


def flags_of(changes: dict) -> dict:
    transforms = f'[{{ kind = "bitflip", weight = {DENSE}, input = {CHUNK} }}]'
    return {
        "transforms": transforms,
        "training__steps": STEPS,
        "schedule__warmup_steps": 1,
        "checkpoint__interval": 2,
        "validation__interval": 3,
    } | changes


@pytest.fixture(scope="module")
def reference(tmp_path_factory, text_corpus):
    """(flips, losses) of one process, eager, whole batches."""
    return record(tmp_path_factory.mktemp("reference"), text_corpus)


def record(folder, corpus, name: str = "run", processes: int = 0, **changes):
    """(flips, training losses and the last validation loss) of a run, in this process or under torchrun."""
    flags = tiny_flags(folder, corpus, name, **flags_of(changes))
    config = load_config([], flags, processes or 1)
    quietly(config)
    if processes:
        script = str(ROOT / "tests" / "transforms" / "record_flips.py")
        fork_python(folder, script, str(folder / "flips"), *flags, processes=processes)
        flips = Flips()
        for rank in range(processes):
            flips.merge(str(folder / f"flips-{rank}.pt"))
    else:
        with Recorder() as recorder:
            run_job(config)
        flips = recorder.flips
    rows = read_metrics(folder / name)
    return flips.digests(), [*(row["loss"] for row in rows if "loss" in row), rows[-1]["val_loss"]]


def test_reference_covers_every_layer_step_and_row(reference):
    flips, _ = reference
    training = set(flips)
    weights, rows = [w for w in training if "group" in w], [w for w in training if "row" in w]
    # 14 linear layers; 3 steps of training and the validation at step 0 of its own seed space.
    assert len(weights) == 14 * (STEPS + 1)
    assert len(rows) == 14 * (STEPS * 8 + 2 * 8)
    assert len(set(flips.values())) == len(flips), "two draws are equal"


# Compiled runs have batches of 4 rows, also the two processes: one shape, one compilation (a minute where none is cached).
@pytest.mark.parametrize(
    "changes",
    [
        {"training__micro_batch_size": 2},
        {"activation_checkpointing__mode": "full"},
        {"activation_checkpointing__mode": "selective", "training__micro_batch_size": 4},
        pytest.param({"compile__enabled": "true", "training__micro_batch_size": 4}, marks=pytest.mark.slow),
        pytest.param(
            {"compile__enabled": "true", "activation_checkpointing__mode": "full", "training__micro_batch_size": 4},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "compile__enabled": "true",
                "activation_checkpointing__mode": "selective",
                "compile__backend": "aot_eager",
                "training__micro_batch_size": 4,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["accumulated", "recomputed", "partly recomputed", "compiled", "compiled recomputed", "compiled selective"],
)
def test_one_process(reference, tmp_path, text_corpus, changes):
    check(reference, record(tmp_path, text_corpus, **changes))


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {"parallel__shard": 2, "activation_checkpointing__mode": "full", "training__micro_batch_size": 2}),
        pytest.param(
            2,
            {"parallel__shard": 2, "compile__enabled": "true", "parallel__reshard_after_forward": "true"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            {"parallel__shard": 2, "parallel__replicate": 2, "activation_checkpointing__mode": "selective"},
            marks=pytest.mark.slow,
        ),
        pytest.param(4, {"parallel__shard": 4}, marks=pytest.mark.slow),
        (2, {"parallel__tensor": 2}),
        pytest.param(2, {"parallel__tensor": 2, "activation_checkpointing__mode": "full"}, marks=pytest.mark.slow),
        pytest.param(
            2,
            {"parallel__tensor": 2, "compile__enabled": "true", "compile__backend": "aot_eager"},
            marks=pytest.mark.slow,
        ),
        (2, {"parallel__context": 2}),
        (2, {"parallel__pipeline": 2, "training__micro_batch_size": 2}),
        pytest.param(
            2,
            {
                "parallel__pipeline": 2,
                "training__micro_batch_size": 4,
                "activation_checkpointing__mode": "full",
                "parallel__pipeline_schedule": "1f1b",
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4, {"parallel__tensor": 2, "parallel__shard": 2, "training__micro_batch_size": 2}, marks=pytest.mark.slow
        ),
        pytest.param(4, {"parallel__tensor": 2, "parallel__context": 2}, marks=pytest.mark.slow),
        pytest.param(
            4, {"parallel__pipeline": 2, "parallel__tensor": 2, "training__micro_batch_size": 4}, marks=pytest.mark.slow
        ),
    ],
    ids=[
        "FSDP 2",
        "FSDP 2 compiled",
        "HSDP 2 x 2",
        "FSDP 4",
        "TP 2",
        "TP 2 recomputed",
        "TP 2 compiled",
        "CP 2",
        "PP 2",
        "PP 2 recomputed",
        "TP 2 x FSDP 2",
        "TP 2 x CP 2",
        "PP 2 x TP 2",
    ],
)
def test_several_processes(reference, tmp_path, text_corpus, processes, changes):
    check(reference, record(tmp_path, text_corpus, processes=processes, **changes))


@pytest.mark.slow
def test_resumed(reference, tmp_path, text_corpus):
    first, _ = record(tmp_path, text_corpus, training__stop_after=2)
    second, found = record(tmp_path, text_corpus)
    trained_twice = {where for where in first.keys() & second.keys() if "step 0" not in where}
    assert not trained_twice, "the resumed run repeats a step"
    check(reference, (first | second, found))


def check(reference, found):
    flips, expected = reference
    differing = [where for where in flips if found[0].get(where) != flips[where]]
    assert not differing, f"{len(differing)} of {len(flips)} draws differ, first {differing[0]}"
    assert found[0].keys() == flips.keys()
    assert found[1] == pytest.approx(expected, abs=2e-5)
