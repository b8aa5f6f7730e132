"""When each setting acts. A setting that would be ignored is refused, so that nobody believes in it. Torch-free.

Every key of the schema is listed here; a test compares the lists with the schema, so that a new key cannot be forgotten.
Only values that differ from the default count: a complete configuration, as a run folder keeps it, loads as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from train.config import Config, DataConfig, ScheduleConfig, SourceConfig
from transforms.specs import BitflipSpec, Layered, OpticalSpec, QuantiseSpec


@dataclass(frozen=True)
class When:
    """Under which condition a key acts."""

    deciders: tuple[str, ...] = ()
    """Keys that the condition looks at."""
    holds: Callable[[Config], bool] = lambda config: True
    remedy: str = ""
    """What would make the key act."""
    off: tuple[Any, ...] = ()
    """Values that ask for nothing, which is what happens."""


@dataclass(frozen=True)
class Idle:
    """A setting without effect."""

    key: str
    value: Any
    when: When

    @property
    def message(self) -> str:
        return f"has no effect as things are: {self.when.remedy}; otherwise leave it out"


ALWAYS = When()


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _is(key: str, *values: Any) -> When:
    """The key has one of these values."""
    shown = " or ".join(f'"{v}"' if isinstance(v, str) else str(v).lower() for v in values)
    return When((key,), lambda config: _get(config, key) in values, f"it acts with {key} = {shown}")


def _given(key: str, off: tuple[Any, ...] = ()) -> When:
    """The key is neither 0, false nor empty."""
    return When((key,), lambda config: bool(_get(config, key)), f"it acts where {key} is given", off)


def _split(key: str) -> When:
    """A degree of parallelism is, or may become, more than 1."""
    return When((key,), lambda config: _get(config, key) != 1, f"it acts with {key} of more than 1")


def _all(*conditions: When) -> When:
    deciders = tuple(key for condition in conditions for key in condition.deciders)
    remedy = conditions[0].remedy + "".join(condition.remedy.replace("it acts", " and") for condition in conditions[1:])
    return When(deciders, lambda config: all(condition.holds(config) for condition in conditions), remedy)


def _is_random(spec: Layered) -> bool:
    """Whether a transform draws random numbers."""
    if isinstance(spec, QuantiseSpec):
        operands = (spec.weight, spec.input, spec.attention)
        return any(operand is not None and operand.rounding == "stochastic" for operand in operands)
    if isinstance(spec, OpticalSpec):
        return spec.rounding == "stochastic" or spec.photons is not None
    return isinstance(spec, BitflipSpec)


def _draws_for_weights(spec: Layered) -> bool:
    """Whether a transform changes the weights of each step at random."""
    if isinstance(spec, QuantiseSpec):
        return spec.weight is not None and spec.weight.rounding == "stochastic"
    return isinstance(spec, BitflipSpec) and spec.weight is not None and spec.lifetime == "transient"


def _reaches_minimum(schedule: ScheduleConfig) -> bool:
    """Whether `schedule.min_lr_ratio` is the rate that a run ends with."""
    if schedule.name == "wsd":
        return schedule.decay_fraction > 0
    return schedule.name != "two_stage" or schedule.min_lr_ratio <= schedule.second_stage_start


_TEXT = When(
    ("data.source", "data.sources"),
    lambda config: config.data.all_sources[0].source != "random",
    "random tokens have nothing held out; it acts with text",
    off=(0,),
)
_SHAPED_HERE = When(
    ("model.init_from",), lambda config: not config.model.init_from, "the shape comes from model.init_from"
)
_EFFECTS = When(
    ("transforms",),
    lambda config: any(spec.kind != "lora" for spec in config.transforms),
    "it acts with hardware effects, [[transforms]]",
)
_DRAWS = When(
    ("transforms",),
    lambda config: any(map(_is_random, config.transforms)),
    "it acts with hardware effects that draw random numbers, which rounding to the nearest does not",
)
_WEIGHT_DRAWS = When(
    ("transforms",),
    lambda config: any(_draws_for_weights(spec) for spec in config.transforms),
    "it acts with effects that draw anew for the weights in every step: transient bit errors, or stochastic rounding",
)
_LAST_RATE = When(
    ("schedule.name", "schedule.decay_fraction", "schedule.second_stage_start"),
    lambda config: _reaches_minimum(config.schedule),
    'it acts where the rate falls that far: with decay_fraction above 0 of "wsd", and up to second_stage_start of "two_stage"',
)
_SAVING = _given("checkpoint.interval")
_VALIDATING = _given("validation.interval")
_PIPELINE = _split("parallel.pipeline")

ACTS: dict[str, When] = {
    **dict.fromkeys(
        (
            *("run.name", "run.dir", "run.seed", "run.deterministic", "run.device"),
            *("model.name", "model.init_from", "tokenizer.kind"),
            *("data.dir", "data.streaming", "data.sources"),
            *("training.steps", "training.tokens", "training.tokens_per_parameter", "training.stop_after"),
            *("training.global_batch_size", "training.micro_batch_size", "training.sequence_length"),
            *("training.max_grad_norm", "training.document_mask", "training.loss_chunk_tokens"),
            *("optimizer.name", "optimizer.lr", "optimizer.beta1", "optimizer.beta2", "optimizer.eps"),
            *("optimizer.weight_decay", "schedule.name", "schedule.warmup_steps"),
            *("parallel.replicate", "parallel.shard", "parallel.context", "parallel.tensor", "parallel.pipeline"),
            *("parallel.reshard_after_forward", "parallel.reduce_each_micro_batch", "parallel.cpu_offload"),
            *("precision.compute", "precision.reduce", "float8.recipe", "compile.enabled"),
            *("activation_checkpointing.mode", "checkpoint.interval", "checkpoint.dir", "checkpoint.resume"),
            *("faults.non_finite", "faults.spike", "faults.slow_rank", "faults.timeout", "faults.start_timeout"),
            *("robust.clip_weights", "distillation.teacher"),
            *("metrics.log_interval", "metrics.wandb", "metrics.tensorboard"),
            *("profiling.trace_step", "profiling.memory_step", "transforms"),
        ),
        ALWAYS,
    ),
    **dict.fromkeys(
        (
            "model.size",
            *(f"model.shape.{key}" for key in ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")),
            *(f"model.shape.{key}" for key in ("ffn_dim", "vocab_size", "rope_theta", "rope_scaling")),
            *("model.shape.max_context", "model.shape.tied_embeddings"),
        ),
        _SHAPED_HERE,
    ),
    "tokenizer.path": _is("tokenizer.kind", "hf", "tiktoken"),
    "tokenizer.vocab_size": _is("tokenizer.kind", "bpe"),
    "data.shuffle_window": _is("data.streaming", True),
    "optimizer.momentum": _is("optimizer.name", "muon"),
    "optimizer.nesterov": _is("optimizer.name", "muon"),
    "schedule.decay_fraction": _is("schedule.name", "wsd"),
    "schedule.stage_fraction": _is("schedule.name", "two_stage"),
    "schedule.first_stage_end": _is("schedule.name", "two_stage"),
    "schedule.second_stage_start": _is("schedule.name", "two_stage"),
    "schedule.min_lr_ratio": _LAST_RATE,
    "parallel.async_tensor": _all(_split("parallel.tensor"), _is("compile.enabled", True)),
    "parallel.pipeline_schedule": _PIPELINE,
    "parallel.pipeline_stages": _all(_PIPELINE, _is("parallel.pipeline_schedule", "interleaved_1f1b", "zero_bubble")),
    "float8.min_size": _is("float8.recipe", "tensorwise", "rowwise"),
    "float8.skip": _is("float8.recipe", "tensorwise", "rowwise"),
    "compile.cuda_graphs": _all(_is("compile.enabled", True), _is("compile.backend", "inductor")),
    "compile.backend": _is("compile.enabled", True),
    "activation_checkpointing.budget": _is("activation_checkpointing.mode", "budget"),
    "checkpoint.mode": _SAVING,
    "checkpoint.keep": _SAVING,
    "checkpoint.permanent_interval": _SAVING,
    "checkpoint.max_unsaved_steps": _SAVING,
    "faults.max_skipped": _is("faults.non_finite", "skip"),
    "validation.interval": _TEXT,
    "validation.steps": _VALIDATING,
    "validation.transforms": _all(_VALIDATING, _EFFECTS),
    "robust.clip_per": _given("robust.clip_weights"),
    "distillation.weight": _given("distillation.teacher"),
    "distillation.temperature": _given("distillation.teacher"),
    "metrics.wandb_project": _is("metrics.wandb", True),
    "profiling.trace_steps": _given("profiling.trace_step"),
    "profiling.ranks": When(
        ("profiling.trace_step", "profiling.memory_step"),
        lambda config: bool(config.profiling.trace_step or config.profiling.memory_step),
        "it acts where profiling.trace_step or profiling.memory_step is given",
    ),
    "noise.seed": _DRAWS,
    "noise.group_size": _WEIGHT_DRAWS,
    "noise.warmup_steps": _EFFECTS,
}


@dataclass(frozen=True)
class SourceWhen:
    """Under which condition a key of a data source acts."""

    holds: Callable[[SourceConfig, DataConfig], bool] = lambda source, data: True
    remedy: str = ""
    deciders: tuple[str, ...] = ("source",)
    off: tuple[Any, ...] = ()


PLAIN_TEXT = re.compile(r"\.(txt|text|md)(\.gz)?$")
"""Endings of files that are one text each."""


def _of(*kinds: str) -> SourceWhen:
    shown = " or ".join(f'"{kind}"' for kind in kinds)
    return SourceWhen(lambda source, data: source.source in kinds, f"it acts with source = {shown}")


def _has_records(source: SourceConfig) -> bool:
    """Whether some files may hold records, of which a field is the text; patterns may leave the ending open."""
    return not all(PLAIN_TEXT.search(path) for path in (*source.paths, *source.validation_paths))


SOURCE_ACTS: dict[str, SourceWhen] = {
    "source": SourceWhen(),
    "paths": _of("files"),
    "validation_paths": _of("files"),
    "column": SourceWhen(
        lambda source, data: source.source == "hub" or (source.source == "files" and _has_records(source)),
        'it acts with source = "hub", or "files" of which some are .jsonl or .parquet',
        ("source", "paths", "validation_paths"),
    ),
    "errors": _of("files"),
    "skip_invalid": _of("files", "hub"),
    "dataset": _of("hub"),
    "subset": _of("hub"),
    "split": _of("hub"),
    "revision": _of("hub"),
    "max_documents": _of("embedded", "files", "hub"),
    "validation_fraction": SourceWhen(
        lambda source, data: source.source != "random" and not (source.source == "files" and source.validation_paths),
        "it acts on text of which validation_paths does not name what is held out",
        ("source", "validation_paths"),
        off=(0.0,),
    ),
    "weight": SourceWhen(lambda source, data: len(data.all_sources) > 1, "it acts with several [[data.sources]]", ()),
}


def idle(config: Config) -> Iterator[Idle]:
    """Settings that differ from their defaults and would be ignored."""
    for key, when in ACTS.items():
        value = _get(config, key)
        if value != _default(key) and value not in when.off and not when.holds(config):
            yield Idle(key, value, when)
    yield from _idle_in_sources(config.data)
    for i, spec in enumerate(config.transforms):
        yield from _idle_in_transform(f"transforms.{i}", spec)


def _default(key: str) -> Any:
    *parents, last = key.split(".")
    model: Any = Config
    for part in parents:
        model = model.model_fields[part].annotation
    return model.model_fields[last].default


def _idle_in_sources(data: DataConfig) -> Iterator[Idle]:
    """Keys of `[data]` that no source takes over, and keys of sources that do not act there."""
    for key, when in SOURCE_ACTS.items():
        default, shared = SourceConfig.model_fields[key].default, getattr(data, key)
        values = [getattr(source, key) for source in data.all_sources]
        acts = [when.holds(source, data) for source in data.all_sources]
        if shared != default and shared not in when.off and not any(a and v == shared for a, v in zip(acts, values)):
            remedy = "each of [[data.sources]] that it acts on has a value of its own" if any(acts) else when.remedy
            deciders = ("data.sources", *(f"data.{decider}" for decider in when.deciders))
            yield Idle(f"data.{key}", shared, When(deciders, remedy=remedy))
        for i, value in enumerate(values if data.sources else ()):
            if value not in (default, shared, *when.off) and not acts[i]:
                where = f"data.sources.{i}"
                deciders = tuple(f"{where}.{decider}" for decider in when.deciders)
                yield Idle(f"{where}.{key}", value, When(deciders, remedy=when.remedy))


TRANSFORM_ALWAYS: dict[str, tuple[str, ...]] = {
    "bitflip": ("unmatched", "storage", "scale", "weight", "input", "output", "lifetime", "fault"),
    "quantise": ("unmatched", "weight", "input", "attention", "norm", "gradients"),
    "optical": (
        "unmatched",
        *("input_levels", "weight_levels", "output_levels", "lut_floor", "rounding", "photons", "tile", "ranges"),
        *("range_decay", "attention", "gradients"),
    ),
    "lora": ("rank", "alpha"),
    "faults of an operand": ("sign_exponent", "mantissa", "bits", "zero_above"),
    "format of an operand": ("format", "scale", "group_size", "rounding"),
}
"""Keys of `[[transforms]]` tables beside `kind` and `modules` that act, or are refused by the table's own rules."""
TRANSFORM_ACTS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "quantise": {
        "range_decay": (
            lambda spec: any(
                operand is not None and operand.scale in ("tracked", "learned")
                for operand in (spec.weight, spec.input, spec.attention)
            ),
            'it acts with scale = "tracked" or "learned" of an operand',
        )
    },
    "optical": {
        "levels": (
            lambda spec: None in (spec.input_levels, spec.weight_levels, spec.output_levels),
            "input_levels, weight_levels and output_levels say it all",
        )
    },
}
"""Keys of `[[transforms]]` tables that act under a condition, for each kind, and that condition in words."""


def _idle_in_transform(where: str, spec: Layered) -> Iterator[Idle]:
    kind = getattr(spec, "kind", "")
    for key, (holds, remedy) in TRANSFORM_ACTS.get(kind, {}).items():
        value = getattr(spec, key)
        if value != type(spec).model_fields[key].default and not holds(spec):
            yield Idle(f"{where}.{key}", value, When((where,), remedy=remedy))
