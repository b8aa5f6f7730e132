"""Gradients through quantisers and converters, against the rule written out by hand or with torch's autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transforms.apply import apply
from transforms.context import Noise
from transforms.formats import named
from transforms.quantise import QuantiseCode
from transforms.scales import Scaling
from transforms.specs import OpticalSpec, Quantised, QuantiseSpec

BATCH, LENGTH, IN, OUT = 2, 6, 24, 16


def layer_under(spec, std: float = 1.0) -> tuple[nn.Linear, Noise, Tensor]:
    """A transformed layer after a step that has set its ranges, and a new input, larger than what that step saw."""
    random = torch.Generator().manual_seed(0)
    layer = nn.Linear(IN, OUT, bias=False)
    layer.weight.data = std * torch.randn(OUT, IN, generator=random)
    noise = apply(nn.ModuleDict({"proj": layer}), [spec], 3)
    noise.enter("train")
    noise.begin(0, 0, torch.device("cpu"))
    layer(torch.randn(BATCH, LENGTH, IN, generator=random))
    noise.end_step()
    noise.begin(1, 0, torch.device("cpu"))
    noise.observing = False
    return layer, noise, (1.5 * torch.randn(BATCH, LENGTH, IN, generator=random)).requires_grad_()


def stored(layer) -> Tensor:
    return layer.parametrizations.weight.original


def pass_through(value: Tensor, rounded: Tensor) -> Tensor:
    """The rounded value forward, the gradient of the value backward."""
    return value + (rounded - value).detach()


def rounded(value: Tensor, scale: Tensor, largest: int) -> Tensor:
    return (value / scale).round().clamp(-largest, largest) * scale


def random_like(value: Tensor) -> Tensor:
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("gradients", ["noisy", "clean"])
def test_gradients_pass_straight_through_but_where_a_tracked_range_clips(gradients):
    spec = QuantiseSpec(
        kind="quantise",
        modules=["proj"],
        weight=Quantised(format="int4"),
        input=Quantised(format="int8", scale="tracked"),
        gradients=gradients,
    )
    layer, noise, x = layer_under(spec)
    range_ = noise.ranges["transforms.proj.x"].in_use
    w = stored(layer)
    xq = rounded(x.detach(), range_ / 127, 127)
    wq = rounded(w.detach(), w.detach().abs().amax(1, keepdim=True) / 7, 7)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(xq, wq))
    grad = random_like(y)
    y.backward(grad)
    inside = x.detach().abs() <= range_
    assert 0 < (~inside).sum() < inside.sum()
    if gradients == "clean":
        xq, wq = x.detach(), w.detach()
    torch.testing.assert_close(x.grad, torch.where(inside, grad @ wq, 0))
    torch.testing.assert_close(w.grad, grad.flatten(0, 1).t() @ xq.flatten(0, 1))


@pytest.mark.parametrize("tile", [0, 8])
def test_a_converter_that_clips_a_tile_stops_the_gradient_of_that_tile(tile):
    spec = OpticalSpec(kind="optical", modules=["proj"], attention=False, rounding="nearest", tile=tile)
    layer, noise, x = layer_under(spec)
    r_x, r_y = noise.ranges["transforms.proj.x"].in_use, noise.ranges["transforms.proj.acc"].in_use
    w = stored(layer)
    xq = rounded(x.detach(), r_x / 127, 127)
    wq = rounded(w.detach(), w.detach().abs().max() / 127, 127)
    y = layer(x)
    grad = random_like(y)
    y.backward(grad)

    size, clipped = tile or IN, 0
    expected, of_x, of_w = torch.zeros_like(y), [], []
    for start in range(0, IN, size):
        part = slice(start, start + size)
        acc = F.linear(xq[..., part], wq[:, part])
        expected = expected + rounded(acc, r_y / 127, 127)
        masked = torch.where(acc.abs() <= r_y, grad, 0)
        clipped += int((acc.abs() > r_y).sum())
        of_x.append(masked @ wq[:, part])
        of_w.append(masked.flatten(0, 1).t() @ xq[..., part].flatten(0, 1))
    assert clipped > 0
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, torch.where(x.detach().abs() <= r_x, torch.cat(of_x, -1), 0))
    torch.testing.assert_close(w.grad, torch.cat(of_w, -1))


def lsq(value: Tensor, step: Tensor, largest: int, elements: int) -> Tensor:
    """Esser et al. (arXiv 1902.08153), sections 2.1 and 2.2, left to autograd: the step's gradient is scaled."""
    share = 1 / math.sqrt(elements * largest)
    step = step * share + (step * (1 - share)).detach()
    scaled = (value / step).clamp(-largest, largest)
    return pass_through(scaled, scaled.round()) * step


