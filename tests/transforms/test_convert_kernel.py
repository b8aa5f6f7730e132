"""The Triton kernels of converters and of random numbers against the golden functions.

As for bit errors (`test_kernels.py`), one other process runs all cases in Triton's interpreter, and kernels are
compiled ahead of time for an H100.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hopper import compile_for_hopper, pretend_hopper, written_by
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transforms import attention, product
from transforms.attention import AttentionPlan, _Step
from transforms.formats import Float, Integer
from transforms.noise import philox_4x32
from transforms.operands import _drawn_rows
from transforms.product import ProductCode, pack, unpack
from transforms.quantise import QuantiseCode
from transforms.scales import Scaling

TABLE = (0xFEDCBA98, 0x12345678, 0x9ABCDEF0, 0x87654321)
STEP, GROUP, FIRST_SAMPLE = 7, 3, 11


@dataclass(frozen=True)
class Case:
    """One call of the converter's kernel."""

    shape: tuple[int, ...] = (2, 5, 77)
    dtype: str = "bfloat16"
    levels: int = 127
    stochastic: bool = True
    photons: float = 0.0
    strength: float | None = None
    range: float = 1.9
    first_column: int = 0
    first_tile: int = 0
    tile: int = 0
    total: bool = False
    single: bool = False
    packs: bool = True
    observing: bool = True
    tokens: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None
    """First head and first query of a product of attention."""
    special: bool = False
    """Not only finite sums, zeros of both signs, and ties."""

    def code(self) -> ProductCode:
        converter = QuantiseCode(
            Integer(self.levels), Scaling("range"), self.stochastic, tracked=True, blended=self.strength is not None
        )
        return ProductCode(
            converter, 0, self.photons, self.strength is not None, None, self.first_column, self.first_tile
        )

    def arguments(self) -> dict[str, Any]:
        """What golden function and kernel are given."""
        generator = torch.Generator().manual_seed(sum(self.shape))
        dtype = getattr(torch, self.dtype)
        acc = torch.randn(self.shape, generator=generator)
        if self.special:
            odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), self.range, -self.range, 1e-30])
            which = torch.randint(0, 4 * len(odd), self.shape, generator=generator)
            step = self.range / self.levels
            ties = (torch.randint(-2 * self.levels, 2 * self.levels, self.shape, generator=generator) + 0.5) * step
            acc = torch.where(which < len(odd), odd[which % len(odd)], torch.where(which % 3 == 0, ties, acc))
        given = {"acc": acc.to(dtype), "total": torch.randn(self.shape, generator=generator) if self.total else None}
        if self.photons:
            given |= {"magnitudes": acc.abs().to(dtype) * 3, "full_scale": torch.tensor([0.7])}
        table = [torch.tensor(TABLE)] if self.stochastic or self.photons else []
        own = [*table, torch.tensor([self.range]), torch.tensor([0.25])]
        own += [torch.ones(1)] if self.photons else []
        own += [] if self.strength is None else [torch.tensor([self.strength])]
        tokens = None
        if self.tokens is not None:
            tokens = torch.stack([
                torch.randint(0, 2**20, self.tokens, generator=generator),
                torch.randint(0, 2**32, self.tokens, generator=generator),
            ])  # fmt: skip
        return {**given, "own": own, "place": (torch.tensor([STEP, GROUP, FIRST_SAMPLE]), tokens)}


