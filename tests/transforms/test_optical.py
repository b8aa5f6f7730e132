"""Optical converters and shot noise: identities of the grid, moments of what is drawn against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transforms.apply import apply
from transforms.attention import AttentionEffects, transformed_attention
from transforms.context import Noise
from transforms.formats import Integer
from transforms.product import Product, ProductCode
from transforms.quantise import QuantiseCode
from transforms.ranges import Range
from transforms.scales import Scaling
from transforms.specs import OpticalSpec

CPU = torch.device("cpu")
LEVELS = [3, 4, 16, 255, 256, 4096, 65536]
RANGES = [0.37, 1.0, 4.0, 12.3, 1e-4, 3e5]


def converter(levels: int, range_: float, floor: float = 0.0) -> QuantiseCode:
    return QuantiseCode(Integer((levels - 1) // 2), Scaling("range"), fixed=range_, floor=floor)


def values(range_: float) -> torch.Tensor:
    inside = torch.linspace(-1.3, 1.3, 20001) * range_
    return torch.cat([inside, torch.tensor([0.0, -0.0, 1e-30, range_, -range_])])


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("range_", RANGES)
def test_a_converter_twice_is_as_once_and_within_half_a_level(levels, range_):
    code, value = converter(levels, range_), values(range_)
    found = code.forward(value, None, None)
    assert torch.equal(code.forward(found, None, None), found)
    largest = (levels - 1) // 2
    half = range_ / largest / 2
    clipped = value.double().clamp(-range_, range_)
    # What float32 arithmetic adds is small even against the levels of 16 bits, 2^-15 of the range apart.
    assert (found.double() - clipped).abs().max() <= half + 2**-22 * range_
    assert (found[value == 0] == 0).all()
    assert len(found.unique()) <= 2 * largest + 1
    if largest < 1000:
        assert len(found.unique()) == 2 * largest + 1


@pytest.mark.parametrize("floor", [0.020040, 0.1])
def test_a_modulator_shows_zero_or_at_least_its_floor(floor):
    range_ = 2.0
    value = values(range_)
    plain, found = (converter(256, range_, f).forward(value, None, None) for f in (0.0, floor))
    low = (plain != 0) & (plain.abs() < floor * range_)
    assert low.sum() > 0
    torch.testing.assert_close(found[low].abs(), torch.full_like(found[low], floor * range_))
    assert (found[low].sign() == plain[low].sign()).all()
    assert torch.equal(found[~low], plain[~low])


# --- what is drawn ----------------------------------------------------------------------------------------------------

ROWS, LENGTH, IN, OUT = 8, 1024, 16, 64
DRAWS = ROWS * LENGTH


def many_products(**settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
    """One product drawn at every position of many rows, (draws, out); its operands, their full scale, the output range."""
    random = torch.Generator().manual_seed(0)
    layer = nn.Linear(IN, OUT, bias=False)
    layer.weight.data = torch.randn(OUT, IN, generator=random)
    noise = apply(
        nn.ModuleDict({"proj": layer}),
        [OpticalSpec(kind="optical", modules=["proj"], attention=False, **settings)],
        3,
    )
    x = torch.randn(IN, generator=random).expand(ROWS, LENGTH, IN)
    noise.enter("train")
    noise.begin(0, 0, CPU)
    with torch.no_grad():
        layer(x)
        noise.end_step()
        output = noise.ranges["transforms.proj.acc"]
        output.used.mul_(8)  # so that no noise is clipped
        noise.begin(1, 0, CPU)
        found = layer(x).flatten(0, 1).double()
        (effect,) = layer.input_effects
        operand = effect.code.forward(x, *effect.tensors, *noise.place())[0, 0].double()
        weight = layer.weight.double()
    full_scale = float(noise.ranges["transforms.proj.x"].used) * float(weight.abs().max())
    return found, operand, weight, full_scale, float(output.used)


def within(found: torch.Tensor, expected: torch.Tensor | float, deviation: torch.Tensor | float) -> bool:
    return bool(((found - expected).abs() <= 4 * deviation + 1e-12).all())


def test_stochastic_rounding_has_no_bias_and_the_variance_of_a_coin():
    """Up with probability f: f (1 - f) of a squared level, and a fourth moment of f (1 - f) (1 - 3 f (1 - f))."""
    found, x, weight, _, range_ = many_products(rounding="stochastic")
    level = range_ / 127
    exact = weight @ x / level
    error = found / level - exact
    f = exact - exact.floor()
    coin = f * (1 - f)
    assert ((found / level - (found / level).round()).abs() < 1e-3).all()
    assert (error.abs() < 1).all()
    slack = 1e-4  # of float32 sums, in levels
    assert within(error.mean(0), 0.0, (coin / DRAWS).sqrt() + slack)
    assert within(error.square().mean(0), coin, ((coin * (1 - 3 * coin) - coin**2) / DRAWS).sqrt() + slack)


@pytest.mark.parametrize("tile", [0, 4])
@pytest.mark.parametrize("photons", [1.0, 50.0])
def test_shot_noise_of_a_linear_layer_has_the_variance_of_its_photons(photons, tile):
    found, x, weight, full_scale, _ = many_products(rounding="nearest", photons=photons, output_levels=65536, tile=tile)
    error = found - weight @ x
    variance = full_scale * (weight.abs() @ x.abs()) / photons
    assert within(error.mean(0), 0.0, (variance / DRAWS).sqrt())
    ratio = error.square().mean(0) / variance
    deviation = (2 / DRAWS) ** 0.5
    assert within(ratio, 1.0, deviation)
    assert within(ratio.mean(), 1.0, deviation / OUT**0.5)
    normed = error / variance.sqrt()
    assert within((normed**4).mean(), 3.0, (96 / (DRAWS * OUT)) ** 0.5)  # of a normal distribution
    correlation = (normed.t() @ normed / DRAWS).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / DRAWS**0.5  # 2,016 pairs


def attention_with(which: str, photons: float, ranges: list[float]) -> tuple[AttentionEffects, Noise]:
    """Only one of attention's two products has noise, and no converters."""
    noise = Noise(3)
    full_scale = [Range(0.9) for _ in ranges]
    for range_, value in zip(full_scale, ranges, strict=True):
        range_.used.fill_(value)
    product = Product(noise, "attention", ProductCode(None, 0, photons), "", None, full_scale, which)
    effects = dict.fromkeys(("query", "key", "value", "probabilities", "scores", "context"))
    noise.fill()
    noise.begin(0, 0, CPU)
    return AttentionEffects({**effects, which: product}, 0, False), noise


