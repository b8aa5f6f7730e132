"""Plans against what really happens: parameters, moments and kept activations of models that are built and run here, FLOPs
that PyTorch counts, torch's own pipeline schedules. Layouts of several devices are one process's part under a fake process
group, whose exchanges do nothing: sizes are right, values are not.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from support import ROOT
from torch.autograd.graph import get_gradient_edge
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models.llama import Block, Head, Llama, rope_table
from models.sizes import SIZES, LlamaShape, flops_per_token
from parallel import context as contexts
from parallel import mesh as meshes
from parallel import tensor as tensors
from parallel.activation_checkpointing import _wrapped
from parallel.degrees import Degrees, resolve_degrees
from parallel.names import named_parameters
from train.config import named_shape
from train.config_rules import cross_checks
from train.config_sources import load_config
from train.optimizer import build_optimizer, materialise_state
from train.plan import suggestion_lines
from train.plan_memory import GIB, _device, block_bytes, in_flight, logit_bytes, plan_memory
from train.plan_search import least_memory, smallest_world, suggest, with_changes
from train.plan_setup import Setup
from train.plan_time import GPUS, bubble_share, extra_share, plan_time, recomputed_flops
from train.trainer import build_model

H100 = GPUS["h100"]
TINY = LlamaShape(dim=256, num_layers=5, num_heads=8, num_kv_heads=2, ffn_dim=640, vocab_size=1000, max_context=512)


def tiny(world_size: int = 1, **settings) -> tuple:
    """(configuration, shape, setup) of TINY on the CPU, uncompiled; `settings` have "__" for the dot."""
    settings = {"run__device": "cpu", "compile__enabled": "false", "training__sequence_length": 512} | settings
    settings |= {f"model__shape__{key}": getattr(TINY, key) for key in ("dim", "num_layers", "num_heads")}
    settings |= {f"model__shape__{key}": getattr(TINY, key) for key in ("num_kv_heads", "ffn_dim", "vocab_size")}
    flags = [part for key, value in settings.items() for part in (f"--{key.replace('__', '.')}", str(value))]
    config = load_config([], flags, world_size)
    shape = named_shape(config.model)
    return config, shape, Setup.of(config, shape, resolve_degrees(config, world_size))


def llama3(size: str, world_size: int | None, *flags: str):
    names = ["--model.name", "llama3", "--model.size", size, "--training.sequence_length", "8192"]
    return load_config([], [*names, *flags], world_size)


@pytest.fixture
def fake_mesh():
    """Makes the mesh of one process among many that are not there."""

    def make(rank: int = 0, **degrees: int) -> meshes.Mesh:
        if dist.is_initialized():
            dist.destroy_process_group()
        full = dict.fromkeys(("pipeline", "replicate", "shard", "context", "tensor"), 1) | degrees
        world_size = 1
        for degree in full.values():
            world_size *= degree
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        return meshes.build(torch.device("cpu"), **full)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


# State


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def state_bytes(optimizer) -> int:
    moments = [local(value) for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    parts = [part for m in moments for part in ((m.codes, m.scale) if hasattr(m, "codes") else (m,))]
    return sum(part.numel() * part.element_size() for part in parts)


LAYOUTS = {
    "one process": {},
    "shard 3, which divides nothing": {"shard": 3},
    "replicate 2 x shard 2": {"replicate": 2, "shard": 2},
    "tensor 2 x shard 4": {"tensor": 2, "shard": 4},
    "context 2 x shard 2": {"context": 2, "shard": 2},
    "pipeline 2 x tensor 2": {"pipeline": 2, "tensor": 2},
}


OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_bf16", "muon")
# Muon gathers matrices, over groups that DTensor remembers from the fake group before.
CASES = [(layout, name) for layout in LAYOUTS for name in OPTIMIZERS if (name, layout[:4]) != ("muon", "pipe")]


@pytest.mark.parametrize(("layout", "optimizer"), CASES)
def test_state_is_exactly_what_a_model_holds(fake_mesh, layout, optimizer):
    degrees = {"replicate": 1} | LAYOUTS[layout]
    world_size = 1
    for degree in degrees.values():
        world_size *= degree
    flags = {f"parallel__{key}": value for key, value in degrees.items()}
    config, shape, setup = tiny(world_size, optimizer__name=optimizer, training__global_batch_size=12, **flags)
    held = []
    for stage in range(setup.degrees.pipeline):
        mesh = fake_mesh(rank=stage * world_size // setup.degrees.pipeline, **degrees)
        parts = build_model(config, mesh, shape).parts
        parameters = [p for _, p in named_parameters(*parts)]
        built = build_optimizer(parts, config.optimizer, compiled=False)
        materialise_state(built)
        held.append((4 * sum(local(p).numel() for p in parameters), state_bytes(built)))
    for rank, (stages, (parameters, moments)) in enumerate(zip(setup.stages(), held)):
        planned = _device(setup, rank, stages)
        assert (planned.parameters, planned.gradients, planned.optimizer) == (parameters, parameters, moments)


def test_offloaded_state_is_the_hosts():
    _, _, here = tiny()
    _, _, offloaded = tiny(parallel__cpu_offload="true")
    here, offloaded = plan_memory(here), plan_memory(offloaded)
    assert offloaded.host == here.parameters + here.gradients + here.optimizer
    assert offloaded.total == here.total - offloaded.host


# Activations


class Kept(TorchDispatchMode):
    """Storages that operations make, as long as something holds them; and the most bytes of them at once."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self, without=()) -> int:
        others = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(n for key, (ref, n) in self.storages.items() if not ref.expired() and key not in others)