def compare(layer, x, w, expected, own_x, own_w) -> None:
    """A layer's output and gradients with what autograd made of its formula."""
    y = layer(x)
    torch.testing.assert_close(y, expected)
    grad = random_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, own_x.grad)
    torch.testing.assert_close(w.grad, own_w.grad)


@pytest.mark.parametrize("shrunk", [1.0, 0.4])
def test_learned_ranges_have_the_gradient_of_learned_step_size_quantisation(shrunk):
    """By the chain rule from the step s to log r: the gradient times s. `shrunk` ranges clip more."""
    four_bits = Quantised(format="int4", scale="learned")
    layer, noise, x = layer_under(QuantiseSpec(kind="quantise", modules=["proj"], weight=four_bits, input=four_bits))
    of_w, of_x = noise.ranges["transforms.proj.w"], noise.ranges["transforms.proj.x"]
    w = stored(layer)
    assert float(of_w.in_use) == pytest.approx(2 * math.sqrt(7) * float(w.detach().abs().mean()))
    for learned in (of_w, of_x):
        learned.log_range.data.fill_(math.log(shrunk))
    steps = [(learned.in_use / 7).requires_grad_() for learned in (of_w, of_x)]
    own_x, own_w = x.detach().requires_grad_(), w.detach().requires_grad_()
    expected = F.linear(lsq(own_x, steps[1], 7, IN), lsq(own_w, steps[0], 7, IN * OUT))
    compare(layer, x, w, expected, own_x, own_w)
    for learned, step in zip((of_w, of_x), steps, strict=True):
        torch.testing.assert_close(learned.log_range.grad, step.grad * step.detach(), rtol=1e-4, atol=1e-6)


def test_bitnet_is_its_recipe_under_autograd():
    """Norm without weights, int8 tokens, ternary weights, identity gradients (arXiv 2402.17764, section 2)."""
    spec = QuantiseSpec(
        kind="quantise",
        modules=["proj"],
        norm=True,
        weight=Quantised(format="ternary"),
        input=Quantised(format="int8"),
    )
    layer, _, x = layer_under(spec, std=0.02)
    w = stored(layer)
    own_x, own_w = x.detach().requires_grad_(), w.detach().requires_grad_()
    normed = F.rms_norm(own_x, (IN,), eps=1e-5)
    token = normed.detach().abs().amax(-1, keepdim=True) / 127
    mean = own_w.detach().abs().mean()
    expected = F.linear(pass_through(normed, rounded(normed, token, 127)), pass_through(own_w, rounded(own_w, mean, 1)))
    compare(layer, x, w, expected, own_x, own_w)


@pytest.mark.parametrize("name", ["int4", "e2m1", "mxfp4", "nvfp4", "fp8_e4m3"])
def test_where_the_scale_fits_the_values_all_gradients_pass(name):
    scaling = {"mxfp4": Scaling("power", 32), "nvfp4": Scaling("two_level", 16)}.get(name, Scaling("row"))
    value = 3 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    _, pull = QuantiseCode(named(name), scaling).regenerate(value, None, None)
    grad = random_like(value)
    assert torch.equal(pull(grad), grad)


def test_before_a_range_has_seen_anything_values_and_gradients_pass():
    code = QuantiseCode(named("int4"), Scaling("range"), tracked=True)
    value = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    found, pull = code.regenerate(value, torch.zeros(1), torch.zeros(1), None, None)
    assert torch.equal(found, value)
    assert torch.equal(pull(value), value)
