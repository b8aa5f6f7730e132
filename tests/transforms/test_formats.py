"""Formats of few bits and their scales: against torch's casts, torchao, the OCP tables, and a search in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy_formats import E2M1, E2M3, E3M2, magnitudes, nearest

from transforms.formats import Float, Integer, named
from transforms.quantise import QuantiseCode
from transforms.scales import Scaling

FP8 = [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)]
MX = [
    ("mxfp8_e4m3", torch.float8_e4m3fn),
    ("mxfp8_e5m2", torch.float8_e5m2),
    ("mxfp6_e3m2", "fp6_e3m2"),
    ("mxfp6_e2m3", "fp6_e2m3"),
    ("mxfp4", torch.float4_e2m1fn_x2),
]
MINIFLOATS = [(x, y) for x in (1, 2, 3, 4, 5) for y in (0, 1, 2, 3, 4)] + [(6, 3), (7, 2), (7, 9)]
SPECIAL = {(4, 3): "nan", (5, 2): "ieee"}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal float32 values, 0 distinct from -0; NaN is NaN."""
    equal = (one.view(torch.int32) == other.view(torch.int32)) | (one.isnan() & other.isnan())
    return one.dtype == other.dtype == torch.float32 and bool(equal.all())


def wide_values() -> torch.Tensor:
    """Every bfloat16 number but NaN: subnormals of all formats, ties, what saturates, both zeros, both infinities."""
    values = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).float()
    return values[~values.isnan()]


def random_values() -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(2**17, generator=random) * torch.exp2(12 * torch.randn(2**17, generator=random))


# --- floating point ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), FP8)
def test_fp8_codes_are_torchs_in_both_directions(name, dtype):
    form = named(name)
    code = torch.arange(256, dtype=torch.int32)
    expected = code.to(torch.uint8).view(dtype).float()
    assert same_bits(form.decode(code), expected)
    finite = expected.isfinite()
    encoded = form.encode(expected[finite])
    assert encoded.dtype == torch.int32  # which a memory's faults take as words
    assert torch.equal(encoded, code[finite])
    nan = torch.tensor([math.nan])
    assert torch.equal(form.encode(nan), nan.to(dtype).view(torch.uint8).int())


@pytest.mark.parametrize(("name", "dtype"), FP8)
@pytest.mark.parametrize("values", [wide_values, random_values])
def test_fp8_rounding_is_torchs_cast_and_saturates(name, dtype, values):
    form, value = named(name), values()
    largest = torch.finfo(dtype).max
    assert form.max == largest
    assert same_bits(form.round(value), value.clamp(-largest, largest).to(dtype).float())
    codes = value.clamp(-largest, largest).to(dtype).view(torch.uint8).int()
    assert torch.equal(form.encode(form.round(value)), codes)


@pytest.mark.parametrize(("name", "table"), [("mxfp4", E2M1), ("mxfp6_e2m3", E2M3), ("mxfp6_e3m2", E3M2)])
def test_elements_of_microscaling_are_the_tables_of_the_specification(name, table):
    """OCP Microscaling Formats (MX) Specification v1.0, section 5.3: all codes are numbers."""
    form = named(name)
    assert form.max == {"mxfp4": 6.0, "mxfp6_e2m3": 7.5, "mxfp6_e3m2": 28.0}[name]
    codes = torch.arange(2**form.bits, dtype=torch.int32)
    expected = torch.from_numpy(np.concatenate([table, -table])).float()
    assert same_bits(form.decode(codes), expected)
    assert torch.equal(form.encode(expected), codes)


@pytest.mark.parametrize(("exponent", "mantissa"), MINIFLOATS)
def test_any_minifloat_rounds_to_the_nearest_of_its_numbers(exponent, mantissa):
    """Ties go to the even digit; beyond the largest number values saturate, infinity too."""
    table = magnitudes(exponent, mantissa, SPECIAL.get((exponent, mantissa), ""))
    form = named(f"e{exponent}m{mantissa}")
    assert form.max == table[-1]
    middle = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middle, np.float32(to)) for to in (0, np.inf)]
    random = (
        np.random.default_rng(0).standard_normal(4000) * table[-1] * np.exp(-3 * np.random.default_rng(1).random(4000))
    )
    value = np.concatenate([table, middle, *near, random, [table[-1] * 1.01, 3e38, np.inf]]).astype(np.float32)
    value = np.concatenate([value, -value])
    found = form.round(torch.from_numpy(value))
    assert same_bits(found, torch.from_numpy(nearest(value, table, one_digit=mantissa == 0)).float())
    assert same_bits(form.decode(form.encode(found)), found)


