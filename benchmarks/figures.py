"""The figures of docs/: what bit errors, formats of few bits and optical products do to numbers.

    python benchmarks/figures.py

Writes docs/images/bit-errors.png, low-bit.png and optical.png, from the code of transforms/ alone and without a model, in
seconds on one CPU core. The numbers behind them are held by tests/transforms/test_sqnr.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

import matplotlib  # noqa: E402

matplotlib.use("Agg")

import torch  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from transforms.apply import apply  # noqa: E402
from transforms.bitflip import Bitflip  # noqa: E402
from transforms.context import Noise  # noqa: E402
from transforms.formats import Float, Format, Integer, named  # noqa: E402
from transforms.quantise import QuantiseCode  # noqa: E402
from transforms.scales import Scaling  # noqa: E402
from transforms.specs import OpticalSpec  # noqa: E402

IMAGES = ROOT / "docs" / "images"
CPU = torch.device("cpu")
GROUPS = {"sign": "#c44e52", "exponent": "#dd8452", "mantissa": "#4c72b0"}


def normal(*shape: int, std: float = 1.0, seed: int = 0) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decibel(signal: Tensor, noise: Tensor) -> float:
    return float(10 * torch.log10(signal.double().square().mean() / noise.double().square().mean()))


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=110, metadata={"Software": None})
    print(IMAGES / name)


# --- bit errors -------------------------------------------------------------------------------------------------------


def change_by_bit(storage: str, bits: int, value: Tensor) -> list[float]:
    """Median change of a value when one bit is inverted, relative to the values' deviation; the sign first."""
    found = []
    for bit in reversed(range(bits)):
        noise = Noise(0)
        scaling = None if bits == 16 else Scaling("row", of_weight=True)
        certain = [float(other == bit) for other in range(bits)]
        effect = Bitflip(noise, "layer", "w", storage, certain, scaling=scaling)
        still = Bitflip(noise, "layer", "w", storage, [0.0] * bits, scaling=scaling)
        noise.fill()
        noise.begin(0, 0, CPU)
        change = (effect(value) - still(value)).abs()
        found.append(float(change[change.isfinite()].median() / value.std()))
    return found


