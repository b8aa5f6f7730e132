"""Corners where effects meet: warm-up, adapters, several transforms of a layer, outliers, steps that are left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parallel.names import LEARNED, named_parameters
from transforms.apply import apply
from transforms.ranges import LARGEST_STEP, Moves, Range
from transforms.specs import LoraSpec, OpticalSpec, Quantised, QuantiseSpec


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(16, 8)})])

    def forward(self, x):
        return self.blocks[0]["up"](x)


def started(net, specs, warmup: int = 0):
    noise = apply(net, specs, 0, warmup)
    noise.begin(0, 0, torch.device("cpu"))
    return noise


def quantise(**operands) -> QuantiseSpec:
    return QuantiseSpec(kind="quantise", **operands)


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float32)


@pytest.mark.parametrize("step", [0, 15, 31])
def test_gradients_while_an_effect_warms_up_are_slopes_of_the_forward(step):
    """Of a value beyond a learned range, where the forward is smooth, by finite differences."""
    net = Net()
    noise = started(net, [quantise(input=Quantised(format="int8", scale="learned"))], warmup=32)
    (range_,) = noise.ranges.values()
    range_.used.fill_(0.05)
    noise.begin_step(step)
    strength = (step + 1) / 32
    x = (X.sign() * (X.abs() + 0.5)).requires_grad_()  # all far beyond

    def loss() -> torch.Tensor:
        return (net(x) * torch.arange(8.0)).sum()

    grad_x, grad_factor = torch.autograd.grad(loss(), [x, range_.log_range])
    h = 1e-2
    with torch.no_grad():
        values = []
        for shift in (h, -h):
            range_.log_range.fill_(shift)
            values.append(loss())
        range_.log_range.zero_()
        slope = (values[0] - values[1]) / (2 * h)
        weights = (torch.arange(8.0) @ net.blocks[0]["up"].weight).expand_as(x)
    scale = (127 * 16) ** 0.5  # of the gradient of a learned range
    torch.testing.assert_close(grad_factor.squeeze() * scale, slope, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(grad_x, weights * (1 - strength), rtol=1e-4, atol=1e-6)


def test_a_converter_that_warms_up_passes_a_part_of_what_it_clips():
    net = Net()
    noise = started(net, [OpticalSpec(kind="optical", attention=False, rounding="nearest")], warmup=32)
    for name, range_ in noise.ranges.items():
        range_.used.fill_(1e-3 if name.endswith("acc") else 100.0)
    noise.begin_step(7)
    x = X.clone().requires_grad_()
    weight = net.blocks[0]["up"].parametrizations.weight.original
    (grad,) = torch.autograd.grad(net(x).sum(), x)
    scale = weight.detach().abs().max() / 127
    rounded = torch.round(weight.detach() / scale) * scale
    blended = torch.lerp(weight.detach(), rounded, 0.25)
    torch.testing.assert_close(grad, (0.75 * blended.sum(0)).expand_as(x), rtol=1e-3, atol=1e-5)


def test_values_that_saturate_pass_no_gradient_without_a_scale_either():
    net = Net()
    started(net, [quantise(input=Quantised(format="int4", scale="none"))])
    x = torch.full((1, 1, 16), 3.0)
    x[..., :4] = 100.0
    x.requires_grad_()
    (grad,) = torch.autograd.grad(net(x).sum(), x)
    assert not grad[..., :4].any()
    assert grad[..., 4:].all()


def test_adapters_do_not_rename_what_is_learned():
    names = []
    for before in ([], [LoraSpec(kind="lora", rank=2)]):
        net = Net()
        spec = quantise(
            weight=Quantised(format="int4", scale="learned"), input=Quantised(format="int8", scale="learned")
        )
        noise = started(net, [*before, spec])
        names.append(sorted([n for n, _ in named_parameters(net) if n.startswith(LEARNED)] + list(noise.state())))
    layer = "transforms.blocks.0.up"
    assert names[0] == [f"{layer}.w.log_range", f"{layer}.w.range", f"{layer}.x.log_range", f"{layer}.x.range"]
    assert names[1] == names[0]


def test_clean_gradients_use_what_the_layer_would_see_without_hardware():
    """A norm stays without hardware, also behind an effect of another transform."""
    net = Net()
    specs = [
        quantise(input=Quantised(format="int2")),
        quantise(weight=Quantised(format="int8"), norm=True, gradients="clean"),
    ]
    started(net, specs)
    net(X).sum().backward()
    normed = X * torch.rsqrt(X.square().mean(-1, keepdim=True) + 1e-5)
    found = net.blocks[0]["up"].parametrizations.weight.original.grad
    torch.testing.assert_close(found, normed.sum((0, 1)).expand(8, 16), rtol=1e-4, atol=1e-5)


def test_one_value_out_of_all_proportion_does_not_end_a_layer():
    range_ = Range(0.9)

    def moved(seen: float) -> torch.Tensor:
        range_.seen.fill_(seen)
        Moves([range_]).move(lambda found: found)
        assert not range_.seen
        return range_.used

    for seen in (2.0, 1e30):
        moved(seen)
    assert range_.used == pytest.approx(0.9 * 2 + 0.1 * LARGEST_STEP * 2)
    for _ in range(30):
        moved(2.0)
    assert range_.used == pytest.approx(2.0, rel=0.1)
    for bad in (torch.inf, torch.nan, 0.0):
        before = range_.used.clone()
        assert torch.equal(moved(bad), before)


def test_what_a_dropped_step_has_seen_counts_for_nothing():
    net = Net()
    noise = started(net, [OpticalSpec(kind="optical", attention=False)])
    net(X)
    noise.end_step()
    used = [range_.used.clone() for range_ in noise.ranges.values()]
    net(1000 * X)
    noise.drop_step()
    net(X)
    noise.end_step()
    for before, range_ in zip(used, noise.ranges.values(), strict=True):
        torch.testing.assert_close(range_.used, before, rtol=0.2, atol=0.0)


def test_not_a_number_counts_alike_on_every_process():
    net = Net()
    noise = started(net, [OpticalSpec(kind="optical", attention=False)])
    x = X.clone()
    x[0, 0, 0] = torch.nan
    net(x)
    told = []
    noise.end_step(lambda seen: told.append(seen.clone()) or seen)
    assert told[0].isfinite().all()
    finite = torch.cat([X.flatten()[1:], X.new_zeros(1)])
    assert noise.ranges["transforms.blocks.0.up.x"].used == finite.abs().max()


def test_an_empty_batch_passes():
    net = Net()
    started(net, [OpticalSpec(kind="optical", attention=False)])
    assert net(X[:0]).shape == (0, 5, 8)
