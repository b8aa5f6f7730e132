"""Evaluations repeated over simulated chips: which transforms, which chips, and figures with their spread."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from evals.masked import MaskedProtocol
from evals.models import EvalModel
from evals.noise import NoisyModel
from evals.ranges import read_ranges
from evals.tasks import evaluate_tasks
from evals.text import Protocol, evaluate_text
from train.config_sources import ConfigError, Problem, Sources, read_sources, validate
from train.export import PROVENANCE, RANGES, is_run_or_checkpoint, open_trained
from transforms.apply import TransformError, table
from transforms.specs import Hardware, LoraSpec, adds_norms

OF_THE_RUN = "run"
"""The word that stands for the transforms a model was trained with."""
DEFAULT_SEED = 1234

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class TransformList:
    """Transforms to evaluate under, with what messages about them need."""

    specs: list[Hardware]
    origins: list[str]
    """File of each."""
    seed: int = DEFAULT_SEED
    """Seed of the noise where the command line gives none."""
    ranges: dict[str, Tensor] | None = None
    """Of converters, by name; None where they are not known."""
    ranges_file: str = ""
    """Where those of a calibration are from."""
    trained: bool = False
    """Whether the model was trained under them: what they add to it, such as norms, is then no hardware."""

    def attach(self, model: EvalModel, seed: int | None = None) -> NoisyModel:
        """The model under these transforms; `seed` replaces that of the file.

        Raises:
            ConfigError: a transform does not fit the model; the model is as before then.
            ValueError: the model is packed already.
        """
        if getattr(model.model, "is_quantized", False):
            raise ValueError(
                f"{model.name} holds packed weights, which transforms cannot act on: name the model that it was made from"
            )
        with self.blamed():
            noisy = NoisyModel(model.model, self.specs, self.seed if seed is None else seed, self.ranges, self.trained)
        if self.ranges_file and not noisy.noise.ranges:
            noisy.detach()
            raise ValueError(f"--ranges {self.ranges_file}: these transforms have no ranges, leave it out")
        return noisy

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Turns a TransformError into a ConfigError that says in which file the transform stands."""
        try:
            yield
        except TransformError as error:
            spec, origin = self.specs[error.index], self.origins[error.index]
            value = (spec.modules or None) if error.setting.endswith("modules") else None
            raise ConfigError([Problem(str(error), error.setting, value, origin)]) from error

    def record(self) -> list[dict[str, Any]]:
        return [spec.model_dump(exclude_none=True) for spec in self.specs]


def read_transforms(names: Sequence[str], model: str, ranges: str | None = None) -> TransformList:
    """The transforms in TOML files of `[[transforms]]` tables, or those that `model` was trained with.

    Args:
        names: files, or the one word "run".
        model: the reference that `load_model` takes.
        ranges: file of converters' ranges; those of a run come with it.

    Raises:
        ConfigError: with every problem of the files; ValueError: the model was trained without hardware effects.
    """
    if ranges is not None:
        return replace(read_transforms(names, model), ranges=read_ranges(Path(ranges)), ranges_file=ranges)
    if list(names) == [OF_THE_RUN]:
        return _trained_with(model)
    sources = read_sources(names, [])
    for section in [name for name in sources.values if name not in ("transforms", "noise")]:
        message = "a file of transforms may hold [[transforms]] and [noise] only"
        sources.problems.append(Problem(message, section, None, sources.origin(section)))
        del sources.values[section]
    found = _validated(sources)
    if not found.specs:
        raise ConfigError([Problem("there is no [[transforms]] table here", origin=", ".join(names))])
    return found


def with_tables(transforms: TransformList, tables: Sequence[Mapping[str, Any]], origin: str) -> TransformList:
    """The same transforms with other values, as the tables that a file would hold.

    Raises:
        ConfigError: a value that its transform does not allow; `origin` is said to have set it.
    """
    sources = Sources()
    sources.set("transforms", list(tables), origin)
    return replace(transforms, specs=_validated(sources).specs)