def block_of(config, mesh):
    model = Llama(TINY, context=512)
    if mesh is not None and mesh.context_size > 1:
        contexts.split(model, mesh)
    if mesh is not None and mesh.tensor.size() > 1:
        tensors.split(model, mesh.tensor)
    block, mode = model.model.layers["0"], config.activation_checkpointing.mode
    return block if mode in ("none", "budget") else _wrapped(block, mode, None)


def inputs_of(setup: Setup):
    degrees = setup.degrees
    cos, sin = rope_table(TINY, 512 // degrees.context)
    x = torch.randn(setup.rows, 512 // degrees.context // degrees.tensor, TINY.dim, requires_grad=True)
    return x, cos, sin


@pytest.mark.parametrize("degrees", [{}, {"tensor": 2}, {"context": 2}, {"tensor": 2, "context": 2}], ids=str)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_kept_bytes_of_an_eager_block(fake_mesh, mode, degrees):
    world_size = degrees.get("tensor", 1) * degrees.get("context", 1)
    flags = {f"parallel__{key}": value for key, value in degrees.items()}
    config, _, setup = tiny(world_size, activation_checkpointing__mode=mode, training__global_batch_size=2, **flags)
    mesh = fake_mesh(**degrees) if degrees else None
    block, (x, cos, sin) = block_of(config, mesh), inputs_of(setup)
    with Kept() as kept:
        y = block(x, cos, sin)
    # Parameters are no activations; the output is the next block's.
    parameters = [local(p) for p in block.parameters()]
    measured = kept.bytes([*parameters, x, y, cos, sin]) + x.untyped_storage().nbytes()
    assert block_bytes(setup, mode) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("degrees", [{}, {"tensor": 2}], ids=str)
@pytest.mark.parametrize(
    ("mode", "budget"), [("none", 0), ("selective", 0), ("full", 0), ("budget", 0.0), ("budget", 0.5)]
)
def test_kept_bytes_of_a_compiled_block(fake_mesh, mode, budget, degrees):
    if degrees and mode == "full":
        pytest.skip("goes around the compiled block, and keeps its input")
    flags = {"activation_checkpointing__budget": budget} if mode == "budget" else {}
    flags |= {f"parallel__{key}": value for key, value in degrees.items()}
    size = degrees.get("tensor", 1)
    checkpointing = {"activation_checkpointing__mode": mode, "training__global_batch_size": 2}
    config, _, setup = tiny(size, compile__enabled="true", **checkpointing, **flags)
    mesh = fake_mesh(**degrees) if degrees else None
    block, (x, cos, sin) = block_of(config, mesh), inputs_of(setup)
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    torch._dynamo.reset()
    block.compile(fullgraph=True, backend="aot_eager")
    settings: dict[str, object] = {"activation_memory_budget": budget if mode == "budget" else 1.0}
    if hasattr(torch._functorch.config, "unsafe_treat_script_objects_as_zero_size"):
        # As parallel/apply.py sets it: torch 2.11 has no such objects in its graphs, and not this setting.
        settings["unsafe_treat_script_objects_as_zero_size"] = True
    with (
        torch._functorch.config.patch(settings),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        block(x, cos, sin)
    for tensor in [*map(local, block.parameters()), cos, sin]:
        saved.pop(tensor.untyped_storage()._cdata, None)
    if (
        degrees and budget == 0.5
    ):  # the compiler counts tensor-parallel weights as well, and so keeps more (docs/plan.md)
        assert 1.0 < sum(saved.values()) / block_bytes(setup, mode) < 1.5
        return
    # The budget is an upper limit, and the compiler fills it with whole tensors.
    assert block_bytes(setup, mode) == pytest.approx(sum(saved.values()), rel=0.1 if mode == "budget" else 0.01)


@pytest.mark.parametrize("tensor", [1, 2])
def test_bytes_of_the_logits(fake_mesh, tensor):
    _, _, setup = tiny(tensor, parallel__tensor=tensor, training__global_batch_size=1)
    head, x = Head(TINY), torch.randn(1, 512 // tensor, TINY.dim, requires_grad=True)
    if tensor > 1:
        mesh = fake_mesh(tensor=tensor)
        model = Llama(TINY, context=512)
        tensors.split(model, mesh.tensor)
        head = model.lm_head
    with Kept() as kept:
        head(x, torch.randint(1000, (1, 512))).backward()
    assert logit_bytes(setup) == pytest.approx(kept.peak, rel=0.1)
    chunked = replace(setup, chunk_tokens=64)
    assert logit_bytes(chunked) < logit_bytes(setup) / 2


def test_tensor_and_context_divide_by_hand():
    """One block of TINY that keeps everything, compiled: 4 D + 2 Q + 2 K + 3 F numbers per token and a float32 per head."""
    d, q, k, f, heads, tokens = 256, 256, 64, 640, 8, 512
    compiled = {"compile__enabled": "true", "training__global_batch_size": 1, "parallel__replicate": 1}
    one = block_bytes(tiny(1, **compiled)[2], "none")
    assert one == tokens * 4 * (4 * d + 2 * q + 2 * k + 3 * f + heads)
    by_tensor = block_bytes(tiny(2, parallel__tensor=2, **compiled)[2], "none")
    assert by_tensor == tokens * 4 * (2 * d + (2 * d + 2 * q + 2 * k + 3 * f + heads) / 2)  # gathered inputs are whole
    by_context = block_bytes(tiny(2, parallel__context=2, **compiled)[2], "none")
    assert by_context == tokens / 2 * 4 * (
        4 * d + 2 * q + 2 * k * 2 + 3 * f + heads
    )  # keys and values of the whole row


def test_degrees_take_memory_off_a_device():
    flags = ["--training.global_batch_size", "8", "--training.micro_batch_size", "1", "--parallel.replicate", "1"]

    def plan(*more: str):
        config = llama3("8B", 4, *flags, *more)
        return plan_memory(Setup.of(config, named_shape(config.model), resolve_degrees(config, 4)))

    shards, halves = plan("--parallel.shard", "4"), plan("--parallel.shard", "2", "--parallel.tensor", "2")
    assert halves.parameters == pytest.approx(shards.parameters, rel=1e-4)  # norms are on both tensor devices
    assert halves.gathered == pytest.approx(shards.gathered / 2, rel=1e-4)
    assert halves.activations < 0.6 * shards.activations
    cut = plan("--parallel.shard", "2", "--parallel.context", "2")
    assert (cut.parameters, cut.gathered) == (shards.parameters, shards.gathered)
    assert cut.logits == shards.logits / 2
    assert shards.accumulated == 0
    once = plan("--parallel.shard", "4", "--parallel.reduce_each_micro_batch", "false")
    assert once.accumulated == pytest.approx(4 * 8_030_261_248)


def test_the_fullest_stage_is_planned():
    flags = ["--training.global_batch_size", "16", "--training.micro_batch_size", "1", "--parallel.pipeline", "4"]
    config = llama3("8B", 4, *flags)
    setup = Setup.of(config, named_shape(config.model), resolve_degrees(config, 4))
    plan = plan_memory(setup)
    assert (plan.rank, plan.in_flight, plan.logits) == (0, 4, 0)  # the first keeps most micro-batches
    last = plan_memory(replace(setup, micro_batches=1, rows=4, mode="full"))
    assert (last.rank, last.in_flight) == (3, 1)  # with one large micro-batch logits weigh most
    assert last.logits > 16 * GIB
    assert plan_memory(replace(setup, schedule="gpipe")).in_flight == 16
    assert plan.accumulated == 4 * plan.parameters / 4  # one device per stage: parameters are whole anyway


# Schedules


def torch_order(kind: str, pipeline: int, per_device: int, count: int) -> list[list]:
    """The actions of each device, from torch's own schedules without their process groups."""
    names = {
        "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
        "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
        "zbv": schedules.ScheduleZBVZeroBubble,
    }
    schedule = object.__new__(names[kind])
    schedule.n_local_stages, schedule.pp_group_size, schedule._n_microbatches = per_device, pipeline, count
    schedule.number_of_rounds = max(1, count // pipeline)
    schedule.microbatches_per_round = count // schedule.number_of_rounds
    schedule.num_stages = pipeline * per_device
    return [[a for a in schedule._calculate_single_rank_operations(rank) if a] for rank in range(pipeline)]


def most_in_flight(actions: list) -> int:
    now = most = 0
    for action in actions:
        now += (action.computation_type == schedules.F) - (action.computation_type in (schedules.B, schedules.W))
        most = max(most, now)
    return most


def waiting_share(orders: list[list], stages: int, forward: float, inputs: float, weights: float) -> float:
    """Run the actions, each as soon as what it needs is there; waiting over working time of the busiest device."""
    cost = {schedules.F: forward, schedules.I: inputs, schedules.W: weights, schedules.B: inputs + weights}
    done: dict[tuple, float] = {}
    clock, place = [0.0] * len(orders), [0] * len(orders)
    while any(place[rank] < len(order) for rank, order in enumerate(orders)):
        for rank, order in enumerate(orders):
            if place[rank] == len(order):
                continue
            kind, stage, batch = (
                getattr(order[place[rank]], key) for key in ("computation_type", "stage_index", "microbatch_index")
            )
            if kind == schedules.F:
                needs = ("forward", stage - 1, batch) if stage else None
            elif kind == schedules.W:
                needs = ("backward", stage, batch)
            else:
                needs = ("backward", stage + 1, batch) if stage < stages - 1 else ("forward", stage, batch)
            if needs is not None and needs not in done:
                continue
            clock[rank] = max(clock[rank], done.get(needs, 0.0)) + cost[kind]
            if kind != schedules.W:
                done["forward" if kind == schedules.F else "backward", stage, batch] = clock[rank]
            place[rank] += 1
    work = max(sum(cost[action.computation_type] for action in order) for order in orders)
    return max(clock) / work - 1


@pytest.mark.parametrize(("pipeline", "per_device", "count"), [(4, 2, 8), (8, 2, 32), (4, 4, 16), (2, 2, 4)])
@pytest.mark.parametrize("kind", ["interleaved_1f1b", "zero_bubble", "zbv"])
def test_schedules_are_torchs_own(kind, pipeline, per_device, count):
    if kind == "zbv" and per_device != 2:
        pytest.skip("zbv has two stages per device")
    orders = torch_order(kind, pipeline, per_device, count)
    for rank, order in enumerate(orders):
        assert in_flight(kind, pipeline, rank, per_device, count) == most_in_flight(order)
    _, _, setup = tiny()
    setup = replace(
        setup,
        degrees=Degrees(pipeline, 1, 1, 1, 1),
        schedule=kind,
        per_device=per_device,
        micro_batches=count,
        compiled=False,
    )
    stages = pipeline * per_device
    assert bubble_share(setup, 1.0) == pytest.approx(waiting_share(orders, stages, 1, 1, 1))
    assert bubble_share(setup, 4 / 3) == pytest.approx(waiting_share(orders, stages, 1, 2, 1))  # with a forward again
    twice = replace(setup, compiled=True)
    assert bubble_share(twice, 5 / 3) == pytest.approx(waiting_share(orders, stages, 1, 2, 2))


# Arithmetic


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_what_is_computed_again_is_what_pytorch_counts(mode):
    _, _, setup = tiny(training__global_batch_size=1)
    block = Block(TINY) if mode == "none" else _wrapped(Block(TINY), mode, None)
    x, cos, sin = inputs_of(setup)
    with FlopCounterMode(display=False):
        y = block(x, cos, sin)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    products = 2 * 512 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 640)
    again = counter.get_total_flops() - 2 * products
    # The counter does not know the CPU's attention, which "full" runs again.
    attention = 4 * 256 * 512 if mode == "full" else 0
    assert 512 * (recomputed_flops(setup, mode) - attention) == again


@pytest.mark.parametrize(("compiled", "products"), [(False, (7, 7)), (True, (14, 14))])
def test_split_backwards_of_a_compiled_block_run_twice(compiled, products):
    """Why zero-bubble schedules are planned as slower: matrix products of the backward for inputs, and for weights."""
    torch._dynamo.reset()
    block = Block(TINY)
    if compiled:
        block.compile(fullgraph=True, backend="aot_eager")
    cos, sin = rope_table(TINY, 64)

    def count(function):
        with torch.profiler.profile() as profile:
            result = function()
        return sum(event.count for event in profile.key_averages() if event.key == "aten::mm"), result

    for _ in range(2):  # the first also compiles
        x = torch.randn(1, 64, TINY.dim, requires_grad=True)
        with torch._functorch.config.patch(donated_buffer=False):  # as parallel/apply.py sets it for these schedules
            y = block(x, cos, sin)
        # What parallel.pipeline.Stage keeps for torch 2.11, where the first half would end the life of the second's graph.
        edge = get_gradient_edge(y)
        inputs, (_, groups) = count(
            lambda y=y, x=x: stage_backward_input([y], [torch.ones_like(y)], [x], iter(block.parameters()))
        )
        weights, _ = count(lambda groups=groups: stage_backward_weight(iter(block.parameters()), groups))
        del edge
    assert (inputs, weights) == products


def test_time_without_parallelism_is_arithmetic():
    config = llama3("8B", 1, "--training.global_batch_size", "4")
    shape = named_shape(config.model)
    time = plan_time(Setup.of(config, shape, resolve_degrees(config, 1)), H100, 0.5)
    assert time.total == pytest.approx(4 * 8192 * flops_per_token(shape, 8192) / (0.5 * 989e12), rel=1e-3)
    assert time.mfu == pytest.approx(0.5, rel=1e-3)
    assert time.exchanges == ()


def test_traffic_by_hand():
    """8B on 2 nodes: shards over all of them, weights in bfloat16 and gradients in float32."""
    flags = ["--training.global_batch_size", "32", "--training.micro_batch_size", "1", "--parallel.replicate", "1"]
    config = llama3("8B", 16, *flags, "--parallel.shard", "16")
    time = plan_time(Setup.of(config, named_shape(config.model), resolve_degrees(config, 16)), H100, 0.4)
    weights, gradients = time.exchanges
    assert weights.size == pytest.approx(2 * 8_030_261_248 * 15 / 16)  # once, though there are two micro-batches
    assert gradients.size == pytest.approx(2 * 4 * 8_030_261_248 * 15 / 16)
    assert (weights.link, weights.rate) == ("network", 8 * 50e9)  # a ring through both nodes has 8 links between them
    config = llama3("8B", 16, *flags, "--parallel.shard", "2", "--parallel.tensor", "8")
    time = plan_time(Setup.of(config, named_shape(config.model), resolve_degrees(config, 16)), H100, 0.4)
    assert [(e.link, e.rate) for e in time.exchanges] == [("network", 50e9)] * 2 + [("NVLink", 450e9)]


def test_float8_is_counted_where_it_runs():
    config = llama3("8B", 1, "--float8.recipe", "tensorwise")
    setup = Setup.of(config, named_shape(config.model), resolve_degrees(config, 1))
    block = 2 * 4096 * 4096 + 3 * 4096 * 14336  # k_proj and v_proj are too small
    expected = 6 * 32 * block / flops_per_token(named_shape(config.model), 8192)
    assert plan_time(setup, H100, 0.4).float8_share == pytest.approx(expected, rel=1e-3)
    plain = replace(setup, float8_layers=frozenset(), recipe="none")
    assert plan_time(setup, H100, 0.4).total < plan_time(plain, H100, 0.4).total
    assert plan_time(setup, GPUS["a100"], 0.4).total == plan_time(plain, GPUS["a100"], 0.4).total


def test_full_checkpointing_costs_a_quarter():
    config = llama3("8B", 1)
    setup = Setup.of(config, named_shape(config.model), resolve_degrees(config, 1))
    assert extra_share(setup, "full") == pytest.approx(0.25, abs=0.01)
    assert extra_share(setup, "selective") == extra_share(setup, "none") == 0
    costs = [extra_share(replace(setup, budget=budget), "budget") for budget in (0.0, 0.3, 1.0)]
    assert costs[0] == extra_share(setup, "full")
    assert costs[0] > costs[1] > costs[2] == 0


# Search


@pytest.mark.parametrize(("size", "world_size", "batch"), [("8B", 8, 128), ("70B", 64, 1024), ("405B", 512, 512)])
def test_suggestions_fit_and_are_valid(size, world_size, batch):
    config = llama3(size, None, "--training.global_batch_size", str(batch))
    shape = named_shape(config.model)
    found = suggest(config, shape, world_size, H100, 0.4)
    assert found
    for candidate in found:
        changed = with_changes(config, candidate.changes())
        assert list(cross_checks(changed, world_size)) == []
        degrees = resolve_degrees(changed, world_size)
        assert degrees == candidate.setup.degrees
        assert degrees.tensor <= 8
        assert plan_memory(Setup.of(changed, shape, degrees)) == candidate.memory
        assert candidate.setup.mode != "full" or degrees.tensor == 1
        assert candidate.memory.total <= 0.9 * 80 * GIB
    assert [c.order for c in found] == sorted(c.order for c in found)


def test_more_memory_makes_simpler_layouts():
    config = llama3("8B", None, "--training.global_batch_size", "64")
    shape = named_shape(config.model)
    large = replace(H100, memory_gib=1000)
    assert suggest(config, shape, 8, large, 0.4)[0].setup.degrees == Degrees(1, 8, 1, 1, 1)
    assert suggest(config, shape, 8, H100, 0.4)[0].setup.shards > 1


def test_nothing_fits_says_what_would():
    config = llama3("70B", None, "--training.global_batch_size", "1024")
    shape = named_shape(config.model)
    assert suggest(config, shape, 1, H100, 0.4) == []
    smallest = smallest_world(config, shape, H100)
    assert smallest is not None
    assert suggest(config, shape, smallest, H100, 0.4)
    assert suggest(config, shape, smallest // 2, H100, 0.4) == []
    text = "\n".join(suggestion_lines(config, shape, 1, H100, 0.4))
    assert "nothing fits 1 x H100 with 80 GiB" in text
    assert f"the smallest power of two of such GPUs that fits is {smallest}" in text
    assert least_memory(config, shape, 97, H100) == float("inf")  # a prime that divides nothing
    assert "no layout divides 1024 rows" in "\n".join(suggestion_lines(config, shape, 97, H100, 0.4))


@pytest.mark.parametrize(("size", "world_size"), [("8B", 8), ("70B", 64), ("70B", 128), ("70B", 256), ("405B", 512)])
def test_the_configured_layouts_fit(size, world_size):
    config = load_config([str(ROOT / "configs" / f"llama3_{size.lower()}.toml")], [], world_size)
    assert named_shape(config.model) == SIZES["llama3"][size]
    setup = Setup.of(config, named_shape(config.model), resolve_degrees(config, world_size))
    assert plan_memory(setup).total < 0.9 * 80 * GIB
