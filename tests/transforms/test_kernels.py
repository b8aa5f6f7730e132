"""The Triton kernels against the golden function, bit for bit.

Without a GPU they run in Triton's interpreter, which must be chosen before Triton is imported: one other process, this
file as a script, runs the cases and prints what it found. Ahead-of-time compilation for an H100 needs no GPU either.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hopper import compile_for_hopper, written_by

from transforms.bitflip import BitflipCode, bit_probabilities, golden
from transforms.noise import philox_4x32
from transforms.sampling import CHUNK, DRAWS, choose_law, failed_cells, make_table

STEP, GROUP, FIRST_SAMPLE = 7, 3, 11
KEY = (0xFEDCBA98, 0x12345678)
INTEGERS = {2: torch.int16, 4: torch.int32}
FORMATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Case:
    """One call; `both` are the probabilities of the sign-exponent and of the mantissa bits, `bits` those of all."""

    shape: tuple[int, ...] = (2, 5, 300)
    value: str = "bfloat16"
    storage: str = "bfloat16"
    both: tuple[float, float] = (2.0**-10, 2.0**-10)
    bits: tuple[float, ...] = ()
    law: str = "chunk"
    of_weight: bool = False
    zero_above: float | None = None
    persistent: bool = False
    stuck: bool = False
    tokens: tuple[int, int] | None = None
    """Batch and sequence length of the tokens that the rows belong to."""
    transposed: bool = False
    window: tuple[int, int, int] = (0, 0, 0)
    """Of a shard: first row, first column, and a weight's unsharded columns."""
    special: bool = True
    """Infinities, NaN with payloads, subnormals and ties of rounding are among the values."""

    def code(self) -> tuple[BitflipCode, torch.Tensor]:
        probabilities = bit_probabilities(self.storage, *self.both, self.bits)
        law = choose_law(probabilities, self.persistent)
        assert law.name == self.law, law
        flags = (self.of_weight, self.zero_above, self.persistent, self.stuck)
        code = BitflipCode(law, self.storage, *flags, *self.window)
        return code, torch.tensor([*KEY, *make_table(law, probabilities)])

    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        generator = torch.Generator().manual_seed(sum(self.shape))
        dtype = getattr(torch, self.value)
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape
        value = torch.randn(shape, generator=generator).to(dtype)
        if self.special:
            words = torch.randint(-(2**15), 2**15, shape, generator=generator)
            infinite = 0x7C00 if dtype == torch.float16 else 0x7F80
            words = torch.where(torch.rand(shape, generator=generator) < 0.5, words | infinite, words)
            words = words << 16 | 0x8000 if dtype.itemsize == 4 else words
            odd = torch.rand(shape, generator=generator) < 0.2
            value = torch.where(odd, words.to(INTEGERS[dtype.itemsize]).view(dtype), value)
        if dtype == torch.float16 and self.storage != "float16":
            # torch's own casts disagree on a NaN's payload, with each other and from one tensor length to another.
            value = value.nan_to_num(1.5)
        tokens = None
        if self.tokens is not None:
            tokens = torch.randint(0, 2**32, (2, *self.tokens), generator=generator)
        return value.transpose(-1, -2) if self.transposed else value, torch.tensor([STEP, GROUP, FIRST_SAMPLE]), tokens


def few(count: int, p: float) -> tuple[float, ...]:
    """Different probabilities, some 0, from the sign downwards."""
    return tuple(0.0 if i % 5 == 3 else p / (1 + i % 3) for i in range(count))