CASES = {
    "one value": Case((1, 1, 1)),
    "stochastic": Case(),
    "nearest": Case(stochastic=False),
    "special": Case((3, 5, 130), special=True, range=31.75),
    "special, nearest": Case((3, 5, 130), "float32", special=True, range=31.75, stochastic=False),
    "special, bfloat16 nearest": Case((3, 5, 130), special=True, range=31.75, stochastic=False),
    "float32": Case((2, 3, 257), "float32"),
    "float16": Case((2, 3, 257), "float16", stochastic=False),
    "whole chunks": Case((2, 3, 256), "float32"),
    "few levels": Case(levels=1),
    "odd levels": Case((2, 3, 200), "float32", levels=2047, range=0.737),
    "nothing known": Case(range=0.0),
    "nothing known, nearest": Case(range=0.0, stochastic=False, special=True),
    "a tiny range": Case((1, 3, 40), "float32", range=1e-40, stochastic=False),
    "not observing": Case(observing=False),
    "columns, chunks": Case((2, 3, 100), first_column=256),
    "columns, bytes": Case((2, 3, 200), first_column=64 + 8),
    "columns, bits": Case((2, 3, 200), first_column=77),
    "columns, far": Case((1, 3, 20), first_column=128 * 1000 + 120),
    "tiles": Case((2, 3, 90), tile=2, first_tile=5, total=True, single=True),
    "tiles, the last": Case((2, 3, 90), tile=3, total=True),
    "tiles, the first": Case((2, 3, 90), "float32", single=True),
    "tiles, nearest": Case((2, 3, 90), "float32", stochastic=False, total=True),
    "many tiles": Case((1, 3, 20), first_tile=4000),
    "tokens": Case(tokens=(2, 5)),
    "tokens, flattened": Case((10, 77), tokens=(2, 5)),
    "tokens, rows of no text": Case((1, 3, 77), tokens=(2, 5)),
    "any rows, nearest": Case((7, 77), stochastic=False),
    "bytes": Case((2, 3, 77), packs=False),
    "noise": Case((2, 3, 150), "float32", photons=5.0),
    "noise, nearest, bfloat16": Case((2, 3, 150), photons=5.0, stochastic=False),
    "noise, strength": Case((2, 3, 150), "float32", photons=5.0, strength=0.25, first_column=40),
    "strength 0.3": Case((2, 3, 77), "float32", strength=0.3),
    "strength 0.8": Case((2, 3, 77), "float32", strength=0.8),
    "strength 1": Case((2, 3, 77), "float32", strength=1.0),
    "heads": Case((2, 3, 4, 37), heads=(6, 0), single=True, packs=False),
    "heads, tokens": Case((2, 3, 4, 37), "float32", heads=(0, 2), tokens=(2, 9), single=True, packs=False),
    "heads, noise": Case((2, 2, 3, 37), "float32", photons=9.0, heads=(1, 5), single=True, packs=False),
}


