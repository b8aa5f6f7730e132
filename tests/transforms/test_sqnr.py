"""How much noise each preset makes, against formulas and a second implementation in numpy (`tests/numpy_formats.py`).

Every file in configs/transforms has to be in `PRESETS`. Weights W (768, 768) and inputs x (512, 768) are independent and
normally distributed; y = x W^T. With odd quantisers the errors of different products x_k w_k are uncorrelated, so the noise
of a sum over K of them follows from the moments of the operands:

    E (y~ - y)^2 = K (E x~^2 E w~^2 - 2 E x~x E w~w + E x^2 E w^2) + what detectors add

with LSB^2 / 12 or, rounded stochastically, LSB^2 / 6 for each conversion, and shot noise as in `transforms/product.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy_formats import (
    E2M1,
    E2M3,
    E3M4,
    E4M3,
    E5M2,
    by_groups,
    by_rows,
    decibel,
    integers,
    microscaled,
    nvfp4,
    over,
    sqnr,
    ternary,
)
from support import ROOT
from torch import nn

from train.config_sources import load_config
from transforms.apply import apply
from transforms.formats import named
from transforms.quantise import QuantiseCode
from transforms.scales import Scaling

M, K, N = 512, 768, 768
TOLERANCE = 0.2  # dB
TWICE = 0.02
"""dB between two implementations that round the same values."""


# --- what is expected -------------------------------------------------------------------------------------------------

Moments = tuple[float, float]
"""E v~^2 and E v~v"""


@dataclass(frozen=True)
class Expected:
    """Figures in dB of weight, input (None where it is exact) and product, and how they follow."""

    figures: tuple[float | None, float | None, float]
    weight: Callable[[np.ndarray], Moments] | None = None
    input: Callable[[np.ndarray], Moments] | None = None
    detectors: Callable[[np.ndarray, np.ndarray], float] = lambda x, w: 0.0
    """Variance of what they add to a sum."""
    normalised: bool = False
    weight_std: float = 1.0
    draws: int = 1
    """Flips of bits are rare: one draw has too few of them."""


def exact(value: np.ndarray) -> Moments:
    return np.square(value).mean(), np.square(value).mean()


def of(quantiser: Callable, *rest) -> Callable[[np.ndarray], Moments]:
    def moments(value: np.ndarray) -> Moments:
        found = quantiser(value, *rest)
        return np.square(found).mean(), (found * value).mean()

    return moments


def flipped(storage: str, p: list[float], zero_above: float = math.inf) -> Callable[[np.ndarray], Moments]:
    """To first order in the probabilities, of the lowest bit first: each bit of each word is flipped alone.

    Words are those of torch's casts; an 8-bit format is scaled by rows.
    """

    def moments(value: np.ndarray) -> Moments:
        scale = np.ones((len(value), 1))
        if storage in ("int8", "float8_e4m3fn"):
            scale = np.abs(value).max(-1, keepdims=True) / (127 if storage == "int8" else 448)
        scaled = torch.from_numpy(value / scale)
        stored = (scaled.round() if storage == "int8" else scaled.float()).to(getattr(torch, storage))
        word = stored.view(torch.int16 if storage == "bfloat16" else torch.uint8)
        total, cross = 0.0, 0.0
        for bit in [None, *range(len(p))]:
            changed = word if bit is None else word ^ torch.tensor(1 << bit).to(word.dtype)
            found = changed.view(stored.dtype).double().numpy() * scale
            found = np.where(np.abs(found) < zero_above, found, 0.0)  # and NaN
            weight = 1 - sum(p) if bit is None else p[bit]
            total += weight * np.square(found).mean()
            cross += weight * (found * value).mean()
        return total, cross

    return moments


def tracked(largest: int, floor: float = 0.0) -> Callable[[np.ndarray], Moments]:
    return of(lambda value: over(value, np.abs(value).max(), largest, floor))


def lsq_weight(value: np.ndarray) -> np.ndarray:
    """Esser et al., arXiv 1902.08153, section 2.1: the first step is 2 mean|w| / sqrt(n)."""
    return over(value, 2 * np.abs(value).mean() * math.sqrt(7), 7)


def converted(share: float, tile: int = K, photons: float = math.inf, floor: float = 0.0) -> Callable:
    """Detectors of 255 levels up to the largest sum; share is 1/12 or 1/6."""

    def variance(x: np.ndarray, w: np.ndarray) -> float:
        w = over(w, np.abs(w).max(), 127, floor)
        sums = [x[:, i : i + tile] @ w[:, i : i + tile].T for i in range(0, K, tile)]
        step = max(np.abs(s).max() for s in sums) / 127
        shot = np.abs(x).max() * np.abs(w).max() * K * np.abs(x).mean() * np.abs(w).mean() / photons
        return len(sums) * step**2 * share + shot

    return variance


def both(quantiser: Callable, figures: tuple, *rest) -> Expected:
    return Expected(figures, of(quantiser, *rest), of(quantiser, *rest))


def optical(figures: tuple, share: float, floor: float = 0.0, **detectors) -> Expected:
    return Expected(figures, tracked(127, floor), tracked(127), converted(share, floor=floor, **detectors))


INT8, INT4 = integers(127), integers(7)
P16, P12 = 2.0**-16, 2.0**-12
PRESETS = {
    "bitflip_fp8": Expected(
        (27.9, 27.9, 24.9),
        flipped("float8_e4m3fn", [1e-4] * 8, 1.25),
        flipped("float8_e4m3fn", [1e-4] * 8, 30.0),
        weight_std=0.02,
        draws=24,
    ),
    "bitflip_int8": Expected(
        (27.9, 27.9, 24.9), flipped("int8", [1e-4] * 8), flipped("int8", [1e-4] * 8), weight_std=0.02, draws=24
    ),
    "bitflip_mantissa": Expected(
        (43.3, 43.3, 40.3), flipped("bfloat16", [P12] * 7), flipped("bfloat16", [P12] * 7), weight_std=0.02, draws=24
    ),
    "bitflip_published": Expected(
        (21.3, 36.7, 21.2),
        flipped("bfloat16", [P16] * 16, 1.25),
        flipped("bfloat16", [P16] * 16, 30.0),
        weight_std=0.02,
        draws=96,
    ),
    "bitnet_b158": Expected((5.8, 42.3, 5.8), of(ternary), of(by_rows, INT8), normalised=True),
    "fp8_e4m3": both(by_rows, (31.6, 31.6, 28.6), E4M3),
    "fp8_e5m2": both(by_rows, (25.6, 25.6, 22.6), E5M2),
    "int2": Expected((2.9, None, 2.9), of(by_groups, integers(1), 64)),
    "int4": Expected((18.6, None, 18.6), of(by_groups, INT4, 128)),
    "int4_a8": Expected((18.6, 42.3, 18.6), of(by_groups, INT4, 128), of(by_rows, INT8)),
    "int8": both(by_rows, (42.3, 42.3, 39.3), INT8),
    "int8_weights": Expected((42.3, None, 42.3), of(by_rows, INT8)),
    "lsq_int4": Expected((15.2, 14.2, 11.6), of(lsq_weight), tracked(7)),
    "minifloat_e3m4": both(by_rows, (37.6, 37.6, 34.6), E3M4),
    "mxfp4": both(microscaled, (18.8, 18.8, 15.8), E2M1),
    "mxfp6": both(microscaled, (30.9, 30.9, 27.9), E2M3),
    "mxfp8": both(microscaled, (30.7, 30.6, 27.6), E4M3),
    "nvfp4": Expected((20.4, 20.4, 17.4), of(nvfp4, False), of(nvfp4, True)),
    "optical_8bit": optical((39.5, 39.4, 33.2), 1 / 6),
    "optical_shot_noise": optical((39.5, 39.4, 8.5), 1 / 12, photons=100.0),
    "optical_tiled": optical((39.5, 39.4, 32.9), 1 / 6, tile=256),
    "optical_transformer": optical((36.6, 39.4, 32.3), 1 / 6, floor=0.020040),
    "sram_int8": Expected((18.1, None, 18.1), flipped("int8", [1e-3] * 8), weight_std=0.02, draws=6),
    "sram_low_voltage": Expected((23.2, None, 23.2), flipped("bfloat16", [1e-5] * 16, 1.25), weight_std=0.02, draws=96),
}


def predicted(expected: Expected, x: np.ndarray, w: np.ndarray) -> tuple[float | None, float | None, float]:
    def noise(moments: Moments, value: np.ndarray) -> float:
        return moments[0] - 2 * moments[1] + np.square(value).mean()

    of_w, of_x = (expected.weight or exact)(w), (expected.input or exact)(x)
    w2, x2 = np.square(w).mean(), np.square(x).mean()
    product = K * (of_x[0] * of_w[0] - 2 * of_x[1] * of_w[1] + x2 * w2) + expected.detectors(x, w)
    return (
        decibel(w2, noise(of_w, w)) if expected.weight else None,
        decibel(x2, noise(of_x, x)) if expected.input else None,
        decibel(K * x2 * w2, product),
    )


# --- what is measured -------------------------------------------------------------------------------------------------


class Products(nn.Module):
    """A place where effects on attention can act; nothing here calls it."""

    def products(self, q, k, v, mask): ...


class Attention(nn.Module):
    def __init__(self, w: np.ndarray):
        super().__init__()
        self.q_proj = nn.Linear(K, N, bias=False)
        self.q_proj.weight.data = torch.from_numpy(w).float()
        self.core = Products()


def model_with(w: np.ndarray) -> tuple[nn.Module, Attention]:
    attention = Attention(w)
    block = nn.ModuleDict({"self_attn": attention})
    inner = nn.ModuleDict({"layers": nn.ModuleDict({"0": block})})
    return nn.ModuleDict({"model": inner, "lm_head": nn.Linear(K, 8, bias=False)}), attention


def measured(name: str, x: np.ndarray, w: np.ndarray, draws: int) -> np.ndarray:
    """Mean square errors of weight, input and product, (draws, 3)."""
    config = load_config([str(ROOT / "configs" / "transforms" / f"{name}.toml")])
    model, attention = model_with(w)
    # Drawing the cells of many chips takes long, and a step of transient faults has as many.
    specs = [spec.model_copy(update={"lifetime": "transient"} if draws > 50 else {}) for spec in config.transforms]
    noise = apply(model, specs, 7)
    layer, inputs = attention.q_proj, torch.from_numpy(x).float()[None]
    reference = inputs.double().numpy()
    if name == "bitnet_b158":
        reference = reference / np.sqrt(np.square(reference).mean(-1, keepdims=True) + 1e-5)
    rows = []
    with torch.no_grad():
        if noise.ranges:
            noise.enter("train")
            noise.begin(0, 0, inputs.device)
            layer(inputs)
            noise.end_step()
        for draw in range(draws):
            noise.enter(f"chip {draw}")  # for faults that stay
            noise.begin(1 + draw, 0, inputs.device)
            found = inputs
            for effect in layer.input_effects:
                found = effect.code.forward(found, *effect.tensors, *noise.place())
            pairs = [
                (layer.weight.double().numpy(), w),
                (found.double().numpy(), reference),
                (layer(inputs).double().numpy(), reference @ w.T),
            ]
            rows.append([np.square(one - other).mean() for one, other in pairs])
    return np.array(rows)


def operands(weight_std: float = 1.0, normalised: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """x and W, float64 numbers that float32 can hold."""
    random = np.random.default_rng(0)
    x, w = random.standard_normal((M, K)).astype(np.float32), random.standard_normal((N, K)).astype(np.float32)
    x, w = x.astype(np.float64), (w * np.float32(weight_std)).astype(np.float64)
    return (x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) if normalised else x), w


RARE = ("bitflip_published", "sram_low_voltage", "sram_int8", "bitflip_fp8")
"""Presets whose errors are so rare that many draws are needed."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(file.stem, marks=pytest.mark.slow if file.stem in RARE else [])
        for file in sorted((ROOT / "configs" / "transforms").glob("*.toml"))
    ],
)
def test_noise_of_every_preset_is_as_predicted(name):
    assert name in PRESETS, "write down what this preset does to weight, input and product"
    expected = PRESETS[name]
    x, w = operands(expected.weight_std, expected.normalised)
    errors = measured(name, operands(expected.weight_std)[0], w, expected.draws)
    signals = np.square(w).mean(), np.square(x).mean(), K * np.square(w).mean() * np.square(x).mean()
    columns = zip(("weight", "input", "product"), errors.T, signals, expected.figures, predicted(expected, x, w))
    for what, error, signal, figure, formula in columns:
        if formula is None:
            assert figure is None
            assert (error == 0).all()
            continue
        limit = TOLERANCE
        if expected.draws > 1:  # as many standard errors as chance explains
            limit = max(limit, 4 * error.std(ddof=1) / math.sqrt(expected.draws) / error.mean() * 10 / math.log(10))
        elif what != "product":
            limit = TWICE
        assert decibel(signal, error.mean()) == pytest.approx(formula, abs=limit)
        assert formula == pytest.approx(figure, abs=0.06)