SHARDS = {
    "features, whole chunks": Case((2, 5, 384), window=(0, 256, 0)),
    "features": Case(window=(0, 77, 0)),
    "features, tokens": Case((10, 300), window=(0, 1000, 0), tokens=(2, 5)),
    "features, thinned": Case((2, 20, 300), bits=few(16, 2.0**-10), window=(0, 1, 0)),
    "features, stuck": Case((4, 9, 50), stuck=True, window=(0, 100, 0)),
    "features, threshold": Case((4, 9, 50), zero_above=0.3, window=(0, 127, 0)),
    "features, one element": Case((1, 2, 1), bits=(2.0**-6,) + (0,) * 15, window=(0, 1, 0)),
    "rows": Case((37, 43), of_weight=True, window=(3, 0, 43)),
    "rows, whole chunks": Case((30, 64), of_weight=True, window=(10, 0, 0)),
    "columns, whole chunks": Case((37, 256), of_weight=True, window=(2, 128, 640)),
    "columns, one start": Case((37, 43), of_weight=True, window=(2, 128 + 100, 640)),
    "columns": Case((37, 43), of_weight=True, window=(5, 250, 301)),
    "columns, far": Case((37, 300), of_weight=True, window=(2**23 + 1, 64, 1001)),
    "columns, threshold": Case((60, 20), of_weight=True, window=(5, 250, 301), zero_above=0.3),
    "columns, transposed": Case((37, 43), of_weight=True, window=(5, 250, 301), transposed=True),
    "vector": Case((1000,), of_weight=True, window=(0, 333, 0)),
    "dense, features": Case(both=(0.05, 0.05), law="dense", window=(0, 77, 0)),
    "dense, features, persistent": Case(both=(0.01, 0.01), law="dense", persistent=True, window=(0, 640, 0)),
    "dense, columns, whole chunks": Case((9, 128), both=(0.1, 0.1), law="dense", of_weight=True, window=(1, 128, 384)),
    "dense, columns": Case((37, 43), both=(0.05, 0.05), law="dense", of_weight=True, window=(5, 250, 301)),
    "dense, columns, far": Case((9, 300), both=(0.1, 0.1), law="dense", of_weight=True, window=(2**30, 64, 1001)),
    "dense, columns, stuck": Case(
        (9, 77), both=(0.1, 0.1), law="dense", of_weight=True, persistent=True, stuck=True, window=(0, 13, 90)
    ),
    "none": Case((37, 43), "float32", both=(0, 0), law="none", of_weight=True, zero_above=0.7, window=(5, 250, 301)),
}
CASES = {
    **{f"shard, {name}": case for name, case in SHARDS.items()},
    "chunk": Case(),
    "chunk, 2^-20": Case(shape=(2, 50, 2048), both=(2.0**-20, 2.0**-20), special=False),
    "chunk, whole chunks": Case(shape=(2, 5, 256)),
    "chunk, short rows": Case(shape=(3, 20, 5)),
    "chunk, one element": Case(shape=(1, 1, 1)),
    "chunk, two hits in one element": Case(shape=(5, 16, 512), both=(2.0**-9.7, 2.0**-9.7), special=False),
    "chunk, sign and exponent": Case(both=(2.0**-9, 0)),
    "chunk, mantissa": Case(both=(0, 2.0**-9)),
    "chunk, thinned": Case(shape=(2, 5, 300), bits=few(16, 2.0**-10)),
    "chunk, thinned float32": Case(value="float32", storage="float32", bits=few(32, 2.0**-11)),
    "chunk, repeated cells": Case((4, 8, 512), bits=(0,) * 15 + (2.0**-6,)),
    "chunk, sign of float32": Case(value="float32", storage="float32", bits=(2.0**-6,) + (0,) * 31),
    "chunk, stuck": Case(stuck=True),
    "chunk, tokens": Case(tokens=(2, 5)),
    "chunk, flattened": Case(shape=(10, 300), tokens=(2, 5)),
    "chunk, rows of no text": Case(shape=(1, 3, 300), tokens=(2, 5)),
    "chunk, transposed": Case(transposed=True),
    "chunk, weight": Case(shape=(37, 43), of_weight=True),
    "chunk, weight, transposed": Case(shape=(37, 43), of_weight=True, transposed=True),
    "chunk, vector": Case(shape=(1000,), of_weight=True),
    "chunk, threshold": Case(zero_above=0.3),
    "dense": Case(both=(0.05, 0.05), law="dense"),
    "dense, always": Case(both=(1.0, 1.0), law="dense"),
    "dense, NaN of float16": Case(value="float32", storage="float16", both=(1.0, 1.0), law="dense"),
    "dense, NaN of bfloat16": Case(value="float32", both=(1.0, 1.0), law="dense"),
    "dense, sign and exponent": Case(both=(0.3, 0), law="dense"),
    "dense, mantissa": Case(both=(0, 0.3), law="dense"),
    "dense, different bits": Case(bits=few(16, 0.5), law="dense"),
    "dense, float32": Case(value="float32", storage="float32", bits=few(32, 0.1), law="dense"),
    "dense, short rows": Case(shape=(3, 7, 5), both=(0.1, 0.1), law="dense"),
    "dense, ties": Case((24, 512), both=(0.75 * 2.0**-16,) * 2, law="dense", of_weight=True, persistent=True),
    "dense, tokens": Case(both=(0.05, 0.05), law="dense", tokens=(2, 5)),
    "dense, persistent": Case(both=(0.01, 0.001), law="dense", persistent=True),
    "dense, persistent, flattened": Case(shape=(10, 300), both=(0.01, 0.01), law="dense", persistent=True),
    "dense, stuck": Case(both=(0.05, 0.05), law="dense", persistent=True, stuck=True),
    "dense, stuck weight": Case((37, 43), both=(0.1, 0.1), law="dense", of_weight=True, persistent=True, stuck=True),
    "dense, weight": Case(shape=(37, 43), both=(0.05, 0.05), law="dense", of_weight=True),
    "dense, threshold": Case(both=(0.05, 0.05), law="dense", zero_above=1.25),
    "none, threshold": Case(both=(0, 0), law="none", zero_above=0.7),
    "threshold 0": Case(zero_above=0.0),
    "threshold infinity": Case(zero_above=float("inf")),
    "threshold beyond float16": Case(value="float16", storage="float16", zero_above=1e5),
    **{
        f"{law}, {value} in {storage}": Case(
            (1, 6, 200), value, storage, both=(p, p), law=law, zero_above=0.3 if law == "chunk" else None
        )
        for value in FORMATS
        for storage in FORMATS
        for law, p in (("chunk", 2.0**-12), ("dense", 0.05), ("none", 0.0))
    },
}


