"""W&B offline, TensorBoard, and the figures' arithmetic."""

from __future__ import annotations

import math

import pytest

from models.sizes import SIZES, flops_per_token
from train.metrics import bits_per_byte, perplexity


def test_bits_per_byte_of_a_fair_coin():
    # One bit per token and two tokens per byte are two bits per byte.
    assert bits_per_byte(math.log(2), 2.0) == pytest.approx(2.0)
    assert perplexity(math.log(7)) == pytest.approx(7.0)


def test_flops_per_token_by_hand():
    shape = SIZES["clm"]["60M"]
    per_layer = 2 * 384 * 384 + 2 * 384 * 128 + 3 * 384 * 1408
    products = 22 * per_layer + 49_152 * 384
    norms = 22 * 2 * 384 + 384
    assert flops_per_token(shape, 2048) == 6 * (products + norms) + 12 * 22 * 384 * 2048


@pytest.mark.slow
def test_wandb_offline_and_tensorboard_hold_every_logged_step(run_here, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_here(training__stop_after=3, metrics__wandb="true", metrics__tensorboard="true")
    rows = run_here(training__steps=20, training__stop_after=6, metrics__wandb="true", metrics__tensorboard="true")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    seen = {event.step: event.value for event in events.Scalars("loss")}
    for row in rows:
        if "loss" in row:
            assert seen[row["step"]] == pytest.approx(row["loss"], rel=1e-6)