# --- figures of formats -----------------------------------------------------------------------------------------------


def rounded(name: str, scaling: Scaling, value: np.ndarray, **rest) -> np.ndarray:
    code = QuantiseCode(named(name), scaling, **rest)
    return code.forward(torch.from_numpy(value).float(), None, None).double().numpy()


@pytest.fixture(scope="module")
def normal() -> np.ndarray:
    """(128, 4096), standard normal."""
    return np.random.default_rng(1).standard_normal((128, 4096)).astype(np.float32).astype(np.float64)


FIGURES = [
    ("int8", Scaling("row"), by_rows, (integers(127),), 41.2),
    ("int4", Scaling("row"), by_rows, (integers(7),), 16.1),
    ("int8", Scaling("block", 128), by_groups, (integers(127), 128), 43.8),
    ("int4", Scaling("block", 128), by_groups, (integers(7), 128), 18.6),
    ("ternary", Scaling("mean", of_weight=True), ternary, (), 5.8),
    ("mxfp8_e4m3", Scaling("power", 32), microscaled, (E4M3,), 30.6),
    ("mxfp8_e5m2", Scaling("power", 32), microscaled, (E5M2,), 25.4),
    ("mxfp6_e2m3", Scaling("power", 32), microscaled, (E2M3,), 30.9),
    ("mxfp4", Scaling("power", 32), microscaled, (E2M1,), 18.8),
]


