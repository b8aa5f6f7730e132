"""`newcompute plan`: what a configuration would run, computed from shapes alone; nothing is started or loaded.

Memory is counted in train/plan_memory.py, time estimated in train/plan_time.py, and `--suggest` is train/plan_search.py.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from models.sizes import (
    FLOPS_FORMULA,
    LlamaShape,
    flops_per_token,
    num_parameters,
    num_parameters_without_embedding,
)
from parallel.degrees import resolve_degrees
from parallel.float8_layers import choices
from train.config import Config, model_title, named_shape, total_steps
from train.config_rules import layout_problems, length_problems
from train.config_sources import ConfigError, Problem, load_config
from train.corpus import DataError
from train.plan_device import GPU_OPTIONS, choose_device, gpu_here, host_memory, placed
from train.plan_memory import GIB, MemoryPlan, block_bytes, plan_memory
from train.plan_search import USABLE, Candidate, least_memory, smallest_world, suggest
from train.plan_setup import Setup
from train.plan_time import ASSUMED_MFU, GPUS, NETWORK, NODE, Gpu, TimePlan, extra_share, plan_time

OPTIONS = ("--world-size", "--mfu", "--gpu", "--gpu-memory")
SUGGESTIONS = 5


def print_plan(files: Sequence[str], flags: Sequence[str], options: dict[str, str], suggesting: bool = False) -> None:
    """Print the plan of a command line, or with `suggesting` the layouts that would suit it.

    Raises:
        ConfigError: the configuration, or an option, is not valid.
    """
    world_size = _number(options, "--world-size", NODE if suggesting else 1, int)
    mfu = _number(options, "--mfu", ASSUMED_MFU, float)
    asked = _gpu(options)
    config = load_config(files, flags, None if suggesting else world_size)
    shape, vocabulary_note = _shape(config)
    problems = list(length_problems(config, shape))
    if not suggesting:
        problems += layout_problems(config, shape, resolve_degrees(config, world_size))
    if problems:
        raise ConfigError(problems)
    _show([f"config       {_sources(files, flags)}"])
    if suggesting:
        _show(suggestion_lines(config, shape, world_size, asked or GPUS["h100"], mfu))
        return
    flops = (
        total_steps(config, shape) * config.tokens_per_step * flops_per_token(shape, config.training.sequence_length)
    )
    device = choose_device(config, world_size, flops, asked, "" if asked else gpu_here())
    lines = plan_lines(placed(config, device), shape, vocabulary_note, world_size, mfu, device.gpu)
    _show([f"device       {device.reason}", *lines])


def _show(lines: Sequence[str]) -> None:
    """Print lines, those that a terminal is too narrow for in several, indented as the plan's text is."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in lines:
        if not width or len(line) <= width:
            print(line)
            continue
        indent = " " * max(13, len(line) - len(line.lstrip()))
        print(textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def _sources(files: Sequence[str], flags: Sequence[str]) -> str:
    given = sum(flag.startswith("--") for flag in flags)
    flagged = f"{given} {'flag' if given == 1 else 'flags'}" if given else ""
    if files:
        return " and ".join([", ".join(files), *filter(None, [flagged])])
    return f"none given (--config FILE.toml): the defaults{f', with {flagged}' if flagged else ''}"


def plan_lines(
    config: Config, shape: LlamaShape, vocabulary_note: str, world_size: int, mfu: float, gpu: Gpu | None = GPUS["h100"]
) -> list[str]:
    """The plan as lines of text; without a `gpu`, of processes that share a CPU, for which no times are estimated."""
    training = config.training
    degrees = resolve_degrees(config, world_size)
    steps, tokens_per_step = total_steps(config, shape), config.tokens_per_step
    counted = num_parameters_without_embedding(shape)
    flops = flops_per_token(shape, training.sequence_length)
    transform_lines, trained = _transforms(config, shape)
    setup = Setup.of(config, shape, degrees, trained)
    memory = plan_memory(setup)
    times = _no_time_lines() if gpu is None else _time_lines(setup, plan_time(setup, gpu, mfu), gpu, mfu, steps)
    return [
        f"run          {config.run.dir}/{config.run.name}",
        f"model        {model_title(config.model)}: dim {shape.dim}, "
        f"{shape.num_layers} layers, {shape.num_heads} heads, {shape.num_kv_heads} KV heads, FFN {shape.ffn_dim}",
        f"vocabulary   {shape.vocab_size:,}{vocabulary_note}",
        f"parameters   {num_parameters(shape):,}; without input embedding {counted:,}",
        f"mesh         {world_size} processes = {degrees}",
        *_pipeline_lines(setup),
        f"step         {training.global_batch_size} rows x {training.sequence_length} = {tokens_per_step:,} tokens; "
        f"{setup.micro_batches} micro-batches of {setup.rows} rows per process",
        f"length       {steps:,} steps = {steps * tokens_per_step:,} tokens = "
        f"{steps * tokens_per_step / counted:.1f} per parameter",
        f"compute      {flops:,} FLOPs per token ({FLOPS_FORMULA}); {steps * tokens_per_step * flops:.3e} in all",
        *_float8_lines(config, shape, setup, gpu),
        *transform_lines,
        *_robust_lines(config),
        *_memory_lines(setup, memory, gpu),
        *_checkpointing_lines(setup, gpu, mfu),
        *times,
    ]


def _pipeline_lines(setup: Setup) -> Iterator[str]:
    if setup.degrees.pipeline == 1:
        return
    layers = ", ".join("+".join(str(stage.layers) for stage in stages) for stages in setup.stages())
    yield f"pipeline     {setup.schedule}: layers of each device {layers}"
    if setup.schedule in ("zero_bubble", "zbv") and setup.compiled:
        yield f"{'':12} compiled blocks run their whole backward twice under {setup.schedule}: 1f1b or interleaved_1f1b is faster"


def _robust_lines(config: Config) -> Iterator[str]:
    robust, distillation = config.robust, config.distillation
    if robust.clip_weights:
        yield f"clipping     weights at {robust.clip_weights:g} standard deviations of their {robust.clip_per}"
    if distillation.teacher:
        yield f"distillation from {distillation.teacher}; its memory and time are not counted below"


def _float8_lines(config: Config, shape: LlamaShape, setup: Setup, gpu: Gpu | None) -> Iterator[str]:
    recipe = config.float8.recipe
    if recipe == "none":
        return
    plans = list(choices(shape, config.float8, setup.degrees.tensor))
    taken = [choice.name for choice in plans if not choice.reason]
    share = plan_time(setup, GPUS["h100"], 1.0).float8_share
    yield f"float8       {recipe}, {share:.0%} of the FLOPs: {', '.join(taken) if taken else 'no layer'}"
    for choice in plans:
        if choice.reason:
            yield f"{'':12} not {choice.name} ({choice.out_features} x {choice.in_features}): {choice.reason}"
    yield f"{'':12} not lm_head: its errors go straight into the loss"
    if gpu is None or not gpu.has_float8:
        yield f"{'':12} {'a CPU' if gpu is None else f'an {gpu.name}'} has no float8 products: they would be emulated, and slower"


def _memory_lines(setup: Setup, memory: MemoryPlan, gpu: Gpu | None) -> Iterator[str]:
    width = "bfloat16" if setup.compute_bytes == 2 else "float32"
    where = ""
    if setup.degrees.pipeline > 1:
        where = f" on the fullest device of the pipeline ({memory.rank + 1} of {setup.degrees.pipeline})"
    if gpu is not None:
        fits = "fits" if memory.total <= USABLE * gpu.memory_gib * GIB else "DOES NOT FIT"
        room = f"{fits} {gpu.memory_gib:g} GiB with {1 - USABLE:.0%} to spare"
    else:
        everything = memory.total * setup.world_size
        room = f"{_size(everything).strip()} for all; this machine has {host_memory() / GIB:.1f} GiB"
        room += "" if everything <= USABLE * host_memory() else ", TOO LITTLE"
    per = "process" if gpu is None else "device"
    yield f"memory       {_size(memory.total).strip()} per {per}{where} (estimate); {room}; of which"
    parts = [
        ("parameters, float32", memory.parameters),
        ("gradients, float32", memory.gradients),
        (f"moments ({setup.optimizer})", memory.optimizer),
        (f"gathered parameters, {width}", memory.gathered),
        ("whole gradients, until they are reduced once per step", memory.accumulated),
        ("the gradient that is being reduced", memory.reduced),
        (_activation_label(setup, memory), memory.activations),
        ("the block whose backward runs", memory.working),
        (_logit_label(setup), memory.logits),
    ]
    for label, size in parts:
        if size:
            yield f"{'':12} {_size(size)}  {label}"
    if memory.host:
        yield f"{'':12} {_size(memory.host)}  in host memory per process: parameters, gradients and moments"


def _activation_label(setup: Setup, memory: MemoryPlan) -> str:
    label = f"activations ({setup.mode} checkpointing)"
    if setup.degrees.pipeline > 1:
        label += f", {memory.in_flight} micro-batches of a stage in flight ({setup.schedule})"
    return label


def _logit_label(setup: Setup) -> str:
    label = "logits, their gradient and the last hidden states"
    if setup.degrees.tensor > 1:
        label += f", 1/{setup.degrees.tensor} of the vocabulary"
    if setup.chunk_tokens and setup.chunk_tokens < setup.tokens:
        label += f", {setup.chunk_tokens} tokens at a time"
    return label


def _checkpointing_lines(setup: Setup, gpu: Gpu | None, mfu: float) -> Iterator[str]:
    """What each mode would keep and compute again."""
    per = "per process" if gpu is None else "per device"
    step = "" if gpu is None else f"  {'step':>9}"
    yield f"{'blocks keep':16}{'per token':>13}  {per:>12}  {'repeated':>8}  {'memory':>12}{step}"
    for mode in ("none", "selective", "full", "budget"):
        if mode == "budget" and setup.mode != mode:
            continue  # any share between full and none
        other = replace(setup, mode=mode)
        memory = plan_memory(other)
        kept = block_bytes(other, mode) / (setup.tokens * 1024)
        name = f"budget {setup.budget:g}" if mode == "budget" else mode
        seconds = "" if gpu is None else f"  {plan_time(other, gpu, mfu).total:>7.3g} s"
        yield (
            f"  {'*' if mode == setup.mode else ' '} {name:12}{kept:9.1f} KiB  {_size(memory.activations)}  "
            f"{extra_share(other, mode):8.1%}  {_size(memory.total)}{seconds}"
        )
    yield f"{'':12} (estimates; * is chosen; per token and block; repeated: share of the model's FLOPs computed again)"


def _no_time_lines() -> Iterator[str]:
    yield "time         not estimated on a CPU: a run's log shows its tokens/s and the time left (--gpu h100 estimates a GPU's)"


def _time_lines(setup: Setup, time: TimePlan, gpu: Gpu, mfu: float, steps: int) -> Iterator[str]:
    yield (
        f"time         {_duration(time.total * steps)} on {setup.world_size} {gpu.name} (estimate); a step "
        f"{time.total:.3g} s, {time.tokens_per_second:,.0f} tokens/s/GPU, MFU {time.mfu:.0%}; of which"
    )
    yield (
        f"{'':12} {time.arithmetic:8.3g} s  forward and backward at an assumed {mfu:.0%} of {gpu.peak / 1e12:.0f} TFLOP/s"
        + (f", {time.float8_share:.0%} of it float8" if time.float8_share else "")
    )
    if time.recomputed:
        yield f"{'':12} {time.recomputed:8.3g} s  what is computed again"
    if setup.degrees.pipeline > 1:
        yield (
            f"{'':12} {time.bubble:8.3g} s  gaps of the pipeline ({setup.schedule}: "
            f"{time.bubble / (time.total or 1):.1%} of the step)"
        )
    yield f"{'':12} {time.shown:8.3g} s  traffic that arithmetic does not hide"
    if not time.exchanges:
        return
    yield (
        f"traffic      per step and device, at least; assumed: NVLink {gpu.nvlink / 1e9:g} GB/s within {NODE} GPUs, "
        f"network {NETWORK / 1e9:g} GB/s per GPU"
    )
    for exchange in time.exchanges:
        how = ", beside arithmetic" if exchange.hidden else ""
        yield (
            f"{'':12} {_size(exchange.size)}  {exchange.seconds:8.3g} s  {exchange.name} "
            f"({exchange.link}, {exchange.rate / 1e9:g} GB/s{how})"
        )


def suggestion_lines(config: Config, shape: LlamaShape, world_size: int, gpu: Gpu, mfu: float) -> list[str]:
    """The best layouts as a table, and the first as TOML; or why there is none."""
    trained = _transforms(config, shape)[1]
    found = suggest(config, shape, world_size, gpu, mfu, trained)
    where = f"{world_size} x {gpu.name} with {gpu.memory_gib:g} GiB"
    if not found:
        return _nothing_fits(config, shape, world_size, gpu, where, trained)
    lines = [
        f"layouts of {num_parameters(shape) / 1e9:.3g}B parameters for {where}, {config.training.global_batch_size} rows of "
        f"{config.training.sequence_length} tokens per step: {len(found)} fit {USABLE:.0%} of the memory",
        f"(estimates, at an assumed {mfu:.0%} of {gpu.peak / 1e12:.0f} TFLOP/s; times within 2% count as equal, and the "
        "simpler layout comes first)",
        "",
        "        memory        step   tokens/s/GPU   layout",
    ]
    for i, candidate in enumerate(found[:SUGGESTIONS], 1):
        time = candidate.time
        lines.append(
            f"  {i}  {_size(candidate.memory.total)}  {time.total:8.3g} s  {time.tokens_per_second:12,.0f}   "
            f"{_described(candidate)}"
        )
    return [*lines, "", "The first as TOML:", "", *_toml(candidate_changes=found[0].changes())]


def _described(candidate: Candidate) -> str:
    setup = candidate.setup
    parts = [str(setup.degrees)]
    if setup.degrees.pipeline > 1:
        parts.append(setup.schedule)
    mode = f"budget {setup.budget:g}" if setup.mode == "budget" else setup.mode
    parts += [f"micro-batch {setup.rows}", f"checkpointing {mode}"]
    if setup.reshard:
        parts.append("reshard after forward")
    return ", ".join(parts)


def _toml(candidate_changes: dict[str, dict[str, Any]]) -> Iterator[str]:
    for section, values in candidate_changes.items():
        yield f"[{section}]"
        for key, value in values.items():
            yield f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}".replace("'", '"')
        yield ""