def expected(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Result in float32, what was not clipped, and the largest sum seen, by the golden functions."""
    code, given = case.code(), case.arguments()
    acc, own, place = given["acc"], given["own"], given["place"]
    if case.heads is not None:
        return *_in_attention(case), own[code.stochastic + 1]
    if case.observing:
        code.observe(acc, own)
    variance = given["full_scale"] * given["magnitudes"].float() / case.photons if case.photons else None
    found, kept = code.convert(acc, own, place, case.tile, variance)
    found = found if given["total"] is None else given["total"] + found
    assert kept is not None
    return found, pack(kept) if case.packs else kept, own[code.stochastic + 1]


def _in_attention(case: Case) -> tuple[Tensor, Tensor]:
    """The same product as attention makes it, of a matrix and the unit matrix."""
    code, given = case.code(), case.arguments()
    assert case.heads is not None
    first_head, first_query = case.heads
    acc, own = given["acc"], given["own"]
    if case.photons:
        own[-1] = given["full_scale"]
    queries = slice(first_query, first_query + acc.shape[2])
    plan = AttentionPlan(None, None, None, None, None, code, (), first_head)
    unit = torch.eye(acc.shape[-1], dtype=acc.dtype).expand(*acc.shape[:2], -1, -1)
    found, kept = _Step(plan, 1.0, {"context": own}, given["place"], None)._product(
        code, "context", acc, unit, queries, False
    )
    assert kept is not None
    return found, kept


def converted(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the kernel."""
    from transforms.kernels.convert import convert

    code, given = case.code(), case.arguments()

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    acc, total = there(given["acc"]), there(given["total"])
    own, place = [there(tensor) for tensor in given["own"]], tuple(there(tensor) for tensor in given["place"])
    noise = {name: there(given[name]) for name in ("magnitudes", "full_scale") if name in given}
    if case.heads is not None and case.photons:
        noise["magnitudes"] = acc.abs()
    found, kept = convert(
        code, acc, own, place, case.observing and case.heads is None, tile=case.tile, heads=case.heads, total=total,
        single=case.single, packs=case.packs, **noise,
    )  # fmt: skip
    return found.cpu(), kept.cpu(), own[code.stochastic + 1].cpu()


def same(found: Tensor, wanted: Tensor) -> Tensor:
    """Where bits agree; NaN is as good as any other."""
    integer = torch.int16 if wanted.dtype.itemsize == 2 else torch.int32
    return (found.view(integer) == wanted.view(integer)) | (found.isnan() & wanted.isnan())


def check(case: Case, device: str) -> list[str]:
    """What differs."""
    (found, kept, seen), (single, wanted_kept, wanted_seen) = converted(case, device), expected(case)
    wanted = single if case.single else single.to(getattr(torch, case.dtype))
    if device == "cpu" and wanted.dtype == torch.bfloat16:
        # Where a GPU rounds to bfloat16 Triton's interpreter cuts off.
        wanted = (single.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    if (found.shape, found.dtype, kept.shape, kept.dtype) != (
        wanted.shape,
        wanted.dtype,
        wanted_kept.shape,
        wanted_kept.dtype,
    ):
        return [
            f"{found.dtype} {found.shape} {kept.shape} instead of {wanted.dtype} {wanted.shape} {wanted_kept.shape}"
        ]
    problems = []
    right = same(found, wanted)
    if case.photons:
        # A normal number that differs in its last places may round otherwise, once in many thousands.
        near = (found - wanted).abs() <= 1e-5 * wanted.abs() + 1e-6
        problems += [f"{int((~near).sum())} noisy values differ"] if int((~near).sum()) > 1 else []
    elif case.strength not in (None, 1.0):
        # torch blends with one rounding less or more from device to device.
        problems += [] if torch.allclose(found, wanted, rtol=3e-7, atol=1e-7) else ["blends differ"]
    elif not bool(right.all()):
        where = right.logical_not().nonzero()[0].tolist()
        problems += [f"{int((~right).sum())} values differ, first at {where}: {found[*where]} not {wanted[*where]}"]
    if int((kept != wanted_kept).sum()) > (1 if case.photons else 0):
        problems += [f"{int((kept != wanted_kept).sum())} of {kept.numel()} of what was kept differ"]
    return problems + ([] if bool(same(seen, wanted_seen).all()) else [f"saw {seen} instead of {wanted_seen}"])


DRAWS = {
    f"{rows} x {width}, {'normal' if normal else 'uniform'}": (rows, width, normal)
    for rows, width in ((1, 1), (3, 77), (2, 300), (5, 128))
    for normal in (False, True)
}


def check_draws(rows: int, width: int, normal: bool, device: str) -> list[str]:
    from transforms.kernels.draw import draw

    generator = torch.Generator().manual_seed(rows * width)
    key, step = torch.tensor(TABLE[:2]), torch.tensor(STEP)
    position, sample = (torch.randint(0, 2**32, (rows,), generator=generator) for _ in range(2))
    place = (key, position, sample, step)
    wanted = _drawn_rows(*place, width, normal)
    found = draw(*(tensor.to(device) for tensor in place), width, normal).cpu()
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return [f"{found.dtype} {found.shape}"]
    if not normal:
        return [] if torch.equal(found, wanted) else ["uniform numbers differ"]
    exact = exact_normals(key, position, sample, step, width)
    # torch's own are up to 2 units of the last place from exact; of the interpreter's numpy the logarithm alone is 2.5.
    unit = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)).double() - exact.float().abs()
    apart = float(((found.double() - exact).abs() / unit).max())
    return [f"{apart} units in the last place from exact"] if apart > (4 if device == "cpu" else 3) else []


