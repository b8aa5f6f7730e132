"""Shards of an operand: put together again they are the whole operand's result, bit for bit, and so are gradients.

The reference is always the golden function on the unsharded operand. The Triton kernels run in the interpreter, in one
other process, as in `test_kernels.py`: this file as a script.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transforms.bitflip import Bitflip, BitflipCode, bit_probabilities, golden
from transforms.context import Noise
from transforms.noise import philox_4x32
from transforms.sampling import CHUNK, DRAWS, Span, choose_law, failed_cells, make_table

STEP, GROUP, FIRST_SAMPLE = 7, 3, 11
KEY = (0xFEDCBA98, 0x12345678)
CONTEXT = torch.tensor([STEP, GROUP, FIRST_SAMPLE])


@dataclass(frozen=True)
class Effect:
    law: str
    probabilities: tuple[float, ...]
    """From the least significant bit upwards."""
    storage: str = "bfloat16"
    value: torch.dtype = torch.bfloat16
    zero_above: float | None = None
    persistent: bool = False
    stuck: bool = False

    def on(self, of_weight: bool) -> tuple[BitflipCode, Tensor]:
        law = choose_law(self.probabilities, self.persistent)
        assert law.name == self.law
        code = BitflipCode(law, self.storage, of_weight, self.zero_above, self.persistent, self.stuck)
        return code, torch.tensor([*KEY, *make_table(law, self.probabilities)])


SPARSE = (2.0**-10,) * 16
EFFECTS = {
    "chunk": Effect("chunk", SPARSE),
    "chunk, thinned": Effect("chunk", tuple(2.0**-8 if bit % 3 else 2.0**-9 for bit in range(4)) + (0,) * 12),
    "chunk, stuck": Effect("chunk", SPARSE, stuck=True),
    "chunk, threshold": Effect("chunk", SPARSE, zero_above=0.7),
    "chunk, float16": Effect("chunk", SPARSE, "float16", torch.float32, zero_above=0.7),
    "dense": Effect("dense", (0.1,) * 16),
    "dense, float32": Effect("dense", tuple(bit / 64 for bit in range(32)), "float32", torch.float32),
    "dense, threshold": Effect("dense", (0.05,) * 16, value=torch.float32, zero_above=1.25),
    "dense, persistent": Effect("dense", (0.01,) * 16, persistent=True),
    "dense, persistent, stuck": Effect("dense", (0.2,) * 16, persistent=True, stuck=True),
    "none": Effect("none", (0.0,) * 16, value=torch.float32, zero_above=0.7),
}
ACTIVATIONS = {
    "odd": ((2, 5, 301), None),
    "whole chunks": ((1, 3, 640), None),
    "narrow": ((3, 9, 7), None),
    "tokens": ((2, 5, 301), (2, 5)),
    "flattened": ((10, 301), (2, 5)),
    "rows of no text": ((1, 3, 301), (2, 5)),
}
WEIGHTS = {
    "odd": (37, 43),
    "wide": (5, 301),
    "whole chunks": (6, 640),
    "halves of a chunk": (10, 192),
    "one row": (1, 301),
    "vector": (1000,),
}


def splits(size: int) -> Iterator[list[int]]:
    """Bounds of 2 to 5 shards, as equal as they can be and then cut anywhere."""
    pick = random.Random(size)
    for parts in range(2, min(5, size) + 1):
        yield [size * part // parts for part in range(parts + 1)]
        yield [0, *sorted(pick.sample(range(1, size), parts - 1)), size]


def operand(shape: tuple[int, ...], effect: Effect, batch: tuple[int, int] | None = None):
    """A value, a gradient, and the tokens of a batch."""
    generator = torch.Generator().manual_seed(sum(shape))
    value, grad = (torch.randn(shape, generator=generator).to(effect.value) for _ in range(2))
    tokens = None if batch is None else torch.randint(0, 2**32, (2, *batch), generator=generator)
    return value, grad, tokens


Place = tuple[Tensor, Tensor, Tensor | None]
Run = Callable[[BitflipCode, Tensor, Tensor, Place], tuple[Tensor, Tensor]]
"""Code, value, gradient and what is the same for all shards -> what is stored, and the gradient that passes."""


def eager(code: BitflipCode, value: Tensor, grad: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    stored, pull = code.regenerate(value, *place)
    return stored, pull(grad)


def sharded(run: Run, code, value: Tensor, grad: Tensor, place: Place, bounds: list[int], dim: int = -1):
    """What `run` makes of an operand shard by shard, along the rows (0) or the columns (-1)."""
    found = []
    for begin, end in pairwise(bounds):
        if not code.of_weight or value.dim() == 1:
            window = {"first_column": begin}
        elif dim == 0:
            window = {"first_row": begin, "columns": random.Random(begin).choice([0, value.shape[1]])}
        else:
            window = {"first_column": begin, "columns": value.shape[1]}
        shard = replace(code, **window)
        found.append(run(shard, *(t.narrow(dim, begin, end - begin) for t in (value, grad)), place))
    return [torch.cat(parts, dim) for parts in zip(*found, strict=True)]


def words(value: Tensor) -> Tensor:
    """A tensor's bits as integers: NaN equals itself, and 0 differs from -0."""
    return value.contiguous().view(torch.int16 if value.dtype.itemsize == 2 else torch.int32)


