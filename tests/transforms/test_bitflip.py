"""The bitflip effect: words and thresholds against torch's own casts, gradients against the rule written out by hand.

Gradients cannot be checked by finite differences through a stored format, whose derivative is 0 almost everywhere:
`gradcheck` in float64 is for layers whose effects are off (an adapter stays), where the operation is smooth.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from transforms.apply import TransformError, apply, match, remove
from transforms.bitflip import STORAGE, Bitflip, _decode, _encode, bit_probabilities
from transforms.context import Noise
from transforms.specs import BitflipSpec, CellFaults, LoraSpec

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INF, NAN = math.inf, math.nan
SPECIAL = [0.0, -0.0, INF, -INF, NAN, -NAN, 1.0, -1.0, 2.0**-126, -(2.0**-140), 65504.0, 65520.0, 3e38, -3.4e38, 1e-45]


def bitflip(storage="bfloat16", p=0.0, zero_above=None, role="w", probabilities=None, **changes):
    noise = Noise(0)
    probabilities = probabilities or [p] * (STORAGE[storage][0].itemsize * 8)
    effect = Bitflip(noise, "layer", role, storage, probabilities, zero_above, **changes)
    noise.fill()
    noise.begin(3, 0, CPU)
    return effect


def words(value):
    """A tensor's bits as integers, so that NaN equals itself and 0 differs from -0."""
    return value.contiguous().view(torch.int16 if value.dtype.itemsize == 2 else torch.int32)


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(words(one), words(other))


def every_pattern(dtype):
    if dtype == torch.float32:
        random = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0))
        edges = [
            0x7F7FFFFF,
            0x7F7F7FFF,
            0x7F7F8000,
            0x3F808000,
            0x3F818000,
            0x3F808001,
            0x3F807FFF,
            0x00008000,
            0x18000,
        ]
        tiny = torch.arange(0, 2**23, 997)
        ties = torch.arange(2**16) << 16 | 0x8000
        bits = torch.cat([random, torch.tensor(edges), tiny, ties]).to(torch.int32)
        return torch.cat([bits, bits ^ -(2**31)]).view(dtype).view(-1, 2)
    return torch.arange(2**16).to(torch.int16).view(dtype).view(256, 256)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_and_decoding_are_torchs_casts(storage, dtype):
    """But one of NaN's: torch's vectorised float32 cast gives bfloat16 NaN the word 0xffff, its scalar cast 0x7fc0."""
    stored, integer, _ = STORAGE[storage]
    value = every_pattern(dtype)
    word = _encode(storage, value)
    found, expected = word.to(integer), words(value.to(stored))
    if (storage, dtype) == ("bfloat16", torch.float32):
        assert (found[value.isnan()] == 0x7FC0).all()
        found, expected = found[~value.isnan()], expected[~value.isnan()]
    elif dtype != stored and torch.float16 in (dtype, stored):
        # Casts of devices differ in what becomes of a NaN's payload; here it is always the same one.
        canonical = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000}[storage]
        assert (found[value.isnan()] == canonical).all()
        found, expected = found[~value.isnan()], expected[~value.isnan()]
    assert torch.equal(found, expected)
    patterns = every_pattern(stored)
    assert same_bits(_decode(storage, words(patterns).to(torch.int32), dtype), patterns.to(dtype))
    # What lies above a word is not looked at.
    if integer == torch.int16:
        junk = words(patterns).to(torch.int32) ^ 0x5A5A0000
        assert same_bits(_decode(storage, junk, dtype), patterns.to(dtype))


@pytest.mark.parametrize("storage", STORAGE)
def test_flipping_twice_changes_nothing(storage):
    value = every_pattern(STORAGE[storage][0])
    value = value if storage != "float32" else value[::4]
    for p in (6e-4, 0.3, 1.0):
        effect = bitflip(storage, p)
        once = effect(value)
        assert not same_bits(once, value)
        assert same_bits(effect(once), value)
        assert p < 1 or torch.equal(words(once), ~words(value))


