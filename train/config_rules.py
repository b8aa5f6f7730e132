"""Rules that span fields or sections of a configuration. Each broken one is a `Problem`, found before anything starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from models.sizes import LlamaShape
from parallel.degrees import (
    Degrees,
    least_micro_batches,
    nearest_divisor,
    nearest_multiple,
    resolve_degrees,
    rows_per_micro_batch,
    stages_per_device,
)
from parallel.float8_layers import PART, block_layers, choices, unmatched
from train.config import (
    Config,
    ParallelConfig,
    named_shape,
    total_steps,
)
from train.config_sources import Problem, schema_keys
from train.redaction import STARS, find_secret
from transforms.specs import TransformSpec, inputs_together, matches

HEAD_IN_CHUNKS = "hardware effects on what the head reads and returns need the whole batch, not chunks of it"


def cross_checks(config: Config, world_size: int | None) -> Iterator[Problem]:
    """All problems between fields; `world_size` None leaves out the rules that need it."""
    yield from _secrets(config)
    shape, problems = _shape(config)
    yield from problems
    yield from _sources(config)
    yield from _optimizer(config)
    if shape is not None:
        yield from length_problems(config, shape)
    if world_size is not None:
        yield from _layout(config, shape, world_size)
    yield from _combinations(config)
    yield from _robust(config)
    resume = config.checkpoint.resume
    if isinstance(resume, int) and resume < 0:
        yield Problem('expected "auto", "none", a step of 0 or more, or a path', "checkpoint.resume", resume)
    allowed, interval = config.checkpoint.max_unsaved_steps, config.checkpoint.interval
    if 0 < allowed <= interval:
        yield Problem(
            f"must be more than checkpoint.interval ({interval}), or 0", "checkpoint.max_unsaved_steps", allowed
        )
    permanent = config.checkpoint.permanent_interval
    if permanent and interval and permanent % interval:
        yield Problem(
            f"steps are saved at multiples of checkpoint.interval ({interval}), and few of this one's are among them: expected "
            f"a multiple of it, such as {nearest_multiple(permanent, interval)}",
            "checkpoint.permanent_interval",
            permanent,
        )
    if config.data.streaming and config.data.max_documents:
        message = "streaming ends with training.steps: leave it out, or prepare the data"
        yield Problem(message, "data.max_documents", config.data.max_documents)
    if config.transforms and shape is not None:
        yield from _transforms(config, shape)


def _secrets(config: Config) -> Iterator[Problem]:
    """The configuration is printed, kept in the run folder and sent to W&B."""
    for key, _ in schema_keys():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part, None)
        if find_secret([one.model_dump() for one in value] if key in ("data.sources", "transforms") else value):
            message = (
                "this holds a secret, and a configuration is printed and stored: leave it out, and set the environment"
            )
            yield Problem(
                f"{message} (AWS_SECRET_ACCESS_KEY, HF_TOKEN, WANDB_API_KEY, ...) or log in instead", key, STARS
            )


def _shape(config: Config) -> tuple[LlamaShape | None, list[Problem]]:
    model = config.model
    if model.init_from:
        if model.init_from.startswith("hf:") and model.init_from != "hf:":
            return None, []
        return None, [Problem('expected "hf:FOLDER" or "hf:ORGANISATION/NAME"', "model.init_from", model.init_from)]
    try:
        return named_shape(model), []
    except ValueError as error:
        message = str(error)
        if message.startswith("model.size"):
            message = message.partition("is not")[2].strip()
            return None, [Problem(f"not {message}", "model.size", model.size)]
        return None, [Problem(message, "model.shape")]


def _sources(config: Config) -> Iterator[Problem]:
    tokenizer, data = config.tokenizer, config.data
    if tokenizer.kind in ("hf", "tiktoken") and not tokenizer.path:
        what = "a folder or Hub id" if tokenizer.kind == "hf" else "Llama-3's tokenizer.model file"
        yield Problem(f'tokenizer.kind = "{tokenizer.kind}" needs {what} here', "tokenizer.path", tokenizer.path)
    for i, source in enumerate(data.all_sources):
        where = f"data.sources.{i}" if data.sources else "data"
        if source.source == "files" and not source.paths:
            yield Problem('source = "files" needs globs here', f"{where}.paths", source.paths)
        if source.source == "random" and data.sources:
            yield Problem(
                "random tokens are for benchmarks and cannot be part of a mixture", f"{where}.source", "random"
            )
        if data.streaming and source.source not in ("files", "hub"):
            yield Problem('streaming reads "files" or "hub"', f"{where}.source", source.source)
    if data.streaming and len(data.all_sources) > 1:
        yield Problem("streaming reads one source; prepare a mixture instead", "data.streaming", True)
    if data.streaming and tokenizer.kind == "bpe":
        yield Problem("streaming needs a tokenizer that exists: bytes, hf or tiktoken", "tokenizer.kind", "bpe")


def _optimizer(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    if optimizer.name == "muon" and any(spec.kind == "lora" for spec in config.transforms):
        yield Problem("adapters are trained with AdamW, and nothing would be left for Muon", "optimizer.name", "muon")
    if optimizer.name == "adamw_bf16":
        for key in ("beta1", "beta2"):
            value = getattr(optimizer, key)
            if value > 1 - 2**-8:
                message = f"a moment in bfloat16 rounds a decay this slow away and never falls: at most {1 - 2**-8:.4f}"
                yield Problem(message, f"optimizer.{key}", value)


def length_problems(config: Config, shape: LlamaShape) -> Iterator[Problem]:
    """What the shape says of lengths; asked again once tokenizer or imported weights have given the final shape."""
    steps = total_steps(config, shape)
    if config.schedule.warmup_steps is not None and config.schedule.warmup_steps > steps:
        yield Problem(f"longer than the run of {steps} steps", "schedule.warmup_steps", config.schedule.warmup_steps)
    for key in ("trace_step", "memory_step"):
        step = getattr(config.profiling, key)
        if step > steps:
            yield Problem(f"beyond the last step, {steps}: nothing would be recorded", f"profiling.{key}", step)
    # The sizes of clm name the context they were published with; their rotary table can be of any length.
    limited = config.model.name == "llama3" or config.model.init_from
    if limited and config.training.sequence_length > shape.max_context:
        message = f"longer than the model's context of {shape.max_context}"
        yield Problem(message, "training.sequence_length", config.training.sequence_length)


def _transforms(config: Config, shape: LlamaShape) -> Iterator[Problem]:
    """Patterns that match nothing or the wrong thing; a model without memory is built to ask it."""
    import torch

    from models.llama import Llama
    from transforms.apply import TransformError, match, match_attention

    in_float8 = set()
    if config.float8.recipe != "none":
        in_float8 = {choice.name for choice in choices(shape, config.float8) if not choice.reason}

    with torch.device("meta"):
        model = Llama(shape, context=1)
    product_of: dict[str, int] = {}
    for i, spec in enumerate(config.transforms):
        try:
            names = [name for name, _ in match(model, spec, i)]
            products = [name for name, _ in match_attention(model, spec, i)] + names * (spec.kind == "optical")
            for name in [name for name in products if name in product_of][:1]:
                yield Problem(
                    f"transforms.{product_of[name]} has the product of {name} already: leave it out of one of the two",
                    f"transforms.{i}.modules",
                    spec.modules or None,
                )
            product_of |= dict.fromkeys(products, i)
            if config.training.loss_chunk_tokens and "lm_head" in names and _beside_weight(spec):
                message = f"{HEAD_IN_CHUNKS}: leave it 0, or the head out of transforms.{i}.modules"
                yield Problem(message, "training.loss_chunk_tokens", config.training.loss_chunk_tokens)
            both = sorted({end for name in names for end in in_float8 if name.endswith(end)})
            if both:
                yield Problem(
                    f"{', '.join(both)} would run in float8, which bypasses the transform: name them in float8.skip, or set "
                    'float8.recipe = "none"',
                    f"transforms.{i}.modules",
                    spec.modules or None,
                )
        except TransformError as error:
            yield Problem(str(error), error.setting, spec.modules or None)
    loras = [i for i, spec in enumerate(config.transforms) if spec.kind == "lora"]
    for i in loras[1:]:
        yield Problem("one table of adapters is enough: give its modules together", f"transforms.{i}.kind", "lora")
    if loras and not config.model.init_from:
        yield Problem(
            "adapters change trained weights: name them with model.init_from", f"transforms.{loras[0]}.kind", "lora"
        )


def _beside_weight(spec: TransformSpec) -> bool:
    """Whether an effect acts on inputs or outputs, which stand somewhere in the batch."""
    return spec.kind == "optical" or bool(getattr(spec, "input", None) or getattr(spec, "output", None))


def _layout(config: Config, shape: LlamaShape | None, world_size: int) -> Iterator[Problem]:
    parallel, training = config.parallel, config.training
    try:
        degrees = resolve_degrees(config, world_size)
    except ValueError as error:
        yield Problem(str(error), *_odd_one(parallel))
        return
    if shape is not None:
        yield from layout_problems(config, shape, degrees)
    else:
        yield from _teachers_layout(config, degrees)
    for name, degree in (("tensor", degrees.tensor), ("pipeline", degrees.pipeline)):
        if degree > 1 and any(spec.kind == "lora" for spec in config.transforms):
            message = "adapters are small and are not split this way: use parallel.shard"
            yield Problem(message, f"parallel.{name}", degree)
    rows = degrees.data * (training.micro_batch_size or 1)
    if training.global_batch_size % rows:
        micro = (
            f" x training.micro_batch_size {training.micro_batch_size} = {rows}" if training.micro_batch_size else ""
        )
        yield Problem(
            f"not a multiple of {degrees.data} data-parallel processes{micro}; the nearest that is: "
            f"{nearest_multiple(training.global_batch_size, rows)}",
            "training.global_batch_size",
            training.global_batch_size,
        )
        return
    micro_batch = rows_per_micro_batch(config, degrees)
    if config.noise.group_size % micro_batch:
        yield Problem(
            f"a micro-batch of {micro_batch} rows would span several groups: expected a multiple of it, or 0",
            "noise.group_size",
            config.noise.group_size,
        )
    yield from _pipeline_problems(config, degrees, micro_batch)


def _pipeline_problems(config: Config, degrees: Degrees, micro_batch: int) -> Iterator[Problem]:
    if degrees.pipeline == 1:
        return
    training, schedule = config.training, config.parallel.pipeline_schedule
    rows = training.global_batch_size // degrees.data
    count, least = rows // micro_batch, least_micro_batches(config, degrees.pipeline)
    whole_rounds = schedule in ("interleaved_1f1b", "zero_bubble")
    if rows % micro_batch or count < least or (whole_rounds and count % degrees.pipeline):
        each = f"a multiple of {least}" if whole_rounds else f"at least {least}"
        unit = degrees.data * micro_batch * least
        yield Problem(
            f"each process has {rows} rows = {rows / micro_batch:g} micro-batches of {micro_batch}; the {schedule} schedule "
            f"over {degrees.pipeline} devices takes {each}: the nearest batch that fits is "
            f"{nearest_multiple(training.global_batch_size, unit)}, or lower training.micro_batch_size",
            "training.global_batch_size",
            training.global_batch_size,
        )


def _split_inputs(config: Config, shape: LlamaShape, degree: int) -> Iterator[Problem]:
    """Scales and tiles of a transform that would be on two tensor-parallel devices."""
    for i, spec in enumerate(config.transforms):
        for name, (_, inputs) in block_layers(shape).items():
            together, what = inputs_together(spec, inputs)
            if not name.endswith(("o_proj", "down_proj")) or not matches(spec, f"model.layers.0.{name}"):
                continue
            if (inputs // degree) % together:
                yield Problem(
                    f"each device would have {inputs // degree} of the {inputs} inputs of {name}, and {what} of transforms.{i} "
                    f"takes {together}: choose a smaller degree or another tile",
                    "parallel.tensor",
                    config.parallel.tensor,
                )
                break


def layout_problems(config: Config, shape: LlamaShape, degrees: Degrees) -> Iterator[Problem]:
    """What the shape of a model, the length of its rows and a teacher say about degrees."""
    parallel, length = config.parallel, config.training.sequence_length
    yield from _teachers_layout(config, degrees)
    if degrees.tensor > 1:
        counts = {
            "KV heads": shape.num_kv_heads,
            "heads": shape.num_heads,
            "padded vocabulary": shape.padded_vocab_size,
            "FFN width": shape.ffn_dim,
        }
        common = math.gcd(*counts.values())
        if common % degrees.tensor:
            odd = ", ".join(f"{name} {count}" for name, count in counts.items() if count % degrees.tensor)
            nearest = nearest_divisor(common, degrees.tensor)
            message = f"does not divide the model's {odd}; the nearest degree that fits: {nearest}"
            yield Problem(message, "parallel.tensor", parallel.tensor)
        yield from _split_inputs(config, shape, degrees.tensor)
    if config.float8.recipe != "none":
        for pattern in unmatched(shape, config.float8):
            message = f"{pattern!r} names no layer of a block; there are {', '.join(block_layers(shape))}, in all blocks alike"
            yield Problem(message, "float8.skip", config.float8.skip)
        for choice in choices(shape, config.float8, degrees.tensor):
            if choice.reason.startswith(PART):
                message = f"{choice.name} takes float8, but {choice.reason}: name it in float8.skip"
                yield Problem(message, "parallel.tensor", parallel.tensor)
    pieces = degrees.tensor * degrees.context * (2 if degrees.context > 1 else 1)
    if length % pieces:
        yield Problem(
            f"rows are cut into {pieces} pieces (tensor {degrees.tensor}, context {degrees.context}"
            f"{' with two each' if degrees.context > 1 else ''}); the nearest length that fits: "
            f"{nearest_multiple(length, pieces)}",
            "training.sequence_length",
            length,
        )
    if degrees.pipeline > 1:
        stages = degrees.pipeline * stages_per_device(config)
        if stages > shape.num_layers:
            each = stages_per_device(config)
            highest = shape.num_layers // each
            remedy = f"the highest degree that fits: {highest}" if highest else "every stage needs a layer"
            if each > 1 and degrees.pipeline <= shape.num_layers:
                remedy += f'; pipeline_schedule = "1f1b", of one stage each, fits {degrees.pipeline} devices'
            yield Problem(
                f"{stages} stages ({degrees.pipeline} devices x {each}) for {shape.num_layers} layers; {remedy}",
                "parallel.pipeline",
                parallel.pipeline,
            )
        if shape.tied_embeddings:
            message = "embedding and head share a weight, and stand at the two ends of a pipeline: use shard or tensor"
            yield Problem(message, "parallel.pipeline", parallel.pipeline)


def _teachers_layout(config: Config, degrees: Degrees) -> Iterator[Problem]:
    for name, degree in (("tensor", degrees.tensor), ("pipeline", degrees.pipeline)):
        if config.distillation.teacher and degree > 1:
            message = "distillation compares all logits of a token on one device: use parallel.shard, or no teacher"
            yield Problem(message, f"parallel.{name}", degree)


def _odd_one(parallel: ParallelConfig) -> tuple[str, int]:
    """The degree that a message about all of them stands beside: one that is wrong by itself, or departs from its default."""
    degrees = {name: getattr(parallel, name) for name in Degrees._fields}
    for name, degree in degrees.items():
        if degree == 0:
            return f"parallel.{name}", degree
    for name in ("shard", "tensor", "context", "pipeline"):
        if degrees[name] not in (-1, 1):
            return f"parallel.{name}", degrees[name]
    return "parallel.replicate", degrees["replicate"]


def _combinations(config: Config) -> Iterator[Problem]:
    """Settings that cannot go together; what would have no effect is in `train/config_effect.py`."""
    parallel, compiled = config.parallel, config.compile.enabled
    if config.activation_checkpointing.mode == "budget" and not compiled:
        message = "this is the compiler's work: set compile.enabled"
        yield Problem(message, "activation_checkpointing.mode", "budget")
    recomputes_twice = parallel.pipeline != 1 and parallel.pipeline_schedule in ("zero_bubble", "zbv")
    if recomputes_twice and config.activation_checkpointing.mode == "selective" and not compiled:
        yield Problem(
            f"{parallel.pipeline_schedule} runs the backward in two parts, which this mode allows only compiled: set "
            'compile.enabled, or mode = "full" or "none"',
            "activation_checkpointing.mode",
            "selective",
        )
    if recomputes_twice and parallel.reshard_after_forward:
        message = (
            f"{parallel.pipeline_schedule} loses gradients with it: weights must stay between both parts of a backward"
        )
        yield Problem(message, "parallel.reshard_after_forward", True)
    if config.training.document_mask and any(source.source == "random" for source in config.data.all_sources):
        yield Problem("random tokens have no documents", "training.document_mask", True)


def _robust(config: Config) -> Iterator[Problem]:
    """What weight clipping and distillation cannot go with."""
    robust, distillation = config.robust, config.distillation
    if robust.clip_weights and any(spec.kind == "lora" for spec in config.transforms):
        message = "the weights beside adapters are frozen, and no update changes them: leave it 0"
        yield Problem(message, "robust.clip_weights", robust.clip_weights)
    if not distillation.teacher:
        return
    if distillation.teacher == "hf:":
        message = 'expected a run folder, a checkpoint, "hf:FOLDER" or "hf:ORGANISATION/NAME"'
        yield Problem(message, "distillation.teacher", distillation.teacher)
    if config.training.loss_chunk_tokens:
        message = (
            "distillation needs the logits of a whole micro-batch: leave it 0, and lower training.micro_batch_size"
        )
        yield Problem(message, "training.loss_chunk_tokens", config.training.loss_chunk_tokens)
