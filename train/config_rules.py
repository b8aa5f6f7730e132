"""Rules that span fields or sections of a configuration. Each broken one is a `Problem`, found before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

from models.sizes import LlamaShape
from train.config import Config, named_shape, total_steps
from train.config_sources import Problem


def cross_checks(config: Config, world_size: int | None) -> Iterator[Problem]:
    """All problems between fields; `world_size` None leaves out the rules that need it."""
    shape, problems = _shape(config)
    yield from problems
    yield from _sources(config)
    if shape is not None:
        yield from length_problems(config, shape)
    if world_size is not None:
        yield from _layout(config, world_size)
    resume = config.checkpoint.resume
    if isinstance(resume, int) and resume < 0:
        yield Problem('expected "auto", "none", a step of 0 or more, or a path', "checkpoint.resume", resume)
    if config.data.streaming and config.data.max_documents:
        message = "streaming ends with training.steps: leave it out, or prepare the data"
        yield Problem(message, "data.max_documents", config.data.max_documents)
    if config.transforms and shape is not None:
        yield from _transforms(config, shape)


def _shape(config: Config) -> tuple[LlamaShape | None, list[Problem]]:
    model = config.model
    if model.init_from:
        problems = []
        if not model.init_from.startswith("hf:") or model.init_from == "hf:":
            problems.append(
                Problem('expected "hf:FOLDER" or "hf:ORGANISATION/NAME"', "model.init_from", model.init_from)
            )
        if model.size is not None:
            problems.append(
                Problem("the shape comes from model.init_from: leave the size out", "model.size", model.size)
            )
        if model.shape != type(model.shape)():
            problems.append(Problem("the shape comes from model.init_from: leave [model.shape] out", "model.shape"))
        return None, problems
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


def length_problems(config: Config, shape: LlamaShape) -> Iterator[Problem]:
    """What the shape says of lengths; asked again once tokenizer or imported weights have given the final shape."""
    steps = total_steps(config, shape)
    if config.schedule.warmup_steps is not None and config.schedule.warmup_steps > steps:
        yield Problem(f"longer than the run of {steps} steps", "schedule.warmup_steps", config.schedule.warmup_steps)
    # The sizes of clm name the context they were published with; their rotary table can be of any length.
    limited = config.model.name == "llama3" or config.model.init_from
    if limited and config.training.sequence_length > shape.max_context:
        message = f"longer than the model's context of {shape.max_context}"
        yield Problem(message, "training.sequence_length", config.training.sequence_length)


def _transforms(config: Config, shape: LlamaShape) -> Iterator[Problem]:
    """Patterns that match nothing or the wrong thing; a model without memory is built to ask it."""
    import torch

    from models.llama import Llama
    from transforms.apply import TransformError, match

    with torch.device("meta"):
        model = Llama(shape, context=1)
    for i, spec in enumerate(config.transforms):
        try:
            match(model, spec, i)
        except TransformError as error:
            yield Problem(str(error), f"transforms.{i}.modules", spec.modules or None)
    loras = [i for i, spec in enumerate(config.transforms) if spec.kind == "lora"]
    for i in loras[1:]:
        yield Problem("one table of adapters is enough: give its modules together", f"transforms.{i}.kind", "lora")
    if loras and not config.model.init_from:
        yield Problem(
            "adapters change trained weights: name them with model.init_from", f"transforms.{loras[0]}.kind", "lora"
        )


def _layout(config: Config, world_size: int) -> Iterator[Problem]:
    parallel, training = config.parallel, config.training
    try:
        replicate, shard = resolve_degrees(parallel.replicate, parallel.shard, world_size)
    except ValueError as error:
        odd_one = parallel.shard == 0 or (parallel.replicate != 0 and parallel.shard not in (-1, 1))
        key = "parallel.shard" if odd_one else "parallel.replicate"
        yield Problem(str(error), key, getattr(parallel, key.partition(".")[2]))
        return
    rows = replicate * shard * (training.micro_batch_size or 1)
    if training.global_batch_size % rows:
        nearest = max(rows, round(training.global_batch_size / rows) * rows)
        micro = (
            f" x training.micro_batch_size {training.micro_batch_size} = {rows}" if training.micro_batch_size else ""
        )
        yield Problem(
            f"not a multiple of {replicate * shard} data-parallel processes{micro}; the nearest that is: {nearest}",
            "training.global_batch_size",
            training.global_batch_size,
        )
        return
    micro_batch = training.micro_batch_size or training.global_batch_size // (replicate * shard)
    if config.noise.group_size % micro_batch:
        yield Problem(
            f"a micro-batch of {micro_batch} rows would span several groups: expected a multiple of it, or 0",
            "noise.group_size",
            config.noise.group_size,
        )


def resolve_degrees(replicate: int, shard: int, world_size: int) -> tuple[int, int]:
    """(replicate, shard) with -1 filled in so that their product is the world size.

    Raises:
        ValueError: no degree fits; the message names the nearest valid choice.
    """
    degrees = {"parallel.replicate": replicate, "parallel.shard": shard}
    open_names = [name for name, degree in degrees.items() if degree == -1]
    if len(open_names) == 2:
        raise ValueError("parallel.replicate and parallel.shard cannot both be -1: give one")
    if any(degree == 0 for degree in degrees.values()):
        raise ValueError("a degree is at least 1, or -1 to take what is left of the world size")
    fixed = 1
    for degree in degrees.values():
        fixed *= degree if degree != -1 else 1
    if not open_names and fixed != world_size:
        raise ValueError(
            f"replicate {replicate} x shard {shard} = {fixed} processes, but {world_size} are running; "
            f"set one of them to -1 or start {fixed}"
        )
    if open_names and world_size % fixed:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - fixed))
        raise ValueError(
            f"{fixed} does not divide the {world_size} running processes; the nearest that does: {nearest}"
        )
    rest = world_size // fixed
    return (rest if replicate == -1 else replicate), (rest if shard == -1 else shard)