def test_probabilities_stand_at_their_bits():
    for storage, sign, num_exponent in (("bfloat16", 15, 8), ("float16", 15, 5), ("float32", 31, 8)):
        zeros = torch.zeros(64, 128, dtype=STORAGE[storage][0])
        sign_and_exponent = (1 << sign + 1) - (1 << sign - num_exponent)
        flipped = words(bitflip(storage, probabilities=bit_probabilities(storage, 1.0, 0.0))(zeros)).to(torch.int64)
        assert (flipped & (2 << sign) - 1 == sign_and_exponent).all()
        only_sign = bit_probabilities(storage, 0.0, 0.0, [1.0] + [0.0] * sign)
        assert same_bits(bitflip(storage, probabilities=only_sign)(zeros + 1.5), zeros - 1.5)
        only_last = bit_probabilities(storage, 0.0, 0.0, [0.0] * sign + [1.0])
        assert (words(bitflip(storage, probabilities=only_last)(zeros)) == 1).all()


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_p_0_is_the_round_trip_through_storage(storage, dtype):
    value = every_pattern(dtype)
    for effect in (bitflip(storage), bitflip(storage, role="x"), bitflip(storage, persistent=True, stuck=True)):
        found = effect(value.view(1, *value.shape) if effect.role == "x" else value).view(value.shape)
        stored = STORAGE[storage][0]
        if stored == dtype:
            assert same_bits(found, value)
        else:
            number = ~value.isnan()
            assert same_bits(found[number], value.to(stored).to(dtype)[number])
            assert found[~number].isnan().all()


def test_rates_at_0_within_a_law_are_the_identity():
    for p in (1e-4, 0.5):
        effect = bitflip("bfloat16", p)
        effect.set_probabilities([0.0] * 16)
        value = every_pattern(torch.bfloat16)
        assert same_bits(effect(value), value)


@pytest.mark.parametrize("storage", STORAGE)
def test_the_result_is_not_the_argument(storage):
    """Whoever changes what came out of the memory must not change what went in."""
    effect, value = bitflip(storage), torch.ones(4, 128, dtype=STORAGE[storage][0])
    assert effect(value).data_ptr() != value.data_ptr()
    compiled = torch.ops.newcompute.bitflip(value, effect.table, effect.noise.context, None, effect.code.text)
    assert compiled.data_ptr() != value.data_ptr()


# --- threshold --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [1.25, 30.0, 1.0])
@pytest.mark.parametrize("p", [0.0, 1e-4, 0.2])
def test_the_threshold_keeps_what_is_below_it(dtype, threshold, p):
    storage = str(dtype).removeprefix("torch.")
    value = every_pattern(dtype)[:: 8 if p == 0.2 else 1].clone()
    below = torch.nextafter(torch.tensor(threshold, dtype=dtype), torch.zeros((), dtype=dtype)).item()
    special = [*SPECIAL, threshold, -threshold, below, -below]
    value.view(-1)[: len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)
    flipped = bitflip(storage, p)(value)
    kept = torch.tensor([[abs(v) < threshold for v in row] for row in flipped.tolist()])
    expected = torch.where(kept, words(flipped), 0)
    found = bitflip(storage, p, threshold)(value)
    assert torch.equal(words(found), expected)
    if p == 0:
        of_special = dict(zip(map(str, special), words(found).view(-1).tolist()))
        for cleared in (NAN, INF, -INF, threshold, -threshold):
            assert of_special[str(cleared)] == 0
        assert words(found).view(-1)[1] == (-(2**31) if dtype == torch.float32 else -(2**15)), "-0 is below, and stays"
        assert of_special[str(below)] != 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.1, 0.7, 1.1, 2.3])
def test_a_threshold_between_two_numbers_of_the_format_is_not_rounded(dtype, threshold):
    """|T(x)| < t in real numbers: compiled code compares in float32, and must give the same."""
    storage = str(dtype).removeprefix("torch.")
    near = torch.tensor([threshold] * 128, dtype=torch.float64).to(dtype)
    value = torch.stack([near, torch.nextafter(near, near * 0), torch.nextafter(near, near * 2)])
    expected = [[v if v < threshold else 0.0 for v in row] for row in value.tolist()]
    assert bitflip(storage, zero_above=threshold)(value).tolist() == expected


