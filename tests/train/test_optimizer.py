"""The learning rate at points worked out by hand and against torch's schedulers; AdamW against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from models.llama import Llama
from models.sizes import LlamaShape
from train.config import OptimizerConfig, ScheduleConfig
from train.optimizer import build_optimizer, decays, learning_rate, materialise_state

SHAPE = LlamaShape(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=24, vocab_size=128, max_context=8)


def rates(total: int, peak: float = 1.0, **schedule) -> list[float]:
    return [learning_rate(step, total, peak, ScheduleConfig(**schedule)) for step in range(total)]


# The schedule


@pytest.mark.parametrize(
    ("schedule", "total", "points"),
    [
        # Warm-up 1/4, 2/4, 3/4, 1; ten steps from 1 to 0.1, half way at 0.55.
        ({"name": "linear"}, 14, {0: 0.25, 1: 0.5, 3: 1.0, 4: 0.91, 8: 0.55, 13: 0.1}),
        ({"name": "cosine"}, 14, {0: 0.25, 3: 1.0, 4: 0.1 + 0.45 * (1 + math.cos(0.1 * math.pi)), 8: 0.55, 13: 0.1}),
        # The last 20 % of 20 steps: from 1 at step 15 over 0.775, 0.55, 0.325 to 0.1.
        ({"name": "wsd"}, 20, {0: 0.25, 3: 1.0, 4: 1.0, 15: 1.0, 16: 0.775, 17: 0.55, 18: 0.325, 19: 0.1}),
        ({"name": "wsd", "decay_fraction": 1.0}, 14, {3: 1.0, 4: 0.91, 13: 0.1}),  # warm-up and decay meet
        ({"name": "wsd", "decay_fraction": 0.0}, 14, {3: 1.0, 12: 1.0, 13: 1.0}),
        ({"name": "linear", "warmup_steps": 0}, 10, {0: 0.91, 4: 0.55, 9: 0.1}),
        ({"name": "cosine", "min_lr_ratio": 0.0}, 14, {3: 1.0, 8: 0.5, 13: 0.0}),
        ({"name": "cosine", "min_lr_ratio": 1.0}, 14, {3: 1.0, 8: 1.0, 13: 1.0}),
        # Six steps from 1 to 0.5, then ten from 0.3 to 0.1.
        (
            {"name": "two_stage", "first_stage_end": 0.5, "second_stage_start": 0.3},
            20,
            {3: 1.0, 4: 1 - 0.5 / 6, 9: 0.5, 10: 0.3, 13: 0.3 - 0.2 / 3, 19: 0.1},
        ),
        ({"name": "linear", "warmup_steps": 5}, 5, {0: 0.2, 4: 1.0}),  # nothing but warm-up
        ({"name": "cosine", "warmup_steps": 0}, 1, {0: 0.1}),
    ],
)
def test_rates_worked_out_by_hand(schedule, total, points):
    values = rates(total, **{"warmup_steps": 4, "min_lr_ratio": 0.1, **schedule})
    for step, expected in points.items():
        assert values[step] == pytest.approx(expected, abs=1e-12), step


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_decay_is_that_of_torchs_scheduler(name):
    warmup, total, peak = 7, 60, 3e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    if name == "cosine":
        scheduler = CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=0.05 * peak)
    else:
        scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.05, total_iters=total - warmup)
    values = rates(total, peak, name=name, warmup_steps=warmup, min_lr_ratio=0.05)
    for step in range(warmup - 1, total):
        assert values[step] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "two_stage"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 50), (1, 50), (10, 50), (50, 50), (45, 50)])
def test_every_schedule_moves_first_rises_to_the_peak_and_falls(name, warmup, total):
    values = rates(total, 2e-3, name=name, warmup_steps=warmup)
    assert values[0] > 0
    assert max(values) <= 2e-3
    if warmup:
        assert values[warmup - 1] == 2e-3
        assert values[:warmup] == sorted(values[:warmup])
    tail = values[max(0, warmup - 1) :]
    assert tail == sorted(tail, reverse=True)
    if total > warmup:
        assert values[-1] == pytest.approx(2e-4)
    assert learning_rate(total + 5, total, 2e-3, ScheduleConfig(name=name, warmup_steps=warmup)) <= values[-1]


# The optimizer


def names_by_decay(model: Llama) -> tuple[set[str], set[str]]:
    with_decay = {name for name, parameter in model.named_parameters() if decays(name, parameter)}
    return with_decay, {name for name, _ in model.named_parameters()} - with_decay


def test_matrices_decay_and_norms_and_embedding_do_not():
    layer = "model.layers.0"
    attention = {f"{layer}.self_attn.{part}_proj.weight" for part in "qkvo"}
    mlp = {f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    with_decay, without = names_by_decay(Llama(SHAPE))
    assert with_decay == attention | mlp | {"lm_head.weight"}
    norms = {f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight", "model.norm.weight"}
    assert without == norms | {"model.embed_tokens.weight"}
    assert not decays("model.layers.0.self_attn.q_proj.bias", torch.nn.Parameter(torch.zeros(4)))


def test_every_parameter_is_in_one_group_with_its_decay():
    model = Llama(SHAPE)
    optimizer = build_optimizer([model], OptimizerConfig(weight_decay=0.3))
    with_decay, _ = names_by_decay(model)
    grouped = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(grouped)
    assert grouped == {id(p): 0.3 if name in with_decay else 0.0 for name, p in model.named_parameters()}


def test_steps_are_those_of_the_adamw_formula():
    """Loshchilov and Hutter (arXiv 1711.05101), algorithm 2, in double precision, for a matrix and a norm."""
    torch.manual_seed(0)
    model = Llama(SHAPE)
    config = OptimizerConfig(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer([model], config)
    decay_of = {"model.layers.0.mlp.up_proj.weight": 0.2, "model.norm.weight": 0.0}
    watched = {name: parameter for name, parameter in model.named_parameters() if name in decay_of}
    expected = {name: parameter.detach().double() for name, parameter in watched.items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for t, rate in enumerate([0.01, 0.03, 0.002], start=1):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name, parameter in watched.items():
            gradient = parameter.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            step = (first[name] / (1 - 0.8**t)) / ((second[name] / (1 - 0.9**t)).sqrt() + 1e-6)
            expected[name] = expected[name] - rate * (step + decay_of[name] * expected[name])
            torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=0, atol=1e-6)


def trained(model: Llama, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step()


def test_materialising_the_state_changes_no_weight():
    model = Llama(SHAPE)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer([model], OptimizerConfig(lr=0.5))
    materialise_state(optimizer)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None
        state = optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_a_state_loaded_into_materialised_tensors_goes_on_exactly():
    torch.manual_seed(0)
    straight, resumed = Llama(SHAPE), Llama(SHAPE)
    optimizer = build_optimizer([straight], OptimizerConfig())
    trained(straight, optimizer, range(3))
    other = build_optimizer([resumed], OptimizerConfig())
    materialise_state(other)
    with torch.no_grad():
        for mine, theirs in zip(straight.parameters(), resumed.parameters(), strict=True):
            theirs.copy_(mine)
            for key, value in optimizer.state[mine].items():
                other.state[theirs][key].copy_(value)
    trained(straight, optimizer, range(3, 6))
    trained(resumed, other, range(3, 6))
    for mine, theirs in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)
