"""Time of one step, estimated: arithmetic at an assumed share of the peak, the pipeline's gaps, and traffic. Torch-free.

Every figure here is an estimate from shapes and the constants below; nothing is measured. Traffic is bytes that each device
receives, and its time a lower bound: bytes over the bandwidth of the link, without latency. What goes with parameters and
gradients overlaps with arithmetic and counts only as far as it outlasts that; the exchanges of tensor and context
parallelism stand between products, and are added (not with `async_tensor`).
"""

from __future__ import annotations

from dataclasses import dataclass

from models.sizes import peak_flops
from train.plan_memory import block_bytes, gathered_block
from train.plan_setup import Setup, Stage, block_parameters, end_parameters, numbers

NODE = 8
"""GPUs that NVLink joins."""
NETWORK = 50e9
"""Bytes/s of each GPU's link to other nodes, per direction: 400 Gbit/s."""
HOST_LINK = 50e9
"""Bytes/s between a GPU and its host's memory, per direction (PCIe 5.0 x16)."""
ASSUMED_MFU = 0.4
"""Share of its peak that arithmetic reaches while it runs, unless another one is given."""
HIDDEN = 0.9
"""Share of the traffic beside arithmetic that is really hidden by it."""
FLOAT8_GAIN = {"tensorwise": 1.5, "rowwise": 1.15}
"""How much faster products run in float8. With these, 8B gains as much as published: tensorwise 28% (torchtitan,
8 x H100), rowwise 10% (torchao)."""


@dataclass(frozen=True)
class Gpu:
    """What an estimate assumes of a device."""

    name: str
    peak: float
    """Dense bf16 FLOP/s."""
    memory_gib: float
    bandwidth: float
    """Bytes/s of its memory."""
    nvlink: float
    """Bytes/s per direction."""
    has_float8: bool = True


def _gpu(name: str, memory_gib: float, bandwidth: float, nvlink: float, has_float8: bool = True) -> Gpu:
    peak = peak_flops(name)
    assert peak is not None
    return Gpu(name, peak, memory_gib, bandwidth, nvlink, has_float8)


GPUS = {  # vendor data sheets
    "h100": _gpu("H100", 80, 3.35e12, 450e9),
    "h200": _gpu("H200", 141, 4.8e12, 450e9),
    "a100": _gpu("A100", 80, 2.0e12, 300e9, has_float8=False),
    "b200": _gpu("B200", 180, 8.0e12, 900e9),
}


@dataclass(frozen=True)
class Exchange:
    """One kind of traffic of a step."""

    name: str
    size: float
    """Bytes that a device receives."""
    rate: float
    """Bytes/s."""
    link: str
    hidden: bool = False
    """Overlaps with arithmetic."""

    @property
    def seconds(self) -> float:
        return self.size / self.rate


@dataclass(frozen=True)
class TimePlan:
    """Seconds of one step."""

    arithmetic: float
    """Forward and backward of the busiest device along the pipeline."""
    recomputed: float
    """Of activation checkpointing, the chunked loss, and backwards that run twice."""
    bubble: float
    """In which a pipeline's device waits."""
    exchanges: tuple[Exchange, ...]
    total: float
    tokens_per_second: float
    """Per GPU."""
    mfu: float
    float8_share: float
    """Of the FLOPs that the MFU counts."""

    @property
    def shown(self) -> float:
        """Traffic that arithmetic does not hide."""
        return max(0.0, self.total - self.arithmetic - self.recomputed - self.bubble)


def attention_flops(setup: Setup) -> float:
    """Forward, per token and block; without a discount for masks, as the MFU counts it."""
    return 4.0 * setup.shape.num_heads * setup.shape.head_dim * setup.length


def product_flops(setup: Setup) -> float:
    """Forward, per token and block, of the matrix products with weights."""
    return 2.0 * sum(p.size for p in block_parameters(setup.shape, 1) if p.columns > 1)


def head_flops(setup: Setup) -> float:
    """Forward, per token."""
    return 2.0 * setup.shape.vocab_size * setup.shape.dim


def recomputed_flops(setup: Setup, mode: str) -> float:
    """What a block computes again, per token. Its last product, down_proj, is not needed again."""
    down = 2.0 * setup.shape.dim * setup.shape.ffn_dim
    full = product_flops(setup) - down + attention_flops(setup)
    if mode == "budget":
        # The compiler drops what is cheapest per byte first: nothing is multiplied again down to what "selective" keeps.
        least, selective, none = (block_bytes(setup, other) for other in ("full", "selective", "none"))
        free = (selective - least) / (none - least)
        return full * max(0.0, 1 - setup.budget / free)
    return full if mode == "full" else 0.0