@pytest.mark.parametrize(
    ("name", "scaling", "reference", "rest", "figure"), FIGURES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_figures_of_formats_on_normal_values(normal, name, scaling, reference, rest, figure):
    found = rounded(name, scaling, normal)
    assert sqnr(normal, found) == pytest.approx(figure, abs=TOLERANCE)
    assert sqnr(normal, found) == pytest.approx(sqnr(normal, reference(normal, *rest)), abs=0.01)


def test_bitnet_sets_as_many_weights_to_zero_as_a_normal_distribution_has_below_half_its_mean_magnitude(normal):
    found = rounded("ternary", Scaling("mean", of_weight=True), normal)
    share = math.erf(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2))
    assert share == pytest.approx(0.310, abs=5e-4)
    assert (found == 0).mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / normal.size))


def grid_noise(levels: np.ndarray, floor: float = 0.0) -> float:
    """dB of rounding clip(x, -4, 4) to the nearest of evenly spaced levels, x standard normal, by numerical integration.

    Magnitudes below `floor` times 4, but 0, become that.
    """
    x = np.linspace(-8, 8, 1_600_001)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    clipped = x.clip(-4, 4)
    found = levels[np.rint((clipped - levels[0]) / (levels[1] - levels[0])).astype(int)]
    low = (np.abs(found) < floor * 4) & (np.abs(found) > 1e-9)
    found = np.where(low, np.copysign(floor * 4, found), found)
    return decibel((density * clipped**2).sum(), (density * (found - clipped) ** 2).sum())


@pytest.mark.parametrize(("floor", "figure", "without_zero"), [(0.0, 40.83, 40.86), (0.020040, 38.25, 36.71)])
def test_converter_from_minus_4_to_4(normal, floor, figure, without_zero):
    """A grid of 256 levels from end to end has no zero, and every small value meets the modulator's floor: that is the
    published simulation. Ours has 255 levels, one of them zero, which is not lifted."""
    assert grid_noise(np.linspace(-4, 4, 256), floor) == pytest.approx(without_zero, abs=0.02)
    assert grid_noise(np.linspace(-4, 4, 255), floor) == pytest.approx(figure, abs=0.02)
    found = rounded("int8", Scaling("range"), normal, fixed=4.0, floor=floor)
    assert sqnr(normal.clip(-4, 4), found) == pytest.approx(figure, abs=TOLERANCE)
