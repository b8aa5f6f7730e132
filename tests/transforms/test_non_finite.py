"""Infinity, NaN and the smallest numbers on their way into low-bit formats, converters and their ranges.

An infinity saturates, NaN stays, and neither changes what becomes of its neighbours; rows that hold one are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy_formats import E2M1, E2M3, E3M2, E4M3, E5M2, integers, magnitudes, microscale, microscaled, nearest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transforms.apply import apply
from transforms.context import Noise
from transforms.formats import named
from transforms.quantise import QuantiseCode
from transforms.scales import Scaling
from transforms.specs import BitflipSpec, CellFaults, OpticalSpec, Quantised, QuantiseSpec

CPU = torch.device("cpu")
SHAPE = (4, 64)
MX = {"mxfp8_e4m3": E4M3, "mxfp8_e5m2": E5M2, "mxfp6_e3m2": E3M2, "mxfp6_e2m3": E2M3, "mxfp4": E2M1}


def of_rows(value: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.abs(value).max(-1, keepdims=True) / table[-1]


def of_tensor(value: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.abs(value).max() / table[-1]


def of_groups(value: np.ndarray, table: np.ndarray) -> np.ndarray:
    return of_rows(value.reshape(-1, 16), table).repeat(16, 1).reshape(value.shape)


def of_blocks(value: np.ndarray, table: np.ndarray) -> np.ndarray:
    largest = np.abs(value.reshape(-1, 32)).max(-1, keepdims=True)
    return microscale(largest, table).repeat(32, 1).reshape(value.shape)


def mean(value: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.abs(value).mean()


def two_levels(value: np.ndarray, of_weight: bool) -> np.ndarray:
    largest = np.abs(value.reshape(len(value), -1, 16)).max(-1, keepdims=True)
    outer = (largest.max() if of_weight else largest.max(1, keepdims=True)) / (6 * 448)
    return (nearest(largest / 6 / outer, E4M3) * outer).repeat(16, 2).reshape(value.shape)


Scale = Callable[[np.ndarray, np.ndarray], np.ndarray]
FORMATS: dict[str, tuple[str, Scaling, np.ndarray, Scale]] = {
    "int8, row": ("int8", Scaling("row"), integers(127), of_rows),
    "int8, tensor": ("int8", Scaling("tensor"), integers(127), of_tensor),
    "int4, group": ("int4", Scaling("block", 16), integers(7), of_groups),
    "ternary": ("ternary", Scaling("mean"), integers(1), mean),
    "e4m3": ("fp8_e4m3", Scaling("row"), E4M3, of_rows),
    "e5m2": ("fp8_e5m2", Scaling("row"), E5M2, of_rows),
    "e3m0": ("e3m0", Scaling("row"), magnitudes(3, 0), of_rows),
    **{name: (name, Scaling("power", 32), table, of_blocks) for name, table in MX.items()},
    "nvfp4 input": ("nvfp4", Scaling("two_level", 16), E2M1, lambda value, _: two_levels(value, False)),
    "nvfp4 weight": ("nvfp4", Scaling("two_level", 16, True), E2M1, lambda value, _: two_levels(value, True)),
}


def with_bad_values() -> Tensor:
    """Rows with one infinity, with both of them, with NaN, and an ordinary one."""
    value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    value[0, 3] = torch.inf
    value[1, 5], value[1, 40] = -torch.inf, torch.inf
    value[2, 63] = torch.nan
    return value


@pytest.mark.parametrize("name", list(FORMATS))
def test_infinity_saturates_nan_stays_and_neighbours_are_right(name):
    form, scaling, table, scale_of = FORMATS[name]
    value = with_bad_values()
    found = QuantiseCode(named(form), scaling).forward(value, None, None).numpy()
    exact = value.double().numpy()
    finite = np.where(np.isfinite(exact), exact, 0)
    scale = np.broadcast_to(scale_of(finite, table), SHAPE)
    inside = np.where(np.isinf(exact), np.copysign(2 * table[-1] * scale, exact), finite)
    expected = nearest(inside / scale, table, one_digit=form == "e3m0") * scale
    expected[np.isnan(exact)] = np.nan
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isnan(found).sum() == 1


@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-40, 1e-44])
@pytest.mark.parametrize("name", list(MX))
def test_shared_scales_reach_the_smallest_of_their_format(name, size):
    """OCP Microscaling Formats (MX) Specification v1.0, section 5.4.1: E8M0 is 2^-127 to 2^127."""
    value = size * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    value[0, :32] = 0
    value[1, 0] = 2.0**-127
    found = QuantiseCode(named(name), Scaling("power", 32)).forward(value, None, None)
    assert np.array_equal(found.numpy(), microscaled(value.double().numpy(), MX[name]).astype(np.float32))


@pytest.mark.parametrize("of_weight", [True, False])
@pytest.mark.parametrize("size", [1e-36, 1e-40])
def test_two_level_scales_of_tiny_values(size, of_weight):
    """The outer scale is whatever float32 holds, subnormals included."""
    value = size * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    value[0] = 0
    found = QuantiseCode(named("nvfp4"), Scaling("two_level", 16, of_weight)).forward(value, None, None).numpy()
    exact = value.numpy()
    for row in range(8):
        outer = np.float32(np.abs(exact if of_weight else exact[row]).max()) / np.float32(6 * 448)
        for start in range(0, 64, 16):
            part = exact[row, start : start + 16]
            scale = nearest(np.abs(part).max() / np.float32(6) / (outer or 1), E4M3).astype(np.float32) * outer
            expected = nearest(part / (scale or np.float32(1)), E2M1) * scale
            np.testing.assert_allclose(found[row, start : start + 16], expected, rtol=1e-6)


def test_powers_of_two_round_a_tie_away_from_zero_and_half_of_the_smallest_to_zero():
    """IEEE 754-2019, section 4.3.1: of two neighbours without an even digit the larger; 0 is even."""
    ties = torch.tensor([0.125, 0.375, 0.75, 1.5, 3.0, 6.0, 12.0])  # of 0, 0.25, 0.5, ..., 16
    assert named("e3m0").round(torch.cat([ties, -ties])).tolist() == [
        *(0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
        *(-0.0, -0.5, -1.0, -2.0, -4.0, -8.0, -16.0),
    ]


def test_an_integer_without_partner_is_never_written():
    """Two's complement has -128, the symmetric grid does not."""
    values = torch.tensor([[-128.0, -127.4, 127.0, -torch.inf]])
    found = QuantiseCode(named("int8"), Scaling("none"), fixed=127.0).forward(values, None, None)
    assert found.tolist() == [[-127.0, -127.0, 127.0, -127.0]]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(16, 8)})])

    def forward(self, x):
        return self.blocks[0]["up"](x)