def exact_normals(key: Tensor, position: Tensor, sample: Tensor, step: Tensor, width: int) -> Tensor:
    """Box and Muller's formula in float64, of angles as float32 has them."""
    column = torch.arange(width)
    element, chunk = column % 128, column // 128
    counter = (chunk * 1024 + element % 32, position[:, None], sample[:, None], step)
    words = [word >> 8 for word in philox_4x32(counter, (key[0], key[1]))]
    second = element // 64 == 1
    of_radius, of_angle = torch.where(second, words[2], words[0]), torch.where(second, words[3], words[1])
    angle = (of_angle.float() * (2 * math.pi * 2.0**-24)).double()
    radius = (-2 * ((of_radius.float() + 0.5) * 2.0**-24).double().log()).sqrt()
    return radius * torch.where(element // 32 % 2 == 0, angle.cos(), angle.sin())


def run_all(device: str) -> dict[str, list[str]]:
    found = {name: check(case, device) for name, case in CASES.items()}
    return found | {name: check_draws(*draws, device) for name, draws in DRAWS.items()}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[str]]:
    """What the interpreter finds for every case, and what torch's checks say of the operations."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", [*CASES, *DRAWS, "layers", "opcheck"])
def test_interpreted_kernels_give_the_golden_results(interpreted, name):
    assert not interpreted[name]


def test_the_cases_are_clipped_and_round_both_ways():
    """Otherwise nothing above would notice a wrong bit."""
    case = CASES["stochastic"]
    found, kept, seen = expected(case)
    share = unpack(kept, case.shape[-1]).float().mean()
    assert 0.8 < share < 0.99
    assert seen > case.range
    nearest = expected(replace(case, stochastic=False))[0]
    assert 0.2 < (found != nearest).float().mean() < 0.8


def test_rows_that_belong_to_no_token_are_refused():
    from transforms.kernels.convert import convert

    given = CASES["stochastic"].arguments()
    with pytest.raises(ValueError, match="not \\(batch, sequence, features\\)"):
        convert(CASES["stochastic"].code(), given["acc"].flatten(0, 1), given["own"], given["place"], False)


@pytest.mark.parametrize(
    ("form", "scaling", "has"),
    [
        (Integer(127), "range", True),
        (Float(4, 3, "nan"), "range", False),
        (Integer(15, signed=False), "range", False),
        (Integer(127), "row", False),
    ],
)
def test_other_converters_have_no_kernel(form, scaling, has):
    assert bool(ProductCode(QuantiseCode(form, Scaling(scaling))).text) == has


def launched(case: Case | tuple[int, int, bool]):
    """The kernel that a case launches, and its arguments by name."""
    from transforms.kernels import convert, draw

    recorded = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *tensors, **arguments: recorded.append((self.kernel, tensors, arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "wrap_triton", Recorder)
        patch.setattr(draw, "wrap_triton", Recorder)
        if isinstance(case, Case):
            converted(case, "cpu")
        else:
            rows, width, normal = case
            key = torch.zeros(2, dtype=torch.int64)
            draw.draw(key, key[:1].expand(rows), key[:1].expand(rows), key[0], width, normal)
    [(kernel, tensors, arguments)] = recorded
    return kernel, {**dict(zip(kernel.arg_names, tensors)), **arguments}


POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.uint8: "*u8"}


def compile_ahead(case: Case | tuple[int, int, bool]):
    """The kernel of a case compiled for compute capability 9.0."""
    kernel, arguments = launched(case)
    constants = {name: arguments[name] for name in kernel.arg_names if name.isupper()}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "constexpr" if name in constants else "i32"
        if isinstance(value, torch.Tensor) or (name not in constants and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return compile_for_hopper(kernel, signature, constants, attributes, arguments["num_warps"])


COMPILED: dict[str, Any] = {
    "stochastic": Case((2, 16, 256)),
    "nearest, tile": Case((2, 16, 256), "float32", stochastic=False, total=True, single=True),
    "columns, bits": Case((2, 16, 256), first_column=77, tokens=(2, 16)),
    "noise, strength": Case((2, 16, 256), photons=5.0, strength=0.5),
    "heads": Case((2, 3, 16, 256), heads=(1, 0), single=True, packs=False),
    "uniform": (32, 256, False),
    "normal": (32, 256, True),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("stochastic", "nearest, tile", "uniform") else [pytest.mark.slow])
        for name in COMPILED
    ],
)
def test_kernels_compile_for_hopper(name, tmp_path, monkeypatch):
    """Without local memory: no registers are spilled, no function keeps a table there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_ahead(COMPILED[name])
    text = compiled.asm["ptx"]
    assert ".target sm_90a" in text
    assert ".local" not in text
    assert "st.global.v4" in text or name in ("columns, bits", "noise, strength")
    if name == "stochastic":
        # Sums move by 16 bytes; one Philox call serves 8 elements, and no random word moves between threads.
        assert "ld.global.v4" in text
        assert text.count("mul.hi.u32") <= 14 * 8
        assert text.count("cvt.rn.bf16") == 64
    if name == "nearest, tile":
        assert "fma.rn" not in text  # quotient, product and sum round each by themselves
    assert "STACK:0 " in resources(compiled, tmp_path)