def _nothing_fits(
    config: Config, shape: LlamaShape, world_size: int, gpu: Gpu, where: str, trained: int | None
) -> list[str]:
    least = least_memory(config, shape, world_size, gpu, trained)
    smallest = smallest_world(config, shape, gpu, trained)
    lines = [f"nothing fits {where}:"]
    if least == float("inf"):
        lines.append(
            f"  no layout divides {config.training.global_batch_size} rows and this model among {world_size} GPUs; try "
            "another training.global_batch_size, or a number of GPUs that is a power of two"
        )
    else:
        lines.append(
            f"  the layout that needs least takes {_size(least).strip()} per GPU (estimate), and "
            f"{USABLE * gpu.memory_gib:g} GiB may be used ({USABLE:.0%})"
        )
    if smallest is None:
        lines.append("  no power of two of GPUs fits either: a larger --gpu-memory, or a larger global batch")
    else:
        lines.append(f"  the smallest power of two of such GPUs that fits is {smallest}")
    return lines


def _gpu(options: dict[str, str]) -> Gpu | None:
    name = options.get("--gpu", "h100").lower()
    if name not in GPUS:
        raise ConfigError([Problem(f"expected one of {', '.join(GPUS)}", origin=f"--gpu {name}")])
    memory_gib = _number(options, "--gpu-memory", GPUS[name].memory_gib, float)
    given = any(option in options for option in GPU_OPTIONS)
    return replace(GPUS[name], memory_gib=memory_gib) if given else None


def _transforms(config: Config, shape: LlamaShape) -> tuple[list[str], int | None]:
    """The table of transforms, from a model without memory; and the parameters that are trained, if not all of them."""
    if not config.transforms:
        return ["transforms   none"], None
    lines, trained = transform_table(config, shape)
    return [f"{'' if i else 'transforms':12} {line}" for i, line in enumerate(lines)], trained


def transform_table(config: Config, shape: LlamaShape) -> tuple[list[str], int | None]:
    """What a run's transforms do to which layers, as lines; and the parameters that are trained, if not all of them."""
    import torch

    from models.llama import Llama
    from transforms.apply import apply, table

    with torch.device("meta"):
        model = Llama(shape, context=1)
        noise = apply(model, config.transforms, seed=0)
    lines = list(table(noise))
    if not any(spec.kind == "lora" for spec in config.transforms):
        return lines, None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [*lines, f"{trained:,} parameters are trained"], trained


def _shape(config: Config) -> tuple[LlamaShape, str]:
    """The shape of a run, and a note where its vocabulary is not the tokenizer's (which may not be here)."""
    if config.model.init_from:
        from models.hf import shape_from_hf
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
    return f"{seconds:.3g} seconds"
