"""Losses and gradients that are not finite, or leap."""

from __future__ import annotations

import math
import random

import pytest
import torch
from support import losses

from train.job import JobError
from train.spikes import FEWEST, Spikes


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the gradients of some steps infinite."""
    from parallel import gradients
    from train.trainer import Trainer

    clip, current = gradients.clip, []
    init = Trainer.__init__

    def noting(self, *args, **kwargs):
        current[:] = [self]
        init(self, *args, **kwargs)

    def arrange(*steps: int) -> None:
        def poison(parameters, *rest):
            parameters = list(parameters)
            if current[0].step + 1 in steps:
                parameters[0].grad.mul_(math.inf)
            return clip(parameters, *rest)

        monkeypatch.setattr(Trainer, "__init__", noting)
        monkeypatch.setattr(gradients, "clip", poison)

    return arrange


def test_a_run_stops_by_default(run_here, poisoned):
    poisoned(7)
    with pytest.raises(JobError, match=r"(?s)step 7 is not finite.*newcompute rows --run .*run --step STEP") as no:
        run_here()
    assert no.value.code == 3


def test_left_out_updates_change_nothing_and_are_counted(run_here, poisoned):
    """A step without its update gives the next one the same weights: their losses on equal rows are equal."""
    poisoned(7, 8)
    rows = run_here(faults__non_finite="skip", checkpoint__interval=0)
    left_out = [row for row in rows if row.get("event") == "skipped"]
    assert [row["step"] for row in left_out] == [7, 8]
    assert "rows are 48 to 55" in left_out[0]["message"]
    assert "2 in a row" in left_out[1]["message"]
    assert [step for step, _ in losses(rows)][-1] == 20
    assert losses(rows)[-1][1] < losses(rows)[0][1]


def test_the_weights_of_a_left_out_step_stay(run_here, poisoned, monkeypatch):
    from train.trainer import Trainer

    weights, train_step = {}, Trainer.train_step

    def noting(self, rows):
        weights[self.step] = torch.cat([p.detach().to_local().flatten().clone() for p in self.parameters()])
        return train_step(self, rows)

    monkeypatch.setattr(Trainer, "train_step", noting)
    poisoned(7)
    run_here(faults__non_finite="skip", training__steps=9, checkpoint__interval=0)
    assert torch.equal(weights[6], weights[7])
    assert not torch.equal(weights[7], weights[8])


def test_a_checkpoint_before_the_first_update_can_be_loaded(run_here, poisoned):
    poisoned(1, 2)
    skip = {"faults__non_finite": "skip", "checkpoint__interval": 1, "training__steps": 5}
    straight = run_here("straight", **skip)
    run_here("stopped", **skip, training__stop_after=2)
    rows = [row for row in run_here("stopped", **skip) if "loss" in row]
    assert losses(rows) == losses([row for row in straight if "loss" in row])


def test_too_many_in_a_row_stop_the_run(run_here, poisoned):
    poisoned(*range(5, 20))
    with pytest.raises(
        JobError, match=r"gradients of 4 steps in a row are not finite \(faults.max_skipped is 3\)"
    ) as no:
        run_here(faults__non_finite="skip", faults__max_skipped=3, checkpoint__interval=0)
    assert no.value.code == 3


def test_infinities_that_the_hardware_saturates_are_logged(run_here, monkeypatch):
    """The loss stays finite, so nothing else would tell."""
    from train.trainer import Trainer

    init = Trainer.__init__

    def with_infinities(self, *args, **kwargs):
        init(self, *args, **kwargs)

        def break_two_tokens(layer, inputs):
            x = inputs[0].clone()
            if self.step + 1 == 3 and layer.training:
                x[0, 1, 2] = x[1, 0, 0] = math.inf
            return (x,)

        layer = next(module for module in self.parts[0].modules() if hasattr(module, "input_effects"))
        layer.register_forward_pre_hook(break_two_tokens)

    monkeypatch.setattr(Trainer, "__init__", with_infinities)
    spec = '[{kind="quantise", weight={format="int8"}, input={format="int8"}}]'
    rows = run_here(transforms=spec, training__steps=5, checkpoint__interval=0)
    steps = [row for row in rows if "loss" in row]
    assert all(math.isfinite(row["loss"]) for row in steps)
    assert {row["step"]: row["non_finite_inputs"] for row in steps if "non_finite_inputs" in row} == {3: 2}
    (event,) = [row for row in rows if row.get("event") == "non_finite_inputs"]
    assert (event["step"], event["message"].startswith("2 rows")) == (3, True)


def test_spikes_are_flagged_and_noise_is_not():
    dice, spikes = random.Random(1), Spikes(6.0)
    assert not any(spikes.seen(3.0 + dice.gauss(0, 0.05)) for _ in range(5000))
    assert "loss 4.0000 is a spike" in spikes.seen(4.0)
    assert "loss 4.0000 is a spike" in spikes.seen(4.0), "the first one has not raised the bar"
    assert not spikes.seen(math.nan)
    early = Spikes(6.0)
    assert not any(early.seen(loss) for loss in [3.0] * (FEWEST - 1) + [9.0])
    off = Spikes(0.0)
    assert not any(off.seen(loss) for loss in [3.0] * 50 + [9.0])