def resources(compiled, folder: Path) -> str:
    """Registers and memory of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [str(tool), "--dump-resource-usage", str(folder / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ["stochastic", "not observing", "noise, strength", "tokens"])
def test_compiled_code_sees_what_is_written(name, monkeypatch):
    written = written_by(*launched(CASES[name]), monkeypatch)
    wanted = {"out", "kept"} | ({"seen"} if CASES[name].observing else set())
    assert written == wanted


def test_compiled_layers_have_the_kernels_in_one_graph(monkeypatch):
    """Traced without a GPU: shapes and dtypes are the golden function's, and what a range has seen is written."""
    from torch._dynamo.backends.common import aot_autograd

    from transforms.kernels import convert

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        outputs = [node.meta["val"] for node in graph.graph.output_node().args[0]]
        return make_boxed_func(lambda *inputs: [torch.zeros(tuple(o.shape), dtype=o.dtype) for o in outputs])

    pretend_hopper(monkeypatch)
    monkeypatch.setattr(product, "kernels", convert, raising=False)
    case = CASES["noise, strength"]
    code = replace(case.code(), tile=64, weight=Scaling("tensor", of_weight=True))
    given = (torch.randn(2, 5, 100).bfloat16(), torch.randn(77, 100).bfloat16(), case.arguments()["own"])
    place = case.arguments()["place"]
    wanted = code.multiply(*given, place, True)
    monkeypatch.setattr(ProductCode, "has_kernel", lambda code, acc: True)
    with torch.no_grad():
        traced = torch.compile(
            lambda *given: code.multiply(*given, place, True), backend=aot_autograd(fw_compiler=keep), fullgraph=True
        )
        found = traced(*given)
    assert found[1] is wanted[1] is None, "of several tiles the backward finds out again what was clipped"
    assert (found[0].shape, found[0].dtype) == (wanted[0].shape, wanted[0].dtype)
    calls = [node for node in graphs[0].graph.nodes if "triton_kernel_wrapper_functional" in str(node.target)]
    assert [set(node.kwargs["tensors_to_clone"]) for node in calls] == [{"seen", "out", "kept"}] * 2


def alike(found: Tensor | None, wanted: Tensor | None) -> bool:
    return torch.equal(found, wanted) if found is not None and wanted is not None else found is wanted


def check_layers() -> list[str]:
    """Products of a linear layer and of attention that take the kernel, against themselves without it."""
    from transforms.kernels import convert

    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(2, 5, 100, generator=generator), torch.randn(77, 100, generator=generator) / 10
    q, k = torch.randn(2, 4, 5, 16, generator=generator), torch.randn(2, 2, 9, 16, generator=generator)
    place = (torch.tensor([STEP, GROUP, FIRST_SAMPLE]), None)
    case = CASES["stochastic"]
    tiled = replace(case.code(), tile=48, weight=Scaling("tensor", of_weight=True))
    plan = AttentionPlan(None, None, None, None, case.code(), case.code(), (), first_head=2)
    permuted = torch.arange(9).flip(0)

    def results(code: ProductCode) -> list[Tensor | None]:
        own = [case.arguments()["own"] for _ in range(5)]
        scores = {"scores": own[2], "context": own[2]}
        found = [*code.multiply(x, weight, own[0], place, True), *code.through(x, own[1], place, True)]
        found += replace(code, tile=0).multiply(x, weight, own[4], place, True)
        for name, keys in (("scores", None), ("context", permuted), ("scores", permuted)):
            step = _Step(plan, 1.0, scores, place, keys)
            found += step._product(plan.scores, name, q, k.transpose(-1, -2), slice(3, 8), True)
        return [*found, *(tensors[2] for tensors in own)]

    wanted = results(tiled)
    with pytest.MonkeyPatch.context() as patch, Calls() as calls:
        patch.setattr(ProductCode, "has_kernel", lambda code, acc: True)
        for module in (product, attention):
            patch.setattr(module, "kernels", convert, raising=False)
        found = results(tiled)
    problems = [f"{len(calls.found)} calls"] if len(calls.found) != 3 + 1 + 1 + 2 else []
    return problems + [f"result {i}" for i, both in enumerate(zip(found, wanted)) if not alike(*both)]