def _validated(sources: Sources) -> TransformList:
    """The transforms among merged values; every problem is raised together."""
    config, _ = validate(sources)
    kept = []
    for i, spec in enumerate(config.transforms):
        if not isinstance(spec, LoraSpec):
            kept.append(spec)
        else:
            message = "adapters are weights: they come with the model, and an evaluation has none to train"
            sources.problems.append(
                Problem(message, f"transforms.{i}.kind", spec.kind, sources.origin(f"transforms.{i}"))
            )
    if sources.problems:
        raise ConfigError(sources.problems)
    seed = DEFAULT_SEED if config.noise.seed is None else config.noise.seed
    return TransformList(kept, [sources.origin(f"transforms.{i}") for i in range(len(kept))], seed)


def _trained_with(model: str) -> TransformList:
    """The hardware effects of a run or of an export; adapters are left out, their product is in the weights."""
    path = Path(model)
    ranges: dict[str, Tensor] | None = None
    if is_run_or_checkpoint(path):
        origin = f"the configuration of {path}"
        trained = open_trained(path)
        config, ranges = trained.config, trained.ranges()
        tables = [spec.model_dump(exclude_none=True) for spec in config.transforms]
        seed = config.noise_seed
    elif (path / PROVENANCE).exists():
        origin = str(path / PROVENANCE)
        ranges = read_ranges(path / RANGES) if (path / RANGES).exists() else None
        try:
            provenance = json.loads((path / PROVENANCE).read_text(encoding="utf-8"))
            tables, seed = provenance.get("transforms", []), int(provenance.get("noise_seed", DEFAULT_SEED))
            if not all(isinstance(one, dict) for one in tables):
                raise TypeError("transforms: expected tables")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path / PROVENANCE} cannot be read: {error}") from error
    else:
        raise ValueError(f"--transforms {OF_THE_RUN}: {model} is neither a run nor an export of one; name a file")
    sources = Sources()
    hardware = [one for one in tables if one.get("kind") != "lora"]
    sources.set("transforms", hardware, origin)
    found = replace(_validated(sources), seed=seed, ranges=ranges or None, trained=True)
    if not found.specs:
        raise ValueError(f"--transforms {OF_THE_RUN}: {model} was trained without hardware effects")
    return found


def norms_left_out(model: str) -> bool:
    """Whether a run, or an export of its plain weights, was trained with norms that it has under its own transforms only."""
    config = Path(model) / "config.json"
    if config.is_file() and "quantization_config" in config.read_text(encoding="utf-8"):
        return False  # packed: the norms are in it
    try:
        return adds_norms(_trained_with(model).specs)
    except (ValueError, ConfigError):
        return False  # no run of ours


@dataclass(frozen=True)
class Trials:
    """How often, and on which hardware, something is measured."""

    mode: str
    """ "chip": simulated chips, each with weights of its own; "resample": weights drawn for every batch; "clean"."""
    chips: int = 5
    """Number of chips, or of passes."""
    first_chip: int = 1

    def run(self, noisy: NoisyModel, measure: Callable[[], Measured]) -> list[Measured]:
        """One measurement per chip, or per pass; the passes continue one count of batches. One where nothing is random."""
        if not noisy.noise.random:  # chips would be alike
            noisy.chip(self.first_chip)
            return [measure()]
        if self.mode == "resample":
            noisy.resample()
            return [measure() for _ in range(self.chips)]
        results = []
        for number in range(self.first_chip, self.first_chip + self.chips):
            noisy.chip(number)
            results.append(measure())
        return results


