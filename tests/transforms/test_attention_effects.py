"""Attention on hardware against plain torch: forward, straight-through gradients, ranges, and who may act on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.llama import Llama
from models.sizes import LlamaShape
from transforms import attention
from transforms.apply import TransformError, apply, remove
from transforms.specs import OpticalSpec, Quantised, QuantiseSpec

SHAPE = LlamaShape(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=64, max_context=32)
OPTICAL = OpticalSpec(kind="optical", levels=32, rounding="nearest")
INT8 = QuantiseSpec(kind="quantise", attention=Quantised(format="int8"))


def effects(spec=OPTICAL, clip: float = 0.7):
    """The effects of one attention of a tiny model; ranges a part of what random operands need, so that some are clipped."""
    model = Llama(SHAPE, context=32)
    noise = apply(model, [spec], seed=0)
    noise.begin(3, 0, torch.device("cpu"))
    for name, range_ in noise.ranges.items():
        range_.used.fill_(clip * (8.0 if "scores" in name else 2.5))
    return noise, model.model.layers["0"].self_attn.attend.attention_effects


def operands(length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8))
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def straight_through(value: Tensor, range_: float, levels: int, signed: bool = True) -> Tensor:
    step = range_ / levels
    rounded = torch.round((value / step).clamp(-levels if signed else 0, levels)) * step
    inside = value.abs() <= range_
    return torch.where(inside, value + (rounded - value).detach(), rounded.detach())


def written_out(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, clip: float = 0.7) -> Tensor:
    """Optical attention of 32 levels (15 on each side; P 31) in plain torch."""
    r = clip * 2.5
    q, k, v = (straight_through(value, r, 15) for value in (q, k, v))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = straight_through(q @ k.transpose(-1, -2), clip * 8.0, 15) / 8**0.5
    probabilities = torch.softmax(scores.masked_fill(hidden, torch.finfo(torch.float32).min), -1)
    return straight_through(straight_through(probabilities, 1.0, 31, signed=False) @ v, r, 15)


MASKS = {
    "causal": None,
    "bool": torch.ones(12, 12, dtype=torch.bool).tril()[None, None],
    "additive": torch.zeros(12, 12).masked_fill(torch.ones(12, 12).triu(1) > 0, float("-inf"))[None, None],
    "sees all": torch.ones(1, 1, 12, 12, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("queries", [256, 5])
def test_output_and_gradients_are_those_written_out(monkeypatch, mask, queries):
    monkeypatch.setattr(attention, "QUERIES", queries)
    noise, found_effects = effects()
    hidden = torch.ones(12, 12).triu(1) > 0 if mask != "sees all" else torch.zeros(12, 12, dtype=torch.bool)
    q, k, v = operands()
    weights = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(2))
    expected = written_out(q, k, v, hidden)
    wanted = torch.autograd.grad((expected * weights).sum(), [q, k, v])
    place = (*noise.place(), None, *found_effects.tensors)
    found = attention.TransformedAttention.apply(found_effects.plan, False, 8**-0.5, q, k, v, MASKS[mask], *place)
    got = torch.autograd.grad((found * weights).sum(), [q, k, v])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all((grad == 0).any() for grad in got), "nothing was clipped"


@torch.no_grad()
def test_ranges_count_only_scores_that_are_seen(monkeypatch):
    seen = []
    for queries, mask in ((256, None), (5, None), (5, MASKS["bool"]), (256, MASKS["additive"])):
        monkeypatch.setattr(attention, "QUERIES", queries)
        noise, found_effects = effects()
        q, k, v = operands()
        place = (*noise.place(), None, *found_effects.tensors)
        attention.transformed_attention(found_effects.plan, True, 8**-0.5, q, k, v, mask, *place)
        seen.append({name: float(range_.seen) for name, range_ in noise.ranges.items() if "layers.0" in name})
    assert seen[0] == seen[1] == seen[2] == seen[3]
    q, k, _ = (straight_through(value, 0.7 * 2.5, 15) for value in operands())
    exact = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).tril().abs().max()
    (found,) = (value for name, value in seen[0].items() if "scores" in name)
    assert found == pytest.approx(float(exact), rel=1e-6)


def test_an_attention_takes_one_transform():
    model, plain = Llama(SHAPE, context=32), Llama(SHAPE, context=32)
    with pytest.raises(TransformError, match="can have one transform only") as error:
        apply(model, [INT8, OPTICAL], seed=0)
    assert error.value.index == 1
    assert repr(model) == repr(plain), "the model is not as before"
    apply(model, [INT8, OPTICAL.model_copy(update={"attention": False})], seed=0)
    remove(model)
    assert repr(model) == repr(plain)