def run(effects: AttentionEffects, noise: Noise, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
    return transformed_attention(effects.plan, False, 0.5, q, k, v, mask, *noise.place(), None, *effects.tensors)


@pytest.mark.parametrize("which", ["scores", "context"])
def test_shot_noise_of_attention_has_the_variance_of_its_photons(which):
    """Scores: full scale is that of queries times keys. Probabilities end at 1, so the context's is that of values.

    Values that are a unit matrix let the probabilities out, and a key of zeros, whose score has no noise, makes their
    logarithms, relative to its own, the scores.
    """
    photons, heads, keys, width = 40.0, 3, 8, 8
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, 1, width, generator=random).expand(2, -1, LENGTH, -1)
    k = torch.randn(1, heads, keys, width, generator=random).expand(2, -1, -1, -1).clone()
    v = torch.randn(1, heads, keys, width, generator=random).expand(2, -1, -1, -1)
    if which == "scores":
        k[:, :, 0] = 0
        v = torch.eye(keys).expand(2, heads, -1, -1)
        effects, noise = attention_with(which, photons, [3.0, 2.0])
        log = run(effects, noise, q, k, v).double().log()
        found = (log - log[..., :1]) / 0.5
        exact, magnitudes, full_scale = q @ k.mT, q.abs() @ k.abs().mT, 6.0
    else:
        effects, noise = attention_with(which, photons, [2.5])
        found = run(effects, noise, q, k, v).double()
        p = (0.5 * q @ k.mT).softmax(-1)
        exact, magnitudes, full_scale = p @ v, p @ v.abs(), 2.5
    error = (found - exact).movedim(1, 2).flatten(0, 1)  # (draws, heads, columns)
    variance = (full_scale * magnitudes / photons)[0, :, 0].double()
    draws = len(error)
    assert within(error.mean(0), 0.0, (variance / draws).sqrt() + 1e-5)
    if which == "scores":
        assert error[..., 0].abs().max() == 0
        error, variance = error[..., 1:], variance[..., 1:]
    ratio = error.square().mean(0) / variance
    assert within(ratio, 1.0, (2 / draws) ** 0.5)
    normed = (error / variance.sqrt()).flatten(1)
    correlation = (normed.t() @ normed / draws).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / draws**0.5