class Calls(TorchDispatchMode):
    """Notes the calls of the project's operations."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "newcompute":
            # What it is given may be changed by the call.
            self.found.append((func, tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)))
        return func(*args, **(kwargs or {}))


def check_operations(device: str, tests: tuple[str, ...]) -> list[str]:
    """That operations change what their schema says and nothing else, return nothing that they were given, ..."""
    with Calls() as calls:
        for name in OPERATIONS:
            check(CASES[name], device)
        check_draws(*DRAWS["3 x 77, normal"], device)
    assert len(calls.found) == len(OPERATIONS) + 1
    return [
        f"{operation}: {test}: {result}"
        for operation, arguments in calls.found
        for test, result in torch.library.opcheck(operation, arguments, test_utils=tests, raise_exception=False).items()
        if result != "SUCCESS"
    ]


OPERATIONS = ("stochastic", "not observing", "columns, bits", "noise, strength", "heads, tokens")


@pytest.mark.gpu
def test_the_operations_are_what_torch_expects_of_one():
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    assert not check_operations("cuda", tests)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["stochastic", "noise, strength", "tiles, the last"])
def test_kernels_inside_compiled_code(name, monkeypatch):
    from transforms.kernels import convert as module

    monkeypatch.setattr(module, "convert", torch.compile(module.convert, fullgraph=True))
    assert not check(CASES[name], "cuda")


@pytest.mark.gpu
def test_a_layer_on_a_gpu_takes_the_kernel():
    """A whole product in tiles, and what its backward needs."""
    code = replace(CASES["stochastic"].code(), tile=48)
    x, weight = torch.randn(2, 5, 100), torch.randn(77, 100) / 10
    own = CASES["stochastic"].arguments()["own"]
    place = (torch.tensor([STEP, GROUP, FIRST_SAMPLE]), None)
    with Calls() as calls:
        given = (x.cuda(), weight.cuda(), [tensor.cuda() for tensor in own], (place[0].cuda(), None), True)
        found, kept = code.multiply(*given)
    assert len(calls.found) == 3
    wanted, wanted_kept = code.multiply(x, weight, own, place, True)
    assert torch.equal(given[2][2].cpu() > 0.25, own[2] > 0.25)
    # Devices sum products in other orders: a step of the converter apart where that moved a sum over a threshold.
    assert (found.cpu() - wanted).abs().max() < 3.1 * CASES["stochastic"].range / 127
    assert ((found.cpu() - wanted).abs() > 1e-5).float().mean() < 0.01
    assert (unpack(kept.cpu(), 77) != unpack(wanted_kept, 77)).float().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, *DRAWS])
def test_kernels_give_the_golden_results_on_a_gpu(name):
    assert not (check(CASES[name], "cuda") if name in CASES else check_draws(*DRAWS[name], "cuda"))


if __name__ == "__main__":
    from transforms.kernels import convert as converter
    from transforms.kernels import draw as drawing

    # The interpreter's kernels are launched as they are.
    converter.wrap_triton = drawing.wrap_triton = lambda kernel: kernel
    print(
        json.dumps({**run_all("cpu"), "layers": check_layers(), "opcheck": check_operations("cpu", ("test_schema",))})
    )
