"""Compilation and recomputation of blocks with bit errors: what the suite of all devices leaves out."""

from __future__ import annotations

import pytest
import torch
from devices import TOKENS, build, forward
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from transforms.bitflip import Bitflip, bit_probabilities
from transforms.context import Noise
from transforms.linear import TransformedOutput
from transforms.scales import Scaling

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
pytestmark = pytest.mark.usefixtures("fresh_compiler")


MANY = pytest.param("none", 12, 20, marks=pytest.mark.slow)
FULL = pytest.param("full", 4, 3, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("checkpointing", "num_layers", "num_steps"), [("none", 4, 3), ("selective", 4, 3), FULL, MANY]
)
def test_one_frame_for_all_layers_and_steps(
    mesh, tmp_path, text_corpus, monkeypatch, checkpointing, num_layers, num_steps
):
    if checkpointing == "none":
        torch._dynamo.reset()  # also of golden functions: what an earlier test met must not count as compiled
    counter = CompileCounterWithBackend("aot_eager")
    block_compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: block_compile(self, fullgraph=True, backend=counter)
    )
    model, noise = build(
        mesh, tmp_path, text_corpus, "bitflip", model__shape__num_layers=num_layers, compile__enabled="true",
        activation_checkpointing__mode=checkpointing,
    )  # fmt: skip
    forward(model, noise, 0).backward()
    # One frame for all blocks (the first one's input needs a gradient as well: the embedding is trained), one for the head.
    assert counter.frame_count == 2
    graphs = counters["stats"]["unique_graphs"]
    for step in range(num_steps):
        for effect in noise._effects:
            effect.set_probabilities([p * 0.99 for p in effect.probabilities])
        forward(model, noise, step, first=2 * (step % 3)).backward()
    assert counter.frame_count == 2
    assert counters["stats"]["unique_graphs"] == graphs, "the golden function was compiled again"
    with torch.no_grad():
        for step in range(3):
            forward(model, noise, step)
    assert counter.frame_count == 4, "one more frame each without gradients"


@pytest.mark.parametrize(
    ("checkpointing", "compiled"),
    [
        pytest.param("none", "false", id="none-eager"),
        pytest.param("none", "true", id="none-compiled"),
        pytest.param("full", "false", id="full-eager"),
        pytest.param("full", "true", id="full-compiled", marks=pytest.mark.slow),
        pytest.param("selective", "false", id="selective-eager"),
        pytest.param("selective", "true", id="selective-compiled", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_interleaved_forwards_and_backwards(mesh, tmp_path, text_corpus, checkpointing, compiled):
    model, noise = build(
        mesh, tmp_path, text_corpus, "bitflip", compile__enabled=compiled,
        compile__backend="aot_eager" if compiled == "true" else None,
        activation_checkpointing__mode=checkpointing,
    )  # fmt: skip
    other = (TOKENS + 17) % 60

    def gradients(order: str) -> list[torch.Tensor]:
        model.zero_grad()
        loss = {}
        for event in order.split():
            i = int(event[1])
            if event[0] == "f":
                loss[i] = forward(model, noise, i, first=2 * i, tokens=(TOKENS, other)[i])
            else:
                loss[i].backward()
        return [p.grad.to_local().clone() for p in model.parameters()]

    apart = gradients("f0 b0 f1 b1")
    only_first = gradients("f0 b0")
    assert any(not torch.allclose(a, b, atol=1e-6) for a, b in zip(apart, only_first)), "the second forward must count"
    for order in ("f0 f1 b0 b1", "f0 f1 b1 b0"):
        for expected, found in zip(apart, gradients(order), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_through_a_result_that_is_an_intermediate(dtype):
    """The last step of this effect casts to the dtype that the result may already have, and no threshold follows it. On
    torch 2.11 the gradient of such a result was lost where it was compiled (`transforms.effect.separate`)."""
    noise = Noise(0)
    noise.begin(3, 4, torch.device("cpu"))
    probabilities = bit_probabilities("int8", 0.001, 0.001)
    effect = Bitflip(noise, "layer", "out", "int8", probabilities, scaling=Scaling("row"))
    effect.fill(0, "train")
    value, grad = torch.randn(2, 8, 64, dtype=dtype, requires_grad=True), torch.randn(2, 8, 64, dtype=dtype)

    def through(value: torch.Tensor) -> torch.Tensor:
        return TransformedOutput.apply(effect.code, False, None, value, *noise.place(), *effect.tensors)

    (expected,) = torch.autograd.grad(through(value), value, grad)
    (found,) = torch.autograd.grad(torch.compile(through, fullgraph=True, backend="aot_eager")(value), value, grad)
    assert torch.equal(expected, grad), "it passes the gradient on"
    assert torch.equal(found, grad)


def test_operations_are_what_the_compiler_takes_them_for():
    """Schema, fake results, no aliasing: torch's own checks of the two operations that compiled blocks contain."""
    noise = Noise(0)
    noise.begin(3, 4, torch.device("cpu"))
    probabilities = bit_probabilities("bfloat16", 0.001, 0.0)
    for role, value in (
        ("w", torch.randn(40, 24)),
        ("x", torch.randn(2, 8, 40)),
        ("x", torch.randn(2, 8, 40).bfloat16()),
    ):
        effect = Bitflip(noise, "layer", role, "bfloat16", probabilities)
        effect.fill(0, "train")
        arguments = (value, effect.table, noise.context, None, effect.code.text)
        torch.library.opcheck(torch.ops.newcompute.bitflip.default, arguments, test_utils=CHECKS)
    torch.library.opcheck(torch.ops.newcompute.after.default, (noise.context, torch.randn(3)), test_utils=CHECKS)