def text_over_chips(
    model: EvalModel,
    noisy: NoisyModel,
    trials: Trials,
    files: Sequence[Path],
    protocol: Protocol | MaskedProtocol,
    batch_size: int = 8,
    clean: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """`evaluate_text` with each figure's mean, standard deviation and list over chips, and its clean value.

    Args:
        clean: what `evaluate_text` found without hardware effects, where that is known.
    """
    if clean is None:
        with noisy.clean():
            clean = evaluate_text(model, files, protocol, batch_size)

    def measure() -> tuple[dict[str, Any], dict[str, int]]:
        rows: dict[str, Any] = {}
        odd: dict[str, int] = {}
        for file in files:
            evaluate = partial(evaluate_text, model, [file], protocol, batch_size)
            found, odd[str(file)] = counting_non_finite(noisy, evaluate)
            rows |= found
        return rows, odd

    measured = trials.run(noisy, measure)
    rows = [found for found, _ in measured]
    results = {}
    for file, clean_row in clean.items():
        # Bits per byte are the summed -log p times a constant; perplexity is cut off before it could overflow.
        finite = [math.isfinite(row[file]["bits_per_byte"]) for row in rows]
        figures: dict[str, Any] = {}
        for name in ("perplexity", "bits_per_byte"):
            figures |= over_chips(name, [row[file][name] for row in rows], finite) | {f"{name}_clean": clean_row[name]}
        figures |= {"non_finite_chips": finite.count(False), "tokens": clean_row["tokens"]}
        results[file] = figures | non_finite_inputs([odd[file] for _, odd in measured])
    return results


def tasks_over_chips(
    model: EvalModel,
    noisy: NoisyModel,
    trials: Trials,
    tasks: Sequence[str],
    known: Mapping[str, dict[str, Any]] | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """`evaluate_tasks` with each metric's mean, standard deviation and list over chips, and its clean value.

    A chip is left out of a task's figures where one of its logits was not finite: an accuracy would hide that.

    Args:
        known: what `evaluate_tasks` found for each of the tasks without hardware effects, where that is known.
    """

    def measure(task: str) -> tuple[dict[str, dict[str, Any]], bool, int]:
        found, odd = counting_non_finite(noisy, lambda: evaluate_tasks(model, [task], **options))
        finite = not bool(noisy.non_finite)
        noisy.non_finite.zero_()
        return found, finite, odd

    results: dict[str, dict[str, Any]] = {}
    for task in tasks:  # one by one, so that each has its own count of chips that are not finite
        if known is None:
            with noisy.clean():
                clean, *_ = measure(task)
        else:
            clean = known[task]
        trial = trials.run(noisy, lambda task=task: measure(task))  # type: ignore[misc]
        for name, metrics in clean.items():  # a group of tasks has several names
            figures: dict[str, Any] = {}
            for metric, value in metrics.items():
                values = [found[name][metric] for found, *_ in trial]
                figures |= over_chips(metric, values, [finite for _, finite, _ in trial]) | {f"{metric}_clean": value}
            figures |= {"non_finite_chips": sum(not finite for _, finite, _ in trial)}
            results[name] = figures | non_finite_inputs([odd for *_, odd in trial])
    return results


def counting_non_finite(noisy: NoisyModel, measure: Callable[[], Measured]) -> tuple[Measured, int]:
    """What a measurement finds, and how many rows with infinity or NaN its forwards gave to quantisers."""
    noisy.noise.take_non_finite()
    return measure(), int(noisy.noise.take_non_finite())


def non_finite_inputs(per_chip: list[int]) -> dict[str, list[int]]:
    """Those counts for a result, which has them only where there is one: infinities saturate, so figures do not tell."""
    return {"non_finite_inputs_per_chip": per_chip} if any(per_chip) else {}


def over_chips(name: str, values: Sequence[float], finite: Sequence[bool]) -> dict[str, Any]:
    """Mean and sample standard deviation over the finite chips, None where these are too few, and the list."""
    listed = [value if good and math.isfinite(value) else None for value, good in zip(values, finite)]
    kept = [value for value in listed if value is not None]
    return {
        name: statistics.fmean(kept) if kept else None,
        f"{name}_std": statistics.stdev(kept) if len(kept) > 1 else None,
        f"{name}_per_chip": listed,
    }


def record(transforms: TransformList, trials: Trials, noisy: NoisyModel, batch_size: int) -> dict[str, Any]:
    """What a result says of the hardware it was measured on."""
    found = {"transforms": transforms.record(), "table": list(table(noisy.noise)), "mode": trials.mode}
    found["noise_seed"] = noisy.noise.seed
    if transforms.ranges_file:
        found["ranges"] = transforms.ranges_file
    if trials.mode == "clean":
        return found
    found["chips"] = trials.chips if noisy.noise.random else 1
    return found | ({"first_chip": trials.first_chip} if trials.mode == "chip" else {"batch_size": batch_size})