def test_not_a_number_stays_so():
    for name in ("fp8_e4m3", "e5m2", "e2m1", "e3m4"):
        assert named(name).round(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", ["int4", "e2m1", "fp8_e4m3", "e3m0"])
def test_stochastic_rounding_takes_one_of_two_neighbours_and_is_exact_on_average(name):
    form = named(name)
    value = torch.linspace(-form.max, form.max, 101)[:, None]
    count = 2000
    uniform = (torch.arange(count) + 0.5) / count  # all of [0, 1) evenly: the mean is known without chance
    found = form.round(value, uniform)
    grid = torch.arange(-7.0, 8.0)
    if isinstance(form, Float):
        table = torch.from_numpy(magnitudes(form.exponent, form.mantissa, form.special)).float()
        grid = torch.cat([-table.flip(0), table[1:]])
    above = torch.searchsorted(grid, value).clamp(max=len(grid) - 1)
    upper, lower = grid[above], torch.where(grid[above] == value, value, grid[(above - 1).clamp(min=0)])
    assert ((found == lower) | (found == upper)).all()
    assert ((found.mean(1, keepdim=True) - value).abs() <= (upper - lower) / count + 1e-6 * form.max).all()


# --- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_clamp_and_every_code_is_twos_complement(bits):
    form = named(f"int{bits}")
    assert (form.bits, form.max) == (bits, 2 ** (bits - 1) - 1)
    codes = torch.arange(2**bits)
    values = [code - 2**bits if code >= 2 ** (bits - 1) else code for code in range(2**bits)]
    assert form.decode(codes).tolist() == values
    assert form.decode(codes.int() | 0x5A5A00).tolist() == values  # only the low bits count
    assert ((form.encode(form.decode(codes)) & (2**bits - 1)) == codes).all()
    value = torch.tensor([-1000.0, -1.5, -0.5, 0.5, 1.5, 1000.0])
    largest = form.max
    assert form.round(value).tolist() == [-largest, max(-2, -largest), 0, 0, min(2, largest), largest]


def test_integers_without_a_sign():
    form = Integer(255, signed=False)
    assert form.bits == 8
    assert form.round(torch.tensor([-3.0, 0.4, 254.6, 300.0])).tolist() == [0, 0, 255, 255]
    codes = torch.arange(256)
    assert form.decode(codes).tolist() == codes.tolist()
    assert torch.equal(form.encode(form.decode(codes)), codes.int())


@pytest.mark.parametrize("name", ["int9", "int1", "e0m3", "e8m1", "fp8", "mxfp5", ""])
def test_what_is_no_format_is_refused(name):
    with pytest.raises(ValueError, match="is no number format"):
        named(name)


# --- scales -----------------------------------------------------------------------------------------------------------


def quantised(name: str, scaling: Scaling, value: torch.Tensor, range_: float = 0.0) -> torch.Tensor:
    return QuantiseCode(named(name), scaling, fixed=range_).forward(value, None, None)


def test_scales_of_rows_tensors_and_values_as_they_are():
    value = torch.tensor([[0.5, -2.0, 1.0], [0.1, 0.3, -0.7]])
    scales = {
        "row": torch.tensor([[2.0], [0.7]]) / 7,
        "tensor": torch.tensor(2.0) / 7,
        "none": torch.tensor(1.0),
    }
    for kind, scale in scales.items():
        found = quantised("int4", Scaling(kind), value)
        torch.testing.assert_close(found, (value / scale).round() * scale)
    found = quantised("int4", Scaling("range"), value, 2.1)
    torch.testing.assert_close(found, torch.tensor([[0.6, -2.1, 0.9], [0.0, 0.3, -0.6]]))


@pytest.mark.parametrize("block", [5, 7, 12, 13])
def test_groups_need_not_divide_a_row(block):
    value = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    scaling = Scaling("block", block)
    expected = torch.empty_like(value)
    for row in range(3):
        for start in range(0, 12, block):
            part = value[row, start : start + block]
            step = part.abs().max() / 7
            expected[row, start : start + block] = (part / step).round() * step
    torch.testing.assert_close(quantised("int4", scaling, value), expected)
    assert torch.equal(scaling.unblocked(scaling.blocks(value), 12), value)


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("int8", Scaling("row")),
        ("fp8_e4m3", Scaling("row")),
        ("int4", Scaling("block", 4)),
        ("ternary", Scaling("mean", least=1e-5)),
        ("mxfp4", Scaling("power", 4)),
        ("nvfp4", Scaling("two_level", 4)),
        ("nvfp4", Scaling("two_level", 4, of_weight=True)),
    ],
)
def test_rows_of_zeros_stay_zeros_and_others_are_not_disturbed(name, scaling):
    value = torch.tensor([[0.0] * 8, [0.0] * 4 + [0.25, -0.5, 1.0, 0.125]])
    found = quantised(name, scaling, value)
    assert (found[value == 0] == 0).all()
    assert found[1].abs().sum() > 0
    assert (quantised(name, scaling, torch.zeros(2, 8)) == 0).all()


