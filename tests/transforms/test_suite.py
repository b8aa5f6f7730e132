"""What every device must keep: one suite for all of them, on one process."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICES, TOKENS, build, forward, gradients, saved_bytes
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.usefixtures("fresh_compiler")
every_device = pytest.mark.parametrize("device", list(DEVICES))


def fast_for(*fast: str):
    """Every device, those that are not named behind the marker of slow tests."""
    marked = [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in DEVICES]
    return pytest.mark.parametrize("device", marked)


@every_device
def test_it_acts_and_is_finite(mesh, tmp_path, text_corpus, device):
    clean, _ = build(mesh, tmp_path, text_corpus, None)
    model, noise = build(mesh, tmp_path, text_corpus, device)
    exact, found = forward(clean, None, 1), forward(model, noise, 1)
    assert torch.isfinite(found)
    assert 1e-5 < abs(float(found.detach() / exact.detach()) - 1) < 0.9
    found.backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


@every_device
def test_later_tokens_change_nothing_before_them(mesh, tmp_path, text_corpus, device):
    model, noise = build(mesh, tmp_path, text_corpus, device)
    other = TOKENS.clone()
    other[:, 20:] = (other[:, 20:] + 11) % 60
    with torch.no_grad():
        outputs = []
        for tokens in (TOKENS, other):
            noise.begin(3, 0, torch.device("cpu"))
            outputs.append(model(tokens))
    assert torch.equal(outputs[0][:, :20], outputs[1][:, :20])
    assert not torch.equal(outputs[0][:, 20:], outputs[1][:, 20:])


@every_device
def test_noise_belongs_to_the_row_and_not_to_its_micro_batch(mesh, tmp_path, text_corpus, device):
    model, noise = build(mesh, tmp_path, text_corpus, device)
    with torch.no_grad():
        noise.begin(3, 4, torch.device("cpu"))
        both = model(TOKENS)
        noise.begin(3, 5, torch.device("cpu"))
        alone = model(TOKENS[1:])
    # Another shape of a product rounds differently in the last place, which a quantiser can carry to its next level.
    assert (both[1] - alone[0]).abs().gt(1e-4 * both.abs().max()).float().mean() < 0.02


RECOMPUTED_AND_COMPILED = ("optical", "learned", "bitflip")
"""Devices for both at once: with the most state, and with the golden function that is compiled by itself."""
RECOMPUTED = [
    pytest.param(device, *how, marks=[] if device == "optical" and how == ("full", "false") else pytest.mark.slow)
    for device in DEVICES
    for how in (("full", "false"), ("selective", "false"), ("full", "true"))
    if how != ("full", "true") or device in RECOMPUTED_AND_COMPILED
]


@pytest.mark.parametrize(("device", "checkpointing", "compiled"), RECOMPUTED)
def test_recomputation_changes_no_gradient(mesh, tmp_path, text_corpus, device, checkpointing, compiled):
    changes = {"warm_steps": 1}
    expected, noise = build(mesh, tmp_path, text_corpus, device, **changes)
    forward(expected, noise, 3, first=2).backward()
    changes |= {"compile__backend": "aot_eager"} if compiled == "true" else {}
    changes |= {"activation_checkpointing__mode": checkpointing, "compile__enabled": compiled}
    model, again = build(mesh, tmp_path, text_corpus, device, **changes)
    forward(model, again, 3, first=2).backward()
    check_same(expected, noise, model, again)


@fast_for("optical")
def test_compilation_changes_no_gradient_and_needs_one_frame(mesh, tmp_path, text_corpus, monkeypatch, device):
    """One frame for all blocks and one for the head, whatever the step, its rows and the strength of the effect."""
    changes = {"model__shape__num_layers": 3, "noise__warmup_steps": 64}
    expected, noise = build(mesh, tmp_path, text_corpus, device, **changes)
    counter = CompileCounterWithBackend("aot_eager")
    block_compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: block_compile(self, fullgraph=True, backend=counter)
    )
    model, again = build(mesh, tmp_path, text_corpus, device, compile__enabled="true", **changes)
    assert counter.frame_count == 2
    for step in (20, 40, 63):
        for one, its_noise in ((expected, noise), (model, again)):
            its_noise.begin_step(step)
            forward(one, its_noise, step, first=2 * (step % 3)).backward()
        check_same(expected, noise, model, again)
        noise.end_step()
        again.end_step()
    assert counter.frame_count == 2


def check_same(expected, noise, model, again):
    """The gradients of two models, and the ranges that their devices have seen."""
    for (name, want), (_, found) in zip(gradients(expected).items(), gradients(model).items(), strict=True):
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    lost = "recomputation or compilation lost a range"
    for one, other in zip(noise.ranges.values(), again.ranges.values(), strict=True):
        torch.testing.assert_close(other.seen, one.seen, atol=0, rtol=1e-6, msg=lost)


@fast_for("optical", "int8")
@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_bytes_saved_for_the_backward(mesh, tmp_path, text_corpus, device, compiled):
    sizes = {
        "model__shape__dim": 256, "model__shape__ffn_dim": 768, "warm_steps": 0,
        "compile__enabled": compiled, "compile__backend": "aot_eager" if compiled == "true" else None,
    }  # fmt: skip
    clean = saved_bytes(*build(mesh, tmp_path, text_corpus, None, **sizes))
    # Tiles are unrolled: 2 and 6 of them compile in half the time that 8 and 24 take.
    sizes["transforms"] = f"[{DEVICES[device]}]".replace("tile = 32", "tile = 128")
    noisy = saved_bytes(*build(mesh, tmp_path, text_corpus, device, **sizes))
    assert clean > 1e6, "something must be saved for the ratio to mean anything"
    assert noisy / clean <= 1.05


@fast_for("optical")
def test_strength_grows_from_nothing_to_the_full_effect(mesh, tmp_path, text_corpus, device):
    full, noise = build(mesh, tmp_path, text_corpus, device)
    with torch.no_grad():
        expected = forward(full, noise, 5)
    model, noise = build(mesh, tmp_path, text_corpus, device, noise__warmup_steps=100)
    clean, _ = build(mesh, tmp_path, text_corpus, None)
    found = []
    with torch.no_grad():
        for step in (0, 40, 99):
            noise.begin_step(step)
            found.append(forward(model, noise, 5))
        exact = forward(clean, None, 5)
    assert torch.equal(found[2], expected)
    # The norm of b158 is a part of the model, and storage formats act from the start.
    if device != "b158" and not device.startswith("bitflip"):
        assert abs(found[0] - exact) < 0.3 * abs(expected - exact) + 1e-6 * exact