def differ(found, wanted) -> str:
    """Empty where all bits of results and gradients agree."""
    for what, one, other in zip(("result", "gradient"), found, wanted):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{what}: {one.dtype} {tuple(one.shape)}"
        differs = words(one) != words(other)
        if differs.any():
            return f"{what}: {int(differs.sum())} of {one.numel()} elements"
    return ""


# --- the golden function ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ACTIVATIONS)
@pytest.mark.parametrize("name", EFFECTS)
def test_shards_of_features(name, what):
    shape, batch = ACTIVATIONS[what]
    code, table = EFFECTS[name].on(of_weight=False)
    value, grad, tokens = operand(shape, EFFECTS[name], batch)
    place = (table, CONTEXT, tokens)
    wanted = eager(code, value, grad, place)
    assert code.law.name == "none" or value.numel() < 1000 or differ(wanted, (value, grad)), "something must flip"
    for bounds in splits(shape[-1]):
        assert not differ(sharded(eager, code, value, grad, place, bounds), wanted), bounds


@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize("name", EFFECTS)
def test_shards_of_a_weight(name, what):
    shape = WEIGHTS[what]
    code, table = EFFECTS[name].on(of_weight=True)
    value, grad, _ = operand(shape, EFFECTS[name])
    place = (table, CONTEXT, None)
    wanted = eager(code, value, grad, place)
    assert code.law.name == "none" or value.numel() < 1000 or differ(wanted, (value, grad)), "something must flip"
    for dim in {0, len(shape) - 1}:
        for bounds in splits(shape[dim]):
            found = sharded(eager, code, value, grad, place, bounds, dim=0 if dim == 0 else -1)
            assert not differ(found, wanted), (dim, bounds)


@pytest.mark.parametrize("name", ["chunk", "dense, persistent, stuck"])
def test_a_block_of_a_weight(name):
    """Rows and columns at once, and of a weight that is not contiguous."""
    code, table = EFFECTS[name].on(of_weight=True)
    value, _, _ = operand((23, 301), EFFECTS[name])
    wanted = golden(code, value, table, CONTEXT, None)
    for rows, columns in ((slice(0, 9), slice(0, 150)), (slice(9, 23), slice(128, 301)), (slice(22, 23), slice(5, 6))):
        block = replace(code, first_row=rows.start, first_column=columns.start, columns=301)
        for shard in (value[rows, columns], value[rows, columns].t().contiguous().t()):
            assert torch.equal(words(golden(block, shard, table, CONTEXT, None)), words(wanted[rows, columns]))