def bit_errors() -> None:
    value = normal(64, 512, std=0.02)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
    for axis, (storage, bits, exponent) in zip(axes, [("bfloat16", 16, 8), ("fp8_e4m3", 8, 4), ("int8", 8, 0)]):
        kinds = ["sign"] + ["exponent"] * exponent + ["mantissa"] * (bits - 1 - exponent)
        heights = change_by_bit(storage, bits, value)
        axis.bar(range(bits), heights, color=[GROUPS[kind] for kind in kinds])
        axis.set(yscale="log", ylim=(1e-3, 1e6), title=storage, xlabel="bit, the sign first")
        axis.set_xticks(range(0, bits, bits // 8))
        for bit, height in enumerate(heights):
            if height > 1e6:
                axis.text(bit + 0.6, 3e5, f"{height:.0e}", fontsize=8)
        axis.axhline(1, color="0.6", linewidth=0.8)
    axes[0].set_ylabel("median change / deviation of weights")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in GROUPS.values()]
    axes[2].legend(handles, ["sign", "exponent", "mantissa, or integer"], frameon=False)
    save(figure, "bit-errors.png")


# --- low bit ----------------------------------------------------------------------------------------------------------

GRIDS = ["ternary", "int4", "e2m1", "e3m2", "e2m3"]
BARS: list[tuple[str, str, Scaling]] = [
    ("ternary, tensor", "ternary", Scaling("mean")),
    ("int4, row", "int4", Scaling("row")),
    ("int4, group 128", "int4", Scaling("block", 128)),
    ("mxfp4", "mxfp4", Scaling("power", 32)),
    ("nvfp4", "nvfp4", Scaling("two_level", 16, of_weight=True)),
    ("mxfp8 e5m2", "mxfp8_e5m2", Scaling("power", 32)),
    ("mxfp8 e4m3", "mxfp8_e4m3", Scaling("power", 32)),
    ("mxfp6 e2m3", "mxfp6_e2m3", Scaling("power", 32)),
    ("e3m4, row", "e3m4", Scaling("row")),
    ("int8, row", "int8", Scaling("row")),
    ("int8, group 128", "int8", Scaling("block", 128)),
]


def numbers(form: Format) -> Tensor:
    """All of a format, as parts of the largest."""
    if isinstance(form, Integer):
        return torch.arange(-form.largest, form.largest + 1) / form.max
    return form.decode(torch.arange(1 << form.bits, dtype=torch.int32)) / form.max


def low_bit() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    for row, name in enumerate(GRIDS):
        found = numbers(named(name))
        left.plot(found, torch.full_like(found, row), "|", markersize=16, color="#4c72b0" if row < 2 else "#dd8452")
    left.set(yticks=range(len(GRIDS)), yticklabels=GRIDS, ylim=(-0.6, 4.6), xlabel="number / largest number")
    left.invert_yaxis()
    value = normal(64, 4096)
    for row, (_, name, scaling) in enumerate(BARS):
        form = named(name)
        found = decibel(value, QuantiseCode(form, scaling).forward(value, None, None) - value)
        right.barh(row, found, color="#dd8452" if isinstance(form, Float) else "#4c72b0")
        right.text(found + 0.5, row, f"{found:.1f}", va="center", fontsize=8)
    right.set(yticks=range(len(BARS)), xlim=(0, 50), xlabel="signal to noise on normally distributed values, dB")
    right.set_yticklabels([label for label, _, _ in BARS], fontsize=8)
    right.invert_yaxis()
    save(figure, "low-bit.png")


# --- optical ----------------------------------------------------------------------------------------------------------


def product_noise(photons: float | None) -> tuple[float, float]:
    """dB of a product with 768 inputs, simulated, and as the formula of shot noise alone has it."""
    layer = nn.Linear(768, 256, bias=False)
    layer.weight.data = normal(256, 768)
    exact = layer.weight.detach().clone()
    spec = OpticalSpec(kind="optical", modules=["proj"], attention=False, rounding="nearest", photons=photons)
    noise = apply(nn.ModuleDict({"proj": layer}), [spec], 1)
    x = normal(2, 64, 768, seed=1)
    noise.enter("train")
    with torch.no_grad():
        for step in range(2):  # the first finds the ranges
            noise.begin(step, 0, CPU)
            found = layer(x)
            noise.end_step()
        clean = x @ exact.t()
        shot = x.abs().max() * exact.abs().max() * (x.abs() @ exact.abs().t()) / (photons or torch.inf)
    return decibel(clean, found - clean), decibel(clean, shot.sqrt())


def optical() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    value = torch.linspace(-1.2, 1.2, 2401)
    for floor, color, label in ((0.0, "#4c72b0", "16 levels"), (0.2, "#dd8452", "16 levels, lut_floor 0.2")):
        code = QuantiseCode(Integer(7), Scaling("range"), floor=floor, fixed=1.0)
        left.plot(value, code.forward(value, None, None), color=color, label=label, zorder=2 - floor)
    left.plot(value, value, color="0.7", linewidth=0.8)
    left.set(xlabel="value / range", ylabel="what the converter passes on")
    left.legend(frameon=False)
    photons = [10.0 ** (exponent / 2) for exponent in range(13)]
    found = [product_noise(count) for count in photons]
    right.semilogx(photons, [pair[1] for pair in found], color="0.6", label="shot noise alone, by formula")
    right.semilogx(photons, [pair[0] for pair in found], "o", color="#4c72b0", label="with converters of 256 levels")
    right.axhline(product_noise(None)[0], color="#4c72b0", linewidth=0.8, linestyle=":", label="converters alone")
    right.set(xlabel="photons for a multiply-accumulate at full scale", ylabel="signal to noise of a product, dB")
    right.legend(frameon=False)
    save(figure, "optical.png")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    bit_errors()
    low_bit()
    optical()