# --- layers -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """One numbered block of linear layers between an embedding and a head."""

    def __init__(self, conv=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 20)
        block = nn.Module()
        block.up = Conv1D(36, 20) if conv else nn.Linear(20, 36)
        block.gate = Conv1D(36, 20) if conv else nn.Linear(20, 36, bias=False)
        block.norm = nn.LayerNorm(20)
        self.blocks = nn.ModuleList([block])
        self.lm_head = nn.Linear(36, 7)
        if conv:
            nn.init.normal_(block.up.bias)

    def forward(self, x):
        return self.blocks[0].up(x)


def spec(modules=("blocks.0.up",), storage="bfloat16", **operands):
    return BitflipSpec(kind="bitflip", modules=list(modules), storage=storage, **operands)


WEIGHT = CellFaults(sign_exponent=0.01, mantissa=0.05, zero_above=1.25)
INPUT = CellFaults(sign_exponent=0.02, mantissa=0.02, zero_above=3.0)
OUTPUT = CellFaults(sign_exponent=0.01, mantissa=0.03, zero_above=2.0)
SPECS = {
    "both operands": [spec(weight=WEIGHT, input=INPUT)],
    "no threshold": [spec(weight=CellFaults(mantissa=0.05), input=CellFaults(mantissa=0.02))],
    "weight": [spec(weight=WEIGHT)],
    "input": [spec(input=INPUT)],
    "output": [spec(output=OUTPUT)],
    "all": [spec(weight=WEIGHT, input=INPUT, output=OUTPUT)],
    "two": [spec(weight=WEIGHT, input=INPUT), spec(weight=CellFaults(mantissa=0.1, zero_above=0.2), input=WEIGHT)],
    "two formats": [
        spec(weight=CellFaults(mantissa=0.1, zero_above=0.15), input=CellFaults(mantissa=0.1), output=OUTPUT),
        spec(storage="float16", weight=WEIGHT, input=INPUT, output=CellFaults(mantissa=0.2, zero_above=0.5)),
    ],
}


def started(net, specs, seed=0, **at):
    noise = apply(net, specs, seed)
    noise.begin(**{"step": 2, "first_sample": 4, "device": CPU, **at})
    return noise


def effects_by_hand(specs, operand, role, name, value):
    """T(value) and the mask of its gradient, effect after effect, by standalone effects with the layer's keys."""
    mask = torch.ones_like(value, dtype=torch.bool)
    noise = Noise(0)
    for number, one in enumerate(s for s in specs if s.kind == "bitflip"):
        faults = getattr(one, operand)
        if faults is None:
            continue
        probabilities = bit_probabilities(one.storage, faults.sign_exponent, faults.mantissa, faults.bits)
        effect = Bitflip(noise, name, role, one.storage, probabilities, stream=str(number) if number else "")
        noise.fill()
        noise.begin(2, 4, CPU)
        flipped = effect(value)
        kept = flipped.abs() < (faults.zero_above or INF) if faults.zero_above else torch.ones_like(mask)
        value, mask = torch.where(kept, flipped, torch.zeros_like(flipped)), mask & kept
    return value, mask


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("what", SPECS)
def test_gradients_are_those_of_the_noisy_operands_behind_the_masks(what, conv):
    specs, net = SPECS[what], Net(conv)
    layer = net.blocks[0].up
    stored, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    weight = stored.t() if conv else stored
    x, grad = torch.randn(2, 5, 20, requires_grad=True), torch.randn(2, 5, 36)
    started(net, specs)
    y = layer(x)
    y.backward(grad)

    noisy_x, mask_x = effects_by_hand(specs, "input", "x", "blocks.0.up", x.detach())
    noisy_w, mask_w = effects_by_hand(specs, "weight", "w", "blocks.0.up.weight", weight)
    product = F.linear(noisy_x, noisy_w, bias)
    out, mask_y = effects_by_hand(specs, "output", "out", "blocks.0.up", product)
    g = grad * mask_y
    if what not in ("output", "no threshold", "input"):
        assert 0 < int((~mask_w).sum()) < mask_w.numel()
    if what in ("both operands", "input", "all", "two"):
        assert 0 < int((~mask_x).sum()) < mask_x.numel()
    if what in ("output", "all", "two formats"):
        assert 0 < int((~mask_y).sum()) < mask_y.numel()

    torch.testing.assert_close(y.detach(), out, rtol=0, atol=0)
    torch.testing.assert_close(x.grad, mask_x * (g @ noisy_w))
    flat = g.flatten(0, 1)
    grad_w = mask_w * (flat.t() @ noisy_x.flatten(0, 1))
    torch.testing.assert_close(
        layer.parametrizations.weight.original.grad if any(s.weight for s in specs) else layer.weight.grad,
        grad_w.t() if conv else grad_w,
    )
    torch.testing.assert_close(layer.bias.grad, flat.sum(0))
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_backward_belongs_to_its_own_forward():
    """As pipelines run: the backward of one micro-batch comes after the forward of the next."""
    net = Net()
    noise = started(net, SPECS["both operands"])
    x, layer = torch.randn(2, 5, 20), net.blocks[0].up
    original = layer.parametrizations.weight.original
    at = [(2, 0), (3, 2)]
    grads, losses = [], []
    for step, first in at:
        noise.begin(step, first, CPU)
        grads.append(torch.autograd.grad(layer(x).square().sum(), original)[0])
    for step, first in at:
        noise.begin(step, first, CPU)
        losses.append(layer(x).square().sum())
    for loss, grad in zip(losses, grads, strict=True):
        assert torch.equal(torch.autograd.grad(loss, original)[0], grad)
    assert not torch.equal(*grads)


