"""`newcompute plan`: what a configuration would run, computed from shapes alone; nothing is started or loaded.

Memory is an estimate of what stays allocated: sharded float32 parameters, gradients and the optimizer's moments; the gathered
copy in the compute type; activations kept for the backward of one micro-batch; logits and their gradient. The allocator
and kernels need some more on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.hf import shape_from_hf
from models.sizes import (
    FLOPS_FORMULA,
    LlamaShape,
    flops_per_token,
    layer_parameters,
    num_parameters,
    num_parameters_without_embedding,
    peak_flops,
)
from parallel.degrees import resolve_degrees, rows_per_micro_batch
from train.config import Config, named_shape, total_steps
from train.config_rules import length_problems
from train.config_sources import ConfigError, Problem, load_config
from train.corpus import DataError

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device."""

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum((self.parameters, self.gradients, self.optimizer, self.gathered, self.activations, self.logits))


def kept_per_token(shape: LlamaShape, mode: str) -> int:
    """Numbers that one block keeps per token for its backward, under an activation-checkpointing mode."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if mode == "full":
        return shape.dim
    products = 3 * shape.dim + 2 * queries + 2 * keys + 2 * shape.ffn_dim
    # Without recomputation both normalised inputs and the SwiGLU product are kept as well.
    return products if mode == "selective" else products + 2 * shape.dim + shape.ffn_dim


def moment_bytes(optimizer: str, shape: LlamaShape) -> float:
    """Bytes of optimizer state per trained parameter, as a mean over the model."""
    if optimizer == "muon":  # one moment for the blocks' matrices, two for the rest
        matrices = shape.num_layers * (layer_parameters(shape) - 2 * shape.dim)
        return 8 - 4 * matrices / num_parameters(shape, padded=True)
    # 8 bits: two codes of one byte, and for each 256 of them a float32 scale. The few vectors, in float32, are left out.
    return {"adamw": 8, "adamw_8bit": 2 * (1 + 4 / 256), "adamw_bf16": 4}[optimizer]


def plan_memory(
    config: Config, shape: LlamaShape, shard: int, data_size: int, compute_bytes: int, trained: int | None = None
) -> MemoryPlan:
    """Estimated memory per device for `shard`-way sharding among `data_size` data-parallel processes.

    Args:
        trained: parameters that are trained where it is not all of them.
    """
    training = config.training
    sharded = num_parameters(shape, padded=True) / shard
    updated = sharded if trained is None else trained / shard
    rows = training.micro_batch_size or training.global_batch_size // data_size
    tokens = rows * training.sequence_length
    if config.parallel.reshard_after_forward:
        # Two blocks at a time (one computing, one being gathered), the embedding, and the head.
        vocabulary = shape.padded_vocab_size * shape.dim * (1 if shape.tied_embeddings else 2)
        gathered = vocabulary + 2 * layer_parameters(shape)
    else:
        gathered = num_parameters(shape, padded=True)
    logit_bytes = 2 * compute_bytes if config.compile.enabled else 2 * compute_bytes + 8
    return MemoryPlan(
        parameters=4 * sharded,
        gradients=4 * updated,
        optimizer=moment_bytes(config.optimizer.name, shape) * updated,
        gathered=compute_bytes * gathered,
        activations=compute_bytes
        * tokens
        * kept_per_token(shape, config.activation_checkpointing.mode)
        * shape.num_layers,
        logits=tokens * shape.padded_vocab_size * logit_bytes,
    )


def print_plan(files: Sequence[str], flags: Sequence[str], options: dict[str, str]) -> None:
    """Print the plan of a command line.

    Raises:
        ConfigError: the configuration, or an option, is not valid.
    """
    world_size = _number(options, "--world-size", 1, int)
    mfu = _number(options, "--mfu", 0.4, float)
    config = load_config(files, flags, world_size)
    shape, vocabulary_note = _shape(config)
    problems = list(length_problems(config, shape))
    if problems:
        raise ConfigError(problems)
    print("\n".join(plan_lines(config, shape, vocabulary_note, world_size, mfu)))


def plan_lines(config: Config, shape: LlamaShape, vocabulary_note: str, world_size: int, mfu: float) -> list[str]:
    """The plan as lines of text."""
    training = config.training
    degrees = resolve_degrees(config, world_size)
    shard = degrees.shard
    steps, tokens_per_step = total_steps(config, shape), config.tokens_per_step
    rows = rows_per_micro_batch(config, degrees)
    accumulation = training.global_batch_size // (rows * world_size)
    counted = num_parameters_without_embedding(shape)
    flops = flops_per_token(shape, training.sequence_length)
    on_gpu = config.run.device != "cpu"
    compute_bytes = 4 if config.precision.compute == "float32" or not on_gpu else 2
    transform_lines, trained = _transforms(config, shape)
    memory = plan_memory(config, shape, shard, world_size, compute_bytes, trained)
    peak = peak_flops("H100") or 0.0
    seconds = steps * tokens_per_step * flops / (world_size * mfu * peak)
    lines = [
        f"run          {config.run.dir}/{config.run.name}",
        f"model        {config.model.name} {config.model.size or config.model.init_from or 'default size'}: dim {shape.dim}, "
        f"{shape.num_layers} layers, {shape.num_heads} heads, {shape.num_kv_heads} KV heads, FFN {shape.ffn_dim}",
        f"vocabulary   {shape.vocab_size:,}{vocabulary_note}",
        f"parameters   {num_parameters(shape):,}; without input embedding {counted:,}",
        f"mesh         {world_size} processes = {degrees}",
        f"step         {training.global_batch_size} rows x {training.sequence_length} = {tokens_per_step:,} tokens; "
        f"{accumulation} micro-batches of {rows} rows per process",
        f"length       {steps:,} steps = {steps * tokens_per_step:,} tokens = "
        f"{steps * tokens_per_step / counted:.1f} per parameter",
        f"compute      {flops:,} FLOPs per token ({FLOPS_FORMULA}); {steps * tokens_per_step * flops:.3e} in all",
        f"time         {_duration(seconds)} on {world_size} H100 at an assumed MFU of {mfu:.0%} (of {peak / 1e12:.0f} TFLOP/s)",
        *transform_lines,
        f"memory       {_size(memory.total).strip()} per device (estimate), of which",
    ]
    parts = [
        ("parameters, float32", memory.parameters),
        ("gradients, float32", memory.gradients),
        (f"moments ({config.optimizer.name})", memory.optimizer),
        (f"gathered parameters, {'bfloat16' if compute_bytes == 2 else 'float32'}", memory.gathered),
        (f"activations ({config.activation_checkpointing.mode} checkpointing)", memory.activations),
        ("logits and their gradient", memory.logits),
    ]
    return lines + [f"             {_size(size)}  {label}" for label, size in parts]


def _transforms(config: Config, shape: LlamaShape) -> tuple[list[str], int | None]:
    """The table of transforms, from a model without memory; and the parameters that are trained, if not all of them."""
    if not config.transforms:
        return ["transforms   none"], None
    import torch

    from models.llama import Llama
    from transforms.apply import apply, table

    with torch.device("meta"):
        model = Llama(shape, context=1)
        noise = apply(model, config.transforms, seed=0)
    lines = [f"{'' if i else 'transforms':12} {line}" for i, line in enumerate(table(noise))]
    if not any(spec.kind == "lora" for spec in config.transforms):
        return lines, None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [*lines, f"{'':12} {trained:,} parameters are trained"], trained


def _shape(config: Config) -> tuple[LlamaShape, str]:
    """The shape of a run, and a note where its vocabulary is not the tokenizer's (which may not be here)."""
    if config.model.init_from:
        from train.job import hf_folder

        return shape_from_hf(hf_folder(config.model.init_from.removeprefix("hf:"))), ""
    if config.data.all_sources[0].source == "random":
        return named_shape(config.model), ""
    from train.prepare import run_tokenizer

    try:
        return named_shape(config.model, run_tokenizer(config).vocab_size), ""
    except DataError:
        # A BPE that is still to be trained will have the size that was asked for.
        vocab_size = config.tokenizer.vocab_size if config.tokenizer.kind == "bpe" else None
        return named_shape(config.model, vocab_size), " (the tokenizer is not here yet)"


def _number(options: dict[str, str], name: str, default, kind):
    text = options.get(name)
    if text is None:
        return default
    try:
        value = kind(text)
    except ValueError:
        value = 0
    highest = 1.0 if name == "--mfu" else float("inf")
    if not 0 < value <= highest or value == float("inf"):
        allowed = "a share above 0 and at most 1" if name == "--mfu" else "a positive number"
        raise ConfigError([Problem(f"expected {allowed}", origin=f"{name} {text}")])
    return value


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:8.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:8.2f} MiB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