def started(spec, warmup: int = 0) -> tuple[Net, Noise]:
    net = Net()
    noise = apply(net, [spec], 0, warmup)
    noise.begin(0, 0, CPU)
    return net, noise


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
INT8 = QuantiseSpec(kind="quantise", weight=Quantised(format="int8"), input=Quantised(format="int8"))
INT8_MEMORY = BitflipSpec(
    kind="bitflip", storage="int8", weight=CellFaults(mantissa=0.1), output=CellFaults(mantissa=0.1)
)
BFLOAT16_MEMORY = BitflipSpec(kind="bitflip", weight=CellFaults(mantissa=0.1), input=CellFaults(mantissa=0.1))
TRACKED = QuantiseSpec(kind="quantise", input=Quantised(format="int8", scale="tracked"))
LEARNED = QuantiseSpec(kind="quantise", input=Quantised(format="int8", scale="learned"))
OPTICAL = OpticalSpec(kind="optical", attention=False)


def broken(x: Tensor = X) -> Tensor:
    """Three of ten tokens hold something that is not finite."""
    x = x.clone()
    x[0, 0, 0], x[0, 0, 1], x[1, 2, 3], x[1, 4, 15] = torch.inf, torch.nan, -torch.inf, torch.inf
    return x


def stored(net: Net) -> Tensor:
    return net.blocks[0]["up"].parametrizations.weight.original


@pytest.mark.parametrize(
    ("spec", "rows"), [(INT8, 3 + 1), (OPTICAL, 3 + 1), (INT8_MEMORY, 1 + 10), (BFLOAT16_MEMORY, 0)]
)
def test_rows_that_are_not_finite_are_counted_where_they_are_quantised(spec, rows):
    """Tokens, output channels, and of a memory of outputs all those that a broken weight makes. Words keep infinity."""
    net, noise = started(spec)
    with torch.no_grad():
        stored(net)[2, 1:3] = torch.inf
        net.blocks[0]["up"].bias[3] = torch.inf
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            net(broken())
            assert int(noise.take_non_finite()) == rows
            net(broken())
            with noise.off():
                net(broken())
            assert int(noise.take_non_finite()) == rows
            assert int(noise.take_non_finite()) == 0


def test_a_recomputed_forward_counts_once():
    net, noise = started(INT8)
    x = broken().requires_grad_()
    checkpoint(net, x, use_reentrant=False, context_fn=noise.restoring()).sum().backward()
    assert int(noise.take_non_finite()) == 3


def test_compiled_layers_count_and_round_as_eager_ones():
    net, noise = started(INT8)
    expected = net(broken())
    wanted = int(noise.take_non_finite())
    found = torch.compile(net, backend="aot_eager", fullgraph=True)(broken())
    found.nansum().backward()
    assert int(noise.take_non_finite()) == wanted == 3
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("spec", [TRACKED, LEARNED, OPTICAL])
def test_ranges_follow_the_finite_values(spec):
    """In the first step, whose largest values they take over, and in later ones."""
    net, noise = started(spec)
    range_ = noise.ranges["transforms.blocks.0.up.x"]
    net(broken())
    noise.end_step()
    finite = X.clone()
    finite[~broken().isfinite()] = 0
    assert float(range_.used) == float(finite.abs().max())
    net(broken(1.5 * X))
    noise.end_step()
    if spec is not LEARNED:
        assert float(range_.used) == pytest.approx(float(finite.abs().max()) * (0.9 + 0.1 * 1.5))
    assert all(math.isfinite(other.used) and other.used > 0 for other in noise.ranges.values())


def test_an_infinite_weight_does_not_end_a_learned_range():
    spec = QuantiseSpec(kind="quantise", weight=Quantised(format="int4", scale="learned"))
    net, noise = started(spec)
    with torch.no_grad():
        stored(net)[0, 0] = 0
        mean = float(stored(net).abs().mean())
        stored(net)[0, 0] = -torch.inf
    net(X)
    noise.end_step()
    (range_,) = noise.ranges.values()
    assert float(range_.used) == pytest.approx(2 * math.sqrt(7) * mean)


@pytest.mark.parametrize("warmup", [0, 32])
def test_an_infinite_input_saturates_at_a_learned_range_forward_and_backward(warmup):
    """At full strength, with the range's gradient that any other value beyond the range has."""
    results = []
    for beyond in (torch.inf, 100.0):
        net, noise = started(LEARNED, warmup)
        (range_,) = noise.ranges.values()
        range_.used.fill_(2.0)
        x = X.clone()
        x[0, 0, 0] = beyond
        x.requires_grad_()
        y = net(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, range_.log_range])])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
        assert found.isfinite().all()