def expected(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """What is stored, and where the threshold keeps it."""
    code, table = case.code()
    value, context, tokens = case.operands()
    stored = golden(code, value, table, context, tokens)
    kept = (
        torch.ones_like(stored, dtype=torch.bool)
        if case.zero_above is None
        else stored.double().abs() < case.zero_above
    )
    return torch.where(kept, stored, 0), kept


def differences(case: Case, found: torch.Tensor, wanted: torch.Tensor) -> str:
    """Empty if all bits agree. Where the last step narrows or widens to or from float16, any NaN is as good."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{found.dtype} {tuple(found.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}"
    integer = INTEGERS[wanted.dtype.itemsize]
    differs = found.cpu().contiguous().view(integer) != wanted.contiguous().view(integer)
    if case.value != case.storage and (case.value, case.storage) != ("float32", "bfloat16"):
        differs &= ~(found.cpu().isnan() & wanted.isnan())
    return f"{int(differs.sum())} of {differs.numel()} elements differ" if differs.any() else ""


def check(case: Case, device: str) -> list[str]:
    """Every entry point that a case allows."""
    from transforms.kernels.bitflip import flip_in_place, pull, store

    code, table = case.code()
    value, context, tokens = case.operands()
    on_device = [None if tensor is None else tensor.to(device) for tensor in (value, table, context, tokens)]
    value, wanted, kept = on_device[0], *expected(case)
    problems = [differences(case, store(code, *on_device), wanted)]
    grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    problems.append(differences(case, pull(code, grad.to(device), *on_device), torch.where(kept, grad, 0)))
    if case.law == "chunk" and case.zero_above is None and not case.stuck and case.value == case.storage:
        place = value.clone(memory_format=torch.contiguous_format)
        flip_in_place(code, place, *on_device[1:])
        problems.append(differences(case, place, wanted))
        flip_in_place(code, place, *on_device[1:])
        problems.append(differences(case, place, value.cpu()))
    return problems


@pytest.fixture(scope="module")
def interpreted(request) -> dict[str, list[str]]:
    """What the interpreter finds for every case that is tested."""
    tests = [
        item for item in request.session.items if item.originalname == "test_interpreted_kernels_give_the_golden_bits"
    ]
    names = [item.callspec.params["name"] for item in tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, __file__, *names], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


# Each case takes the interpreter about as long as the first: of combinations of what is tested alone, the rest is slow.
COMMON_FORMATS = ("float32 in bfloat16", "float32 in float32", "float16 in float16")
COMBINED = {
    "shard, features, thinned",
    "shard, features, stuck",
    "shard, features, threshold",
    "shard, features, one element",
    "shard, features, whole chunks",
    "shard, rows, whole chunks",
    "shard, columns, far",
    "shard, columns, one start",
    "shard, columns, threshold",
    "shard, columns, transposed",
    "shard, columns, whole chunks",
    "shard, vector",
    "shard, dense, features, persistent",
    "shard, dense, columns, far",
    "shard, dense, columns, stuck",
    "shard, dense, columns, whole chunks",
    "chunk, 2^-20",
    "chunk, mantissa",
    "chunk, repeated cells",
    "chunk, thinned float32",
    "chunk, sign of float32",
    "chunk, flattened",
    "chunk, weight, transposed",
    "dense, always",
    "dense, NaN of bfloat16",
    "dense, different bits",
    "dense, mantissa",
    "dense, persistent",
    "dense, short rows",
    "dense, persistent, flattened",
    "dense, sign and exponent",
    "dense, stuck weight",
    "dense, ties",
    "threshold infinity",
    *(name for name in CASES if " in float" in name or " in bfloat" in name if not name.endswith(COMMON_FORMATS)),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in COMBINED else []) for n in CASES])
def test_interpreted_kernels_give_the_golden_bits(interpreted, name):
    assert not any(interpreted[name]), interpreted[name]


def test_the_cases_have_hits_that_meet_in_one_element():
    """Otherwise nothing above would notice that one of two hits is lost."""
    case = CASES["chunk, two hits in one element"]
    value, _, _ = case.operands()
    flipped = (expected(case)[0].view(torch.int16) ^ value.view(torch.int16)).to(torch.int32) & 0xFFFF
    assert int(((flipped & (flipped - 1)) != 0).sum()) >= 5


def test_in_place_refuses_what_it_cannot_undo():
    from transforms.kernels.bitflip import flip_in_place

    for case, message in (
        (Case(zero_above=1.0), "threshold"),
        (Case(both=(0.1, 0.1), law="dense"), "chunk law"),
        (Case(value="float32"), "storage format"),
        (Case(transposed=True), "contiguous"),
    ):
        code, table = case.code()
        value, context, tokens = case.operands()
        with pytest.raises(ValueError, match=message):
            flip_in_place(code, value, table, context, tokens)


FAR = {"width": "i64", "begin": "i64", "stride": "i64"}
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
COMPILED = {
    "chunk": (Case(both=(2.0**-16, 2.0**-16)), {}),
    "chunk, thinned, threshold": (Case(bits=few(16, 2.0**-14), zero_above=30.0), {}),
    "chunk, pull": (Case(both=(2.0**-16, 2.0**-16), zero_above=30.0), {"PULL": True}),
    "chunk, weight": (Case(both=(2.0**-16, 2.0**-16), of_weight=True), {"width": "i64"}),
    "chunk, float32 in bfloat16": (Case(value="float32", both=(2.0**-16, 2.0**-16)), {}),
    "chunk, bfloat16 in float16": (Case(storage="float16", both=(2.0**-16, 2.0**-16)), {}),
    "chunk, float32": (Case(value="float32", storage="float32", both=(2.0**-16, 2.0**-16)), {}),
    "chunk, many slots": (Case(both=(2.0**-12, 2.0**-12)), {}),
    "chunk, most slots": (Case(both=(2.0**-10, 2.0**-10)), {}),
    "chunk, stuck": (Case(both=(2.0**-16, 2.0**-16), stuck=True), {}),
    "chunk, in place": (Case(both=(2.0**-16, 2.0**-16), tokens=(2, 5)), {"IN_PLACE": True}),
    "none": (Case(value="float32", both=(0, 0), law="none", zero_above=1.0), {}),
    "chunk, shard": (Case((2, 5, 384), both=(2.0**-16, 2.0**-16), window=(0, 256, 0)), {}),
    "chunk, shard of a weight": (SHARDS["columns, whole chunks"], FAR),
    "chunk, shard that cuts chunks": (SHARDS["columns, far"], FAR),
    "chunk, shard that cuts chunks, pull": (SHARDS["columns, threshold"], {"PULL": True}),
    "chunk, shard that cuts chunks, in place": (SHARDS["features, tokens"], {"IN_PLACE": True}),
    "dense, shard": (SHARDS["dense, columns, whole chunks"], FAR),
    "dense, shard that cuts chunks": (SHARDS["dense, columns, stuck"], {}),
    "dense": (Case(both=(0.05, 0.05), law="dense"), {}),
    "dense, tokens, pull": (Case(both=(0.05, 0.05), law="dense", tokens=(2, 5), zero_above=1.0), {"PULL": True}),
    "dense, stuck weight": (
        Case(both=(0.05, 0.05), law="dense", of_weight=True, persistent=True, stuck=True),
        {"width": "i64"},
    ),
    "dense, float32 in float16": (Case(value="float32", storage="float16", both=(0.05, 0.05), law="dense"), {}),
}


def launched(case: Case):
    """The kernel that a case launches, and its arguments by name."""
    from transforms.kernels import bitflip as kernels

    code, _ = case.code()
    recorded = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *tensors, **arguments: recorded.append((self.kernel, tensors, arguments))

    value, context, tokens = case.operands()
    value = value.contiguous()
    table = torch.zeros(99, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "wrap_triton", Recorder)
        kernels._launch(value.clone(), value, value.clone(), table, context, tokens, code.text)
    [(kernel, tensors, arguments)] = recorded
    return kernel, {**dict(zip(kernel.arg_names, tensors)), **arguments}


def compile_ahead(case: Case, changes: dict):
    """The kernel of a case compiled for compute capability 9.0."""
    kernel, arguments = launched(case)
    arguments["PULL"] = False
    constants = {name: arguments[name] for name in kernel.arg_names if name.isupper()}
    constants |= {name: change for name, change in changes.items() if name.isupper()}
    tensors = dict.fromkeys(("value", "grad", "out"), POINTERS[case.value])
    tensors |= dict.fromkeys(("table", "context", "tokens"), "*i64")
    types = {**tensors, "limit": "fp32", **changes, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in (*tensors, "width")
    }
    return compile_for_hopper(kernel, signature, constants, aligned, arguments["num_warps"])


LATER = (
    "chunk, most slots",
    "chunk, bfloat16 in float16",
    "chunk, float32",
    "dense, float32 in float16",
    "chunk, shard of a weight",
    "chunk, shard that cuts chunks, pull",
    "dense, shard that cuts chunks",
)
"""Further variants of kernels that are compiled anyway; the interpreter checks all their bits."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in COMPILED]
)
def test_kernels_compile_for_hopper(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_ahead(*COMPILED[name])
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert ".target sm_90a" in compiled.asm["ptx"]


@pytest.mark.parametrize("name", ["chunk", "chunk, shard"])
def test_a_thread_draws_the_words_of_one_chunk(name, tmp_path, monkeypatch):
    """Two wide products a round, and no copy of the draws for other layouts; 16 bytes are moved at a time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case, changes = COMPILED[name]
    text = compile_ahead(case, changes).asm["ptx"]
    draws = case.code()[0].law.draws
    assert text.count("mul.hi.u32") <= 14 * draws + 2 * draws
    assert "ld.global.v4" in text
    assert "st.global.v4" in text


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("chunk, thinned", {}),
        ("chunk, tokens", {"IN_PLACE": True}),
        ("dense, tokens", {}),
        ("dense, stuck", {}),
        ("shard, features, thinned", {}),
        ("shard, columns", {"IN_PLACE": True}),
        ("shard, dense, columns", {}),
    ],
)
def test_compiled_code_sees_that_only_the_output_is_written(name, changes, monkeypatch):
    """torch.compile copies what it believes a kernel writes; it must not believe so of the context or the value."""
    kernel, arguments = launched(CASES[name])
    assert written_by(kernel, {**arguments, **changes}, monkeypatch) == {"out"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernels_give_the_golden_bits_on_a_gpu(name):
    assert not any(check(CASES[name], "cuda"))


@pytest.mark.gpu
def test_a_weight_of_more_than_32_bits_of_elements():
    """Its last chunks, drawn as the golden function draws them there."""
    from transforms.kernels.bitflip import flip_in_place

    code, table = Case(both=(2.0**-12, 2.0**-12), of_weight=True).code()
    chunks, tail = 2**25 + 3, 4096  # the counter's low word holds 2^22 chunks
    value = torch.zeros(chunks * CHUNK, dtype=torch.bfloat16, device="cuda")
    context = torch.tensor([STEP, GROUP, FIRST_SAMPLE])
    flip_in_place(code, value, table.cuda(), context.cuda(), None)

    def words(draw):
        number = torch.arange(chunks - tail, chunks) * DRAWS + draw
        return philox_4x32((number & 0xFFFFFFFF, number >> 32, GROUP, STEP), KEY)

    wanted = failed_cells(code.law, table[2:], words).flatten().to(torch.int16)
    assert wanted.any()
    assert torch.equal(value[-tail * CHUNK :].view(torch.int16).cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["chunk, threshold", "dense, threshold", "chunk, tokens"])
def test_the_operations_are_what_torch_expects_of_one(name):
    case = CASES[name]
    code, table = case.code()
    value, context, tokens = (None if tensor is None else tensor.cuda() for tensor in case.operands())
    rest = (table.cuda(), context, tokens, code.text)
    import transforms.kernels.bitflip  # noqa: F401 - registers the operations

    torch.library.opcheck(torch.ops.newcompute.bitflip_store, (value, *rest))
    torch.library.opcheck(torch.ops.newcompute.bitflip_pull, (torch.ones_like(value), value, *rest))
    if case.zero_above is None:
        torch.library.opcheck(torch.ops.newcompute.bitflip_in_place, (value.clone(), *rest))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["chunk, threshold", "dense, threshold", "chunk, weight", "chunk, tokens", "shard, columns, threshold"]
)
def test_kernels_inside_compiled_code(name):
    from transforms.kernels.bitflip import flip_in_place, pull, store

    case = CASES[name]
    code, table = case.code()
    value, context, tokens = (None if tensor is None else tensor.cuda() for tensor in case.operands())
    wanted, kept = expected(case)
    rest = (table.cuda(), context, tokens)

    @torch.compile(fullgraph=True)
    def both(value, grad, *rest):
        return store(code, value * 1, *rest), pull(code, grad, value, *rest)

    stored, grad = both(value, torch.ones_like(value), *rest)
    assert not differences(case, stored, wanted)
    assert torch.equal(grad.cpu(), kept.to(grad.dtype))
    if case.zero_above is None:
        in_place = torch.compile(lambda value, *rest: flip_in_place(code, value, *rest), fullgraph=True)
        place = value.clone()
        in_place(place, *rest)
        assert not differences(case, place, wanted)


if __name__ == "__main__":
    from transforms.kernels import bitflip as interpreted_kernels

    # The interpreter's kernels are launched as they are.
    interpreted_kernels.wrap_triton = lambda kernel: kernel
    print(json.dumps({name: check(CASES[name], "cpu") for name in sys.argv[1:]}))