def test_mean_is_that_of_all_magnitudes_and_at_least_the_least():
    value = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    mean = np.abs(value.double().numpy()).mean()
    scale = Scaling("mean").scale(value, named("ternary"), None)
    assert float(scale) == pytest.approx(mean, rel=1e-7)
    shard = Scaling("mean", elements=2400).scale(value, named("ternary"), None)  # half of a weight's elements
    assert float(shard) == pytest.approx(mean / 2, rel=1e-7)
    assert float(Scaling("mean", least=1e-5).scale(value * 1e-9, named("ternary"), None)) == pytest.approx(1e-5)


@pytest.mark.parametrize("alpha", [2.0**-3, 0.37, 5.0])
def test_codes_of_bitnet_do_not_depend_on_the_size_of_weights(alpha):
    """And its values are -1, 0, 1 times the mean magnitude (arXiv 2402.17764, section 2)."""
    value = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    one, other = (quantised("ternary", Scaling("mean"), v) for v in (value, alpha * value))
    assert torch.equal(one.sign(), other.sign())
    mean = value.abs().mean()
    torch.testing.assert_close(one, (value / mean).round().clamp(-1, 1) * mean)
    torch.testing.assert_close(other.abs().max(), alpha * mean)


def blocks_of_all_sizes() -> torch.Tensor:
    """Random rows with blocks of very different sizes, a block of zeros, and one value at each power of two's edge."""
    random = torch.Generator().manual_seed(0)
    value = torch.randn(48, 96, generator=random) * torch.exp2(
        20 * torch.randn(48, 3, generator=random)
    ).repeat_interleave(32, 1)
    value[3, :32] = 0
    value[4, :32] = torch.linspace(0, 4 - 2**-22, 32)
    value[5, :32] = torch.linspace(-4, 0, 32)
    return value


@pytest.mark.parametrize(("name", "dtype"), MX)
def test_microscaling_is_torchaos_bit_for_bit(name, dtype):
    """Its scale by the rule of the specification's section 6.3."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    value = blocks_of_all_sizes()
    expected = mx.MXTensor.to_mx(value, dtype, 32, mx.ScaleCalculationMode.FLOOR).dequantize(torch.float32)
    assert same_bits(quantised(name, Scaling("power", 32), value), expected)


@pytest.mark.parametrize("name", [name for name, _ in MX])
def test_microscaling_is_the_specifications_rule_written_as_a_loop(name):
    form = named(name)
    table = magnitudes(form.exponent, form.mantissa, form.special)
    value = blocks_of_all_sizes()
    found = quantised(name, Scaling("power", 32), value)
    for row in range(len(value)):
        for start in range(0, 96, 32):
            part = value[row, start : start + 32].double().numpy()
            # frexp has fractions from 1/2, so that an exponent is one more than the floor of the logarithm.
            shared = math.frexp(np.abs(part).max())[1] - math.frexp(table[-1])[1]
            expected = nearest(part / 2.0**shared, table) * 2.0**shared
            assert found[row, start : start + 32].double().numpy().tolist() == expected.tolist()


def test_nvfp4_is_torchaos_bit_for_bit():
    """For weights, whose outer scale is of the tensor, and blocks not so small that torchao clamps their scale."""
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    value = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    outer = nv.per_tensor_amax_to_scale(value.abs().amax())
    expected = nv.NVFP4Tensor.to_nvfp4(value, 16, outer).dequantize(torch.float32)
    assert same_bits(quantised("nvfp4", Scaling("two_level", 16, of_weight=True), value), expected)


@pytest.mark.parametrize("of_weight", [True, False])
def test_nvfp4_as_a_loop(of_weight):
    """A token's outer scale is its own: it must not see others."""
    value = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)) * torch.exp2(torch.arange(48) % 5)[:, None]
    found = quantised("nvfp4", Scaling("two_level", 16, of_weight=of_weight), value).double().numpy()
    exact, inner = value.double().numpy(), magnitudes(4, 3, "nan")
    for row in range(48):
        outer = np.abs(exact if of_weight else exact[row]).max() / (448 * 6)
        for start in range(0, 96, 16):
            part = exact[row, start : start + 16]
            scale = nearest(np.abs(part).max() / 6 / outer, inner) * outer
            expected = nearest(part / scale, E2M1) * scale
            np.testing.assert_allclose(found[row, start : start + 16], expected, rtol=1e-6)