def recomputed_bytes(setup: Setup, mode: str) -> float:
    """Memory traffic, per token and block, of what is computed again without a product: norms, rotation, SwiGLU."""
    shape = setup.shape
    rotated = (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    moved = setup.compute_bytes * (4 * shape.dim + 2 * rotated + 3 * shape.ffn_dim)
    if mode == "budget":
        return moved * (1 - setup.budget)
    return 0.0 if mode == "none" else moved


def extra_share(setup: Setup, mode: str) -> float:
    """FLOPs that an activation-checkpointing mode adds, as a share of those of the model."""
    layers = setup.shape.num_layers
    blocks = layers * (product_flops(setup) + attention_flops(setup))
    return layers * recomputed_flops(setup, mode) / (3 * (blocks + head_flops(setup)))


def float8_share(setup: Setup) -> float:
    """Share of the model's FLOPs whose products run in float8."""
    layers, parameters = setup.shape.num_layers, block_parameters(setup.shape, 1)
    in_float8 = 2.0 * sum(p.size for p in parameters if p.name in setup.float8_layers)
    return layers * in_float8 / (layers * (product_flops(setup) + attention_flops(setup)) + head_flops(setup))


def plan_time(setup: Setup, gpu: Gpu, mfu: float) -> TimePlan:
    """The estimate for one step.

    Args:
        mfu: share of the peak that arithmetic reaches while it runs.
    """
    products, attention, head = product_flops(setup), attention_flops(setup), head_flops(setup)
    in_float8 = 2.0 * sum(p.size for p in block_parameters(setup.shape, 1) if p.name in setup.float8_layers)
    if in_float8 and gpu.has_float8:
        products -= in_float8 * (1 - 1 / FLOAT8_GAIN[setup.recipe])
    again = recomputed_flops(setup, setup.mode)
    again *= (products + attention) / (product_flops(setup) + attention)
    again += recomputed_bytes(setup, setup.mode) / gpu.bandwidth * mfu * gpu.peak  # as FLOPs that take as long
    chunked = bool(setup.chunk_tokens) and setup.tokens > setup.chunk_tokens
    split_backward = setup.degrees.pipeline > 1 and setup.schedule in ("zero_bubble", "zbv")
    # A compiled block has one backward: a schedule that asks for the gradients of inputs first and of weights later runs
    # it twice. Uncompiled, recomputation is repeated for each group of parameters instead (9 in a block, measured).
    per_block, per_head = 3 * (products + attention), 3 * head
    more, more_head = again, head if chunked else 0.0
    if split_backward and setup.compiled:
        more, more_head = 2 * again + 2 * (products + attention), 2 * (head + more_head)
    elif split_backward:
        more, more_head = 10 * again, 2 * more_head

    seconds = setup.tokens / (setup.degrees.tensor * mfu * gpu.peak)
    work, more_work, layers = [], [], []
    for stages in setup.stages():
        blocks, ends = sum(stage.layers for stage in stages), any(stage.has_head for stage in stages)
        layers.append(blocks)
        work.append(blocks * per_block + ends * per_head)
        more_work.append(blocks * more + ends * more_head)
    busiest = max(range(len(work)), key=lambda rank: work[rank] + more_work[rank])
    arithmetic, recomputed = (setup.micro_batches * seconds * flops[busiest] for flops in (work, more_work))
    exchanges = tuple(_exchanges(setup, gpu, setup.stages()[layers.index(max(layers))]))
    between = sum(e.seconds for e in exchanges if not e.hidden)
    beside = sum(e.seconds for e in exchanges if e.hidden)
    serial = arithmetic + recomputed + between
    bubble = bubble_share(setup, serial / max(arithmetic, 1e-30)) * serial
    if setup.degrees.pipeline > 1:
        # Weights are gathered before the first micro-batch, and gradients reduced with the last.
        total = serial + bubble + beside
    else:
        total = max(serial + (1 - HIDDEN) * beside, beside)
    tokens = setup.tokens * setup.micro_batches / (setup.degrees.tensor * setup.degrees.pipeline)
    flops = setup.shape.num_layers * 3 * (product_flops(setup) + attention) + 3 * head
    share = float8_share(setup) if gpu.has_float8 else 0.0
    return TimePlan(
        arithmetic, recomputed, bubble, exchanges, total, tokens / total, tokens * flops / (total * gpu.peak), share
    )


def bubble_share(setup: Setup, work: float) -> float:
    """Time that a pipeline's device waits, as a share of the time it works (the schedules' own order, of torch 2.13).

    Args:
        work: of forward and backward with all that is computed again, in units of the plain forward and backward.
    """
    pipeline, schedule = setup.degrees.pipeline, setup.schedule
    gaps = (pipeline - 1) / (setup.micro_batches * setup.per_device)
    if schedule in ("zero_bubble", "zbv"):
        weights = 0.0 if setup.compiled else 1 / (3 * work)  # what the backward for weights fills
        forward = 1 / (3 * work)
        both = 1 - forward - weights
        return gaps * (both if not setup.compiled else both / 2)
    return gaps


SENDS = "hidden states along the pipeline"


def _link(gpu: Gpu, stride: int, size: int) -> tuple[float, str]:
    """Bytes/s per device of a group of `size` that stands `stride` ranks apart, and what carries it.

    A ring through several nodes uses the network link of each of its members in a node.
    """
    if stride * size <= NODE:
        return gpu.nvlink, "NVLink"
    members = max(1, NODE // stride)
    return min(gpu.nvlink, members * NETWORK), "network"


def _exchanges(setup: Setup, gpu: Gpu, stages: tuple[Stage, ...]) -> list[Exchange]:
    """Traffic of the device with these stages."""
    layers, degrees = sum(stage.layers for stage in stages), setup.degrees
    has_ends = any(stage.has_embedding or stage.has_head for stage in stages)
    found = _parameter_exchanges(setup, gpu, stages)
    count, width = setup.micro_batches, setup.compute_bytes
    if degrees.tensor > 1:
        hidden = setup.tokens * setup.shape.dim * width * (degrees.tensor - 1) / degrees.tensor
        # Forward: the inputs of both groups of products, and two sums; the backward is its mirror. What is computed again
        # gathers again, and with "full" also sums once more.
        again = {"none": 0, "full": 3}.get(setup.mode, 2)
        per_block = 8 + again
        size = count * hidden * (layers * per_block + 2 * has_ends)
        rate, link = _link(gpu, 1, degrees.tensor)
        found.append(Exchange("activations over tensor devices", size, rate, link, setup.async_tensor))
    if degrees.context > 1:
        keys = 2 * setup.shape.num_kv_heads * setup.shape.head_dim / degrees.tensor
        size = setup.tokens * keys * width * (degrees.context - 1)
        passes = 2 if setup.mode == "none" else 3
        rate, link = _link(gpu, degrees.tensor, degrees.context)
        found.append(Exchange("keys and values over context devices", count * layers * passes * size, rate, link))
    if degrees.pipeline > 1:
        size = 2 * setup.per_device * count * setup.tokens * setup.shape.dim * width / degrees.tensor
        rate, link = _link(gpu, setup.world_size // degrees.pipeline, degrees.pipeline)
        found.append(Exchange(SENDS, size, rate, link, hidden=True))
    return found


def _parameter_exchanges(setup: Setup, gpu: Gpu, stages: tuple[Stage, ...]) -> list[Exchange]:
    shape, degrees, shards = setup.shape, setup.degrees, setup.shards
    layers = sum(stage.layers for stage in stages)
    ends = numbers(
        end_parameters(shape, degrees.tensor, any(s.has_embedding for s in stages), any(s.has_head for s in stages))
    )
    whole = layers * numbers(block_parameters(shape, degrees.tensor)) + ends
    share = 1.0 if setup.trained is None else setup.trained / (shape.num_layers * numbers(block_parameters(shape, 1)))
    gradients = min(1.0, share) * whole * setup.reduce_bytes
    pipelined, found = degrees.pipeline > 1, []
    part = (shards - 1) / shards
    rate, link = _link(gpu, degrees.tensor, shards)
    times = 2 * setup.micro_batches if setup.reshard else 1  # kept while accumulating, unless resharded
    if shards > 1:
        weights = layers * gathered_block(setup) + ends * setup.compute_bytes
        found.append(Exchange("weights gathered over shards", times * part * weights, rate, link, hidden=True))
        reductions = setup.micro_batches if setup.reduce_each and not pipelined else 1
        found.append(Exchange("gradients reduced over shards", reductions * part * gradients, rate, link, hidden=True))
    if degrees.replicate > 1:
        copies = degrees.replicate
        rate, link = _link(gpu, degrees.tensor * shards, copies)
        size = 2 * (copies - 1) / copies * gradients / shards
        found.append(Exchange("gradients summed over replicas", size, rate, link, hidden=True))
    if setup.cpu_offload:
        size = (times + 1) * 4 * whole / shards
        found.append(Exchange("shards to and from host memory", size, HOST_LINK, "PCIe", hidden=True))
    return found
