"""Compilation, recomputation and memory of transformed blocks."""

from __future__ import annotations

import pytest
import torch
from support import tiny_flags
from torch._dynamo import convert_frame
from torch._dynamo.eval_frame import reset_code
from torch._dynamo.pgo import reset_code_state
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from models.llama import Llama
from parallel import apply as parallelize
from parallel import mesh as meshes
from parallel.init import init_weights
from train.config import named_shape
from train.config_sources import load_config
from transforms.bitflip import Bitflip, bit_probabilities
from transforms.context import Noise

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
FAULTS = "{ sign_exponent = 0.0005, mantissa = 0.0005, zero_above = 8.0 }"
BITFLIP = f'[{{ kind = "bitflip", weight = {FAULTS}, input = {FAULTS} }}]'
TOKENS = torch.arange(2 * 32).view(2, 32) % 60


@pytest.fixture(scope="module")
def mesh():
    mesh = meshes.start("cpu")
    yield mesh
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Forget compiled blocks, not the golden functions, whose tracing takes a second for each variant."""
    for seen in {*convert_frame.input_codes.seen, *convert_frame.output_codes.seen}:
        code = seen()
        if code is not None and code.co_name != "golden_compiled":
            reset_code(code)
    reset_code_state()
    counters.clear()


def build(mesh, tmp_path, corpus, **changes) -> tuple[Llama, Noise | None]:
    """A parallelised tiny model with its noise, as a job builds it."""
    changes = {"transforms": BITFLIP, "model__shape__num_layers": 3, "training__sequence_length": 32} | changes
    config = load_config([], tiny_flags(tmp_path, corpus, **changes), world_size=1)
    with torch.device("meta"):
        model = Llama(named_shape(config.model, 60), context=32)
    noise = parallelize.apply(model, config, mesh).noise
    model.to_empty(device="cpu")
    model.reset_after_to_empty()
    if noise is not None:
        noise.fill()
    init_weights([model], 5)
    return model, noise


def forward(model, noise, step: int, first: int = 0, tokens=TOKENS):
    if noise is not None:
        noise.begin(step, first, torch.device("cpu"))
    return model(tokens).square().mean()


MANY = [pytest.param(mode, 24, 50, marks=pytest.mark.slow) for mode in ("none", "full", "selective")]


@pytest.mark.parametrize(("checkpointing", "num_layers", "num_steps"), [("none", 4, 3), ("selective", 4, 3), *MANY])
def test_one_frame_for_all_layers_and_steps(
    mesh, tmp_path, text_corpus, monkeypatch, checkpointing, num_layers, num_steps
):
    if num_layers == 24 or checkpointing == "none":
        torch._dynamo.reset()  # also of golden functions: what an earlier test met must not count as compiled
    counter = CompileCounterWithBackend("aot_eager")
    block_compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: block_compile(self, fullgraph=True, backend=counter)
    )
    model, noise = build(
        mesh, tmp_path, text_corpus, model__shape__num_layers=num_layers, compile__enabled="true",
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
        mesh, tmp_path, text_corpus, compile__enabled=compiled, compile__backend="aot_eager",
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


@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow), "selective"])
def test_gradients_do_not_depend_on_recomputation_or_compilation(mesh, tmp_path, text_corpus, mode):
    def gradients(**changes) -> list[torch.Tensor]:
        model, noise = build(mesh, tmp_path, text_corpus, **changes)
        forward(model, noise, 3, first=2).backward()
        return [p.grad.to_local().clone() for p in model.parameters()]

    expected = gradients()
    for compiled in ("false", "true"):
        changes = {"activation_checkpointing__mode": mode, "compile__enabled": compiled}
        for found, reference in zip(gradients(**changes, compile__backend="aot_eager"), expected, strict=True):
            torch.testing.assert_close(found, reference, atol=1e-6, rtol=1e-5)


def saved_bytes(model, noise) -> int:
    """Bytes that a forward keeps for its backward, each storage once, parameters and buffers left out."""
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    forward(model, noise, 0).backward()  # compilation and the gathering of parameters come first
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, noise, 0)
    # Between forward and backward FSDP shows the gathered parameters, which are what was saved.
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    loss.backward()
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_bytes_saved_for_the_backward(mesh, tmp_path, text_corpus, compiled):
    sizes = {
        "model__shape__dim": 512, "model__shape__ffn_dim": 1536, "training__sequence_length": 32,
        "compile__enabled": compiled,
    }  # fmt: skip
    clean = saved_bytes(*build(mesh, tmp_path, text_corpus, transforms="[]", **sizes))
    noisy = saved_bytes(*build(mesh, tmp_path, text_corpus, **sizes))
    assert clean > 1e6, "something must be saved for the ratio to mean anything"
    assert noisy / clean <= 1.05


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