@pytest.mark.parametrize("conv", [False, True])
def test_an_adapter_before_bitflip_has_the_gradients_of_the_plain_graph(conv):
    net = Net(conv)
    layer = net.blocks[0].up
    lora = LoraSpec(kind="lora", modules=["blocks.0.up"], rank=3, alpha=6.0)
    specs = [*SPECS["two"], lora]  # an adapter comes first, wherever it stands
    started(net, specs)
    adapter = layer.parametrizations.weight[0]
    nn.init.normal_(adapter.lora_B, std=0.3)
    x, grad = torch.randn(2, 5, 20, requires_grad=True), torch.randn(2, 5, 36)
    y = layer(x)
    y.backward(grad)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        "blocks.0.up.parametrizations.weight.0.lora_A",
        "blocks.0.up.parametrizations.weight.0.lora_B",
    }

    a, b, plain_x = (t.detach().clone().requires_grad_() for t in (adapter.lora_A, adapter.lora_B, x))
    original = layer.parametrizations.weight.original.detach()
    effective = torch.addmm(original.t() if conv else original, b, a, alpha=2.0)
    noisy_w, mask_w = effects_by_hand(specs, "weight", "w", "blocks.0.up.weight", effective.detach())
    noisy_x, mask_x = effects_by_hand(specs, "input", "x", "blocks.0.up", x.detach())
    # Straight through: a constant brings the value to the noisy one, the mask says what has a gradient.
    through_w = torch.where(mask_w, effective, 0.0)
    through_w = noisy_w + (through_w - through_w.detach())
    through_x = torch.where(mask_x, plain_x, 0.0)
    through_x = noisy_x + (through_x - through_x.detach())
    expected = F.linear(through_x, through_w, layer.bias.detach())
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(adapter.lora_A.grad, a.grad)
    torch.testing.assert_close(adapter.lora_B.grad, b.grad)
    torch.testing.assert_close(x.grad, plain_x.grad)
    assert float(a.grad.norm()) > 0
    assert float(b.grad.norm()) > 0


@pytest.mark.parametrize("conv", [False, True])
def test_finite_differences_with_the_effects_off(conv):
    net = Net(conv).double()
    layer = net.blocks[0].up
    lora = LoraSpec(kind="lora", modules=["blocks.0.up"], rank=2, alpha=3.0)
    noise = started(net, [*SPECS["all"], lora])
    nn.init.normal_(layer.parametrizations.weight[0].lora_B)
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
    with noise.off():
        assert torch.autograd.gradcheck(lambda *inputs: layer(inputs[0]), (x, *layer.parameters()), fast_mode=True)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True])