@pytest.mark.parametrize("name", ["chunk", "dense"])
def test_elements_beyond_32_bits_keep_their_numbers(name):
    """Every element of a small window far inside a large weight, with the words of its own chunk."""
    code, table = EFFECTS[name].on(of_weight=True)
    row, column, columns = 2**23 + 5, 900, 1001
    zeros = torch.zeros(11, 90, dtype=torch.bfloat16)
    shard = replace(code, first_row=row, first_column=column, columns=columns)
    found = golden(shard, zeros, table, CONTEXT, None).view(torch.int16)
    number = (row + torch.arange(11))[:, None] * columns + column + torch.arange(90)

    def drawn(draw: Tensor) -> tuple[Tensor, ...]:
        at = (number // CHUNK).view(1, -1) * DRAWS + draw
        return philox_4x32((at & 0xFFFFFFFF, at >> 32, GROUP, STEP), KEY)

    chunks = failed_cells(code.law, table[2:], drawn)[0]  # that of every element
    wanted = chunks.gather(1, (number % CHUNK).view(-1, 1)).view(11, 90).to(torch.int16)
    assert wanted.any()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("of_weight", [False, True])
def test_empty_shards(of_weight):
    code, table = EFFECTS["chunk"].on(of_weight)
    for shape in ((0, 3, 5), (2, 3, 0)) if not of_weight else ((0, 300), (5, 0)):
        shard = replace(code, first_row=3, first_column=0 if of_weight else 9, columns=300)
        for run in (golden, lambda code, *arguments: torch.ops.newcompute.bitflip(*arguments, code.text)):
            assert run(shard, torch.zeros(shape), table, CONTEXT, None).shape == shape


# --- where shards stand -----------------------------------------------------------------------------------------------


def test_the_chunks_of_rows_are_those_that_they_touch():
    for width in (1, 5, 127, 128, 129, 300):
        for start in (0, 1, 64, 100, 128, 500):
            for stride in (0, 128, 640, 192, 48, 301):
                span = Span(width, start, stride)
                begins = [start + stride * row for row in range(CHUNK)]
                assert span.skip == max(begin % CHUNK for begin in begins)
                assert span.chunks == max((begin % CHUNK + width - 1) // CHUNK + 1 for begin in begins)


def test_aligned_shards_cost_no_more_than_their_elements():
    code, _ = EFFECTS["chunk"].on(of_weight=True)
    value = torch.empty(6, 256, device="meta")
    for window, span in (
        ((3, 0, 0), Span(6 * 256, 3 * 256)),
        ((3, 0, 256), Span(6 * 256, 3 * 256)),
        ((3, 128, 640), Span(256, 3 * 640 + 128, 640)),
    ):
        first_row, first_column, columns = window
        found = replace(code, first_row=first_row, first_column=first_column, columns=columns).span(value)
        assert (found, found.skip, found.chunks) == (span, 0, span.width // CHUNK)


def test_a_window_belongs_to_the_code():
    noise = Noise(0)
    probabilities = bit_probabilities("bfloat16", 0.1, 0.1)
    whole, shard = (
        Bitflip(noise, "layer", "w", "bfloat16", probabilities, window=window) for window in ((0, 0, 0), (4, 8, 300))
    )
    noise.fill()
    noise.begin(3, 0, torch.device("cpu"))
    code = shard.code
    assert (code.first_row, code.first_column, code.columns) == (4, 8, 300)
    assert code != whole.code
    assert hash(code) != hash(whole.code)
    assert BitflipCode.read(code.text) == code
    assert BitflipCode.placeless(code.text) == BitflipCode.read(whole.code.text) == whole.code
    value = torch.randn(9, 300)
    assert torch.equal(words(shard(value[4:, 8:50])), words(whole(value)[4:, 8:50]))


def test_columns_beyond_the_weight_are_an_error():
    code, table = EFFECTS["chunk"].on(of_weight=True)
    for window in ({"first_column": 258, "columns": 300}, {"first_column": 1}, {"columns": 42}):
        with pytest.raises(ValueError, match="are not within a weight of"):
            golden(replace(code, **window), torch.zeros(37, 43), table, CONTEXT, None)


# --- compiled ---------------------------------------------------------------------------------------------------------

# Few bits, which compile faster.
COMPILED = {
    "chunk": Effect("chunk", (0.0,) * 7 + (2.0**-7,) * 2 + (0.0,) * 7, value=torch.float32),
    "dense": Effect("dense", (0.0,) * 7 + (0.3,) + (0.0,) * 8, value=torch.float32, persistent=True, stuck=True),
}


def compiled(code: BitflipCode, value: Tensor, grad: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """The operation that compiled blocks contain: the golden function, compiled by Inductor."""
    return torch.ops.newcompute.bitflip(value, *place, code.text), grad


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("chunk", (12, 301), marks=pytest.mark.slow),
        pytest.param("chunk", (2, 3, 301), marks=pytest.mark.slow),
        pytest.param("chunk", (5, 640), marks=pytest.mark.slow),
        pytest.param("dense", (12, 301), marks=pytest.mark.slow),
        pytest.param("dense", (2, 3, 301), marks=pytest.mark.slow),
        pytest.param("dense", (5, 640), marks=pytest.mark.slow),
    ],
)
def test_compiled_shards(name, shape):
    code, table = COMPILED[name].on(of_weight=len(shape) == 2)
    value, grad, _ = operand(shape, COMPILED[name])
    place = (table, CONTEXT, None)
    wanted = golden(code, value, *place), grad
    assert differ(wanted, (value, grad))
    columns = [0, 128, 384, 640] if shape == (5, 640) else [0, 77, 301]
    assert not differ(sharded(compiled, code, value, grad, place, columns), wanted)
    if code.of_weight:
        for rows in ([0, 4, shape[0]], [0, 1, 3, shape[0]]):
            assert not differ(sharded(compiled, code, value, grad, place, rows, dim=0), wanted)


# --- the Triton kernels -----------------------------------------------------------------------------------------------

# Fewer slots than above: each costs the interpreter as much as the first.
KERNELS = {
    "chunk": Effect("chunk", tuple(2.0**-10 if bit % 3 else 2.0**-11 for bit in range(4)) + (0,) * 12),
    "chunk, threshold": Effect("chunk", (2.0**-12,) * 16, stuck=True, zero_above=0.7),
    "dense": Effect("dense", (0.0,) * 8 + (0.1,) * 4 + (0.0,) * 4),
    "dense, threshold": Effect("dense", (0.01,) * 16, persistent=True, stuck=True, zero_above=0.7),
}


def on_device(device: str) -> Run:
    def run(code: BitflipCode, value: Tensor, grad: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        from transforms.kernels.bitflip import flip_in_place, pull, store

        value, grad, *rest = (None if t is None else t.to(device) for t in (value, grad, *place))
        stored = store(code, value, *rest)
        if code.law.name == "chunk" and not code.stuck and code.zero_above is None:
            flipped = value.clone(memory_format=torch.contiguous_format)
            flip_in_place(code, flipped, *rest)
            assert not differ([flipped], [stored]), "in place"
        return stored.cpu(), pull(code, grad, value, *rest).cpu()

    return run


def kernel_problems(effect: Effect, device: str) -> list[str]:
    """Shards that begin at chunks and elsewhere, of an activation, of a weight's rows, and of its columns."""
    problems = []
    for shape, batch, dim, bounds in (
        ((2, 3, 301), None, -1, [0, 77, 301]),
        ((6, 384), (2, 3), -1, [0, 128, 384]),
        ((12, 301), None, 0, [0, 5, 12]),
        ((12, 301), None, -1, [0, 60, 301]),
        ((5, 384), None, -1, [0, 256, 384]),
        ((5, 384), None, -1, [0, 100, 384]),
    ):
        code, table = effect.on(of_weight=len(shape) == 2 and batch is None)
        value, grad, tokens = operand(shape, effect, batch)
        place = (table, CONTEXT, tokens)
        wanted = eager(code, value, grad, place)
        assert differ(wanted, (value, grad))
        if problem := differ(sharded(on_device(device), code, value, grad, place, bounds, dim), wanted):
            problems.append(f"{shape} {bounds}: {problem}")
    return problems


def problems_backwards() -> list[str]:
    """Two programs, the last first: none may write what belongs to another, where on a GPU they would race.

    The second begins with a chunk that its row does not need, and the next row begins with hits.
    """
    from triton.runtime.interpreter import interpreter_builder

    code, table = EFFECTS["chunk"].on(of_weight=True)
    value, grad, _ = operand((20, 400), EFFECTS["chunk"])
    shard, place = replace(code, first_column=68, columns=901), (table, CONTEXT, None)
    span = shard.span(value)
    assert (64 // span.chunks, 64 % span.chunks, (68 + 12 * 901) % CHUNK) == (12, span.chunks - 1, 0)
    wanted = eager(shard, value, grad, place)
    assert (words(wanted[0]) != words(value))[13, : 4 * CHUNK - 400].any()
    forwards = interpreter_builder.set_grid_idx
    interpreter_builder.set_grid_idx = lambda x, *rest: forwards(interpreter_builder.grid_dim[0] - 1 - x, *rest)
    problem = differ(on_device("cpu")(shard, value, grad, place), wanted)
    interpreter_builder.set_grid_idx = forwards
    return [problem] if problem else []


@pytest.fixture(scope="module")
def interpreted(request) -> dict[str, list[str]]:
    """What the interpreter finds for every case that is tested."""
    tests = [item for item in request.session.items if item.originalname == "test_shards_by_interpreted_kernels"]
    names = [item.callspec.params["name"] for item in tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, __file__, *names], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    "name",
    # Of each law the harder one: tokens of a batch in the first, a threshold and lasting faults in the second.
    [pytest.param(n, marks=[pytest.mark.slow] if n in ("chunk, threshold", "dense") else []) for n in KERNELS]
    + ["backwards"],
)
def test_shards_by_interpreted_kernels(interpreted, name):
    assert interpreted[name] == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_shards_by_kernels_on_a_gpu(name):
    assert kernel_problems(KERNELS[name], "cuda") == []


if __name__ == "__main__":
    from transforms.kernels import bitflip as interpreted_kernels

    # The interpreter's kernels are launched as they are.
    interpreted_kernels.wrap_triton = lambda kernel: kernel
    print(
        json.dumps(
            {
                name: problems_backwards() if name == "backwards" else kernel_problems(KERNELS[name], "cpu")
                for name in sys.argv[1:]
            }
        )
    )
