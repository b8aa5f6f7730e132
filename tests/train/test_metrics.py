"""W&B offline, TensorBoard, and the figures' arithmetic."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from models.sizes import SIZES, flops_per_token
from train.metrics import bits_per_byte, perplexity
from train.quiet import quiet_libraries
from train.trainer import Trainer


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


def test_rates_leave_out_the_step_that_compiled(run_here, capsys, monkeypatch):
    """With one slow first step in a run whose others take no time at all: the clock is the test's."""
    now = [0.0]
    monkeypatch.setattr("train.metrics.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *options, **named: None)
    monkeypatch.setattr(torch, "compile", lambda what=None, **named: what if what is not None else lambda f: f)
    train_step = Trainer.train_step

    def slow_first_step(self, rows):
        now[0] += 100.0 if self.step == 0 else 2.0
        return train_step(self, rows)

    monkeypatch.setattr(Trainer, "train_step", slow_first_step)
    rows = run_here(
        training__steps=20,
        training__stop_after=3,
        compile__enabled="true",
        checkpoint__interval=0,
        validation__interval=0,
    )
    assert [row["tokens_per_second"] for row in rows] == [None, 8 * 64 / 2, 8 * 64 / 2]
    said = capsys.readouterr().out
    assert said.index("compiling: the first step") < said.index("compiled: the first step took 100 s")
    assert said.index("compiled: the first") < said.index("step 1/20")


def test_without_compilation_nothing_is_said_of_it(run_here, capsys):
    rows = run_here(training__steps=20, training__stop_after=1, checkpoint__interval=0, validation__interval=0)
    assert rows[0]["tokens_per_second"] > 0
    assert "the first step" not in capsys.readouterr().out


def test_requests_that_are_tried_again_are_told_once(capsys):
    quiet_libraries()
    hub, passed = logging.getLogger("huggingface_hub.utils._http"), []
    handler = logging.Handler()
    handler.emit = passed.append
    hub.addHandler(handler)
    try:
        for number in range(3):
            hub.warning("'(ReadTimeout)' thrown while requesting GET https://huggingface.co/api")
            hub.warning(f"Retrying in 1s [Retry {number}/5].")
        hub.error("no such repository")
    finally:
        hub.removeHandler(handler)
    assert capsys.readouterr().err.count("the Hugging Face Hub does not answer; trying again") == 1
    assert [record.getMessage() for record in passed] == ["no such repository"]