def test_the_weight_shows_what_the_hardware_has(conv):
    net, plain = Net(conv), Net(conv)
    noise = started(net, SPECS["two"])
    layer, weight = net.blocks[0].up, plain.blocks[0].up.weight.detach()
    shown = layer.weight.detach().clone()
    expected, _ = effects_by_hand(SPECS["two"], "weight", "w", "blocks.0.up.weight", weight.t() if conv else weight)
    assert same_bits(shown, expected.t().contiguous() if conv else expected)
    x = torch.randn(1, 3, 20)
    with noise.off():
        assert torch.equal(layer.weight, weight)
    noise.begin(3, 4, CPU)
    assert not torch.equal(layer.weight, shown)
    noise.begin(2, 9, CPU)
    assert torch.equal(layer.weight, shown)
    noise.enter("validation")
    assert not torch.equal(layer.weight, shown)
    noise.enter("train")
    assert torch.equal(layer.weight, shown)
    assert layer(x).shape == (1, 3, 36)


def test_state_dict_keys_and_parameters():
    net, plain = Net(), Net()
    started(net, [spec(["blocks.0.*"], weight=WEIGHT, input=INPUT, output=OUTPUT)])
    renamed = {
        key.replace("up.weight", "up.parametrizations.weight.original").replace(
            "gate.weight", "gate.parametrizations.weight.original"
        ): value
        for key, value in plain.state_dict().items()
    }
    assert set(net.state_dict()) == set(renamed)
    for key, value in net.state_dict().items():
        assert torch.equal(value, renamed[key])
    assert net.load_state_dict(renamed, strict=True)
    assert parametrize.is_parametrized(net.blocks[0].up, "weight")


@pytest.mark.parametrize("conv", [False, True])
def test_remove_restores_the_model(conv):
    net, plain = Net(conv), Net(conv)
    up = net.blocks[0].up
    attributes, weight, kind = set(vars(up)), up.weight, type(up)
    started(net, [spec(["blocks.0.*"], weight=WEIGHT, input=INPUT, output=OUTPUT), *SPECS["two"]])
    remove(net)
    assert type(up) is kind
    assert up.weight is weight
    assert repr(net) == repr(plain)
    assert [name for name, _ in net.named_modules()] == [name for name, _ in plain.named_modules()]
    x = torch.randn(2, 3, 20)
    assert torch.equal(net(x), plain(x))
    for key, value in plain.state_dict().items():
        assert torch.equal(net.state_dict()[key], value)
    up.weight = nn.Parameter(torch.zeros_like(weight))
    assert not net.state_dict()["blocks.0.up.weight"].any()
    assert set(vars(up)) == attributes


def test_remove_restores_the_order_of_the_parameters():
    """An optimizer's state goes by it."""
    net, plain = Net(), Net()
    started(net, [spec(weight=WEIGHT)])
    remove(net)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_a_model_can_be_transformed_again_after_remove():
    net, other = Net(), Net()
    x = torch.randn(2, 3, 20)
    started(net, SPECS["two"])
    remove(net)
    started(net, SPECS["all"], seed=1)
    started(other, SPECS["all"], seed=1)
    assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("conv", [False, True])
def test_layers_of_one_class_share_one_class(conv):
    net, other = Net(conv), Net(conv)
    started(net, [spec(["blocks.0.*"], weight=WEIGHT), spec(["blocks.0.up"], input=INPUT)])
    started(other, SPECS["all"])
    block = net.blocks[0]
    assert type(block.up) is type(block.gate) is type(other.blocks[0].up)
    assert isinstance(block.up, Conv1D if conv else nn.Linear)
    assert type(net.lm_head) is nn.Linear
    assert block.up.plan.weight == other.blocks[0].up.plan.weight


@pytest.mark.parametrize("what", SPECS)
def test_off_gives_the_clean_result(what):
    net, plain = Net(), Net()
    noise = started(net, SPECS[what])
    x = torch.randn(2, 3, 20, requires_grad=True)
    with noise.off():
        y = net(x)
        y.sum().backward()
        with torch.no_grad():
            assert torch.equal(net(x), y)
    assert not noise.clean
    grad, x.grad = x.grad, None
    expected = plain(x)
    expected.sum().backward()
    assert torch.equal(y, expected)
    torch.testing.assert_close(grad, x.grad)
    assert not torch.equal(net(x), y)


def test_a_forward_before_begin_is_an_error():
    net = Net()
    apply(net, SPECS["all"], 0)
    with pytest.raises(RuntimeError, match=r"before Noise\.begin"):
        net(torch.zeros(1, 2, 20))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"before Noise\.begin"):
        net(torch.zeros(1, 2, 20))


def test_rows_that_belong_to_no_token_are_an_error():
    net = Net()
    noise = started(net, SPECS["input"])
    with pytest.raises(ValueError, match="not \\(batch, sequence, features\\)"):
        net(torch.zeros(6, 20))
    noise.begin(0, 0, CPU, tokens=torch.zeros(2, 2, 3, dtype=torch.int64))
    assert net(torch.zeros(6, 20)).shape == (6, 36)
    for shape in ((5, 20), (3, 3, 20), (2, 4, 20)):
        with pytest.raises(ValueError, match="does not belong"):
            net(torch.zeros(*shape))


def test_probabilities_change_within_their_law():
    for before, after, too_many in ((1e-4, 1e-5, 1e-3), (0.5, 1e-3, None)):
        effect = bitflip("bfloat16", before)
        code, zeros = effect.code, torch.zeros(512 if before < 0.01 else 64, 512, dtype=torch.bfloat16)
        for p in (before, after, 0.0, before):
            effect.set_probabilities([p] * 16)
            flips = sum(int(((words(effect(zeros)) >> bit) & 1).sum()) for bit in range(16))
            due = zeros.numel() * 16 * p
            assert abs(flips - due) <= 4 * math.sqrt(due * (1 - p))
            assert effect.code is code
        if too_many:
            table, probabilities = effect.table.clone(), effect.probabilities
            with pytest.raises(ValueError, match="slots"):
                effect.set_probabilities([too_many] * 16)
            assert torch.equal(effect.table, table)
            assert effect.probabilities == probabilities
    effect = bitflip("bfloat16", 0.0)
    with pytest.raises(ValueError):
        effect.set_probabilities([1e-9] * 16)


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("blocks.0.upp", r"'blocks\.0\.upp' matches no layer; the nearest layer is 'blocks\.0\.up'"),
        ("re:.*up_proj", r"'re:\.\*up_proj' matches no layer"),
        ("*.norm", r"'\*\.norm' matches no linear layer, only LayerNorm"),
        ("embed", "'embed' matches no linear layer, only Embedding"),
        ("blocks.0.own", r"blocks\.0\.own is a OwnLinear"),
    ],
)
def test_what_cannot_be_transformed_is_named(pattern, says):
    net = Net()
    net.blocks[0].own = OwnLinear(20, 20)
    keys = list(net.state_dict())
    for kind in (spec([pattern], weight=WEIGHT), LoraSpec(kind="lora", modules=[pattern])):
        with pytest.raises(TransformError, match=says) as error:
            apply(net, [spec(weight=WEIGHT), kind], 0)
        assert error.value.index == 1
        assert list(net.state_dict()) == keys
        assert type(net.blocks[0].up) is nn.Linear
        assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(TransformError, match=r"blocks\.\*\.own\.weight \(21\.7%\)"):
        apply(net, [BitflipSpec(kind="bitflip", weight=WEIGHT)], 0)
    with pytest.raises(TransformError, match="OwnLinear"):
        apply(net, [LoraSpec(kind="lora")], 0)


def test_patterns_choose_layers():
    net = Net()

    def names(*patterns):
        return [name for name, _ in match(net, spec(patterns, weight=WEIGHT))]

    assert names() == ["blocks.0.up", "blocks.0.gate"]
    assert names("*") == ["blocks.0.up", "blocks.0.gate", "lm_head"]
    assert names("lm_head", "*.gate") == ["lm_head", "blocks.0.gate"]
    assert names("re:blocks\\.\\d+\\.(up|norm)", "*.up") == ["blocks.0.up"]
    with pytest.raises(TransformError):
        names("re:up")
