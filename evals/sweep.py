"""Perplexity against one number of the transforms: the same transforms at one value after the other."""

from __future__ import annotations

import copy
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from evals.calibrate import calibrate_where_unknown
from evals.chips import TransformList, Trials, record, text_over_chips, with_tables
from evals.masked import MaskedProtocol
from evals.models import EvalModel
from evals.results import NON_FINITE_INPUTS, counted_inputs
from evals.text import Protocol
from transforms.specs import BitflipSpec, CellFaults, Hardware, OpticalSpec, Quantised

FIGURES = ("perplexity", "perplexity_std", "perplexity_per_chip", "non_finite_chips")
PROBABILITY = "probability"
"""The key that stands for every probability of a bit error that is not zero."""
TRAINING_ONLY = ("range_decay",)
"""Keys that act between training steps: an evaluation has one range."""


def at_probability(spec: Hardware, p: float) -> Hardware:
    """The same effect with every probability that is not zero set to `p`; effects without any as they are."""
    if not isinstance(spec, BitflipSpec):
        return spec

    def faults(of: CellFaults | None) -> CellFaults | None:
        if of is None:
            return None
        groups = {name: p if getattr(of, name) else 0.0 for name in ("sign_exponent", "mantissa")}
        return of.model_copy(update={**groups, "bits": [p if bit else 0.0 for bit in of.bits]})

    return spec.model_copy(update={name: faults(getattr(spec, name)) for name in ("weight", "input", "output")})


def numeric_keys(specs: Sequence[Hardware]) -> dict[str, type]:
    """{full key: int or float} of every number in these transforms, as in "transforms.0.photons".

    Formats of int2 to int8 have a key `bits`, which is their width.
    """
    found = {key: kind for i, spec in enumerate(specs) for key, kind in _numbers(spec, f"transforms.{i}.")}
    if any(at_probability(spec, 0.5) != at_probability(spec, 1.0) for spec in specs):
        found[PROBABILITY] = float
    return found


def _numbers(table: BaseModel, prefix: str) -> Iterator[tuple[str, type]]:
    own_levels = [getattr(table, f"{operand}_levels", None) for operand in ("input", "weight", "output")]
    for name, field in type(table).model_fields.items():
        value = getattr(table, name)
        if isinstance(value, BaseModel):
            yield from _numbers(value, f"{prefix}{name}.")
            continue
        if name == "levels" and isinstance(table, OpticalSpec) and None not in own_levels:
            continue  # every converter has levels of its own
        kinds = [kind for kind in _plain(field.annotation) if kind in (int, float)]
        if kinds and name not in TRAINING_ONLY:
            yield prefix + name, kinds[0]
    if isinstance(table, Quantised) and re.fullmatch(r"int\d", table.format):
        yield f"{prefix}bits", int


def _plain(annotation: Any) -> list[Any]:
    """The types of a field, without what they are annotated with."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _plain(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(annotation) for kind in _plain(part)]
    return [annotation]


@dataclass(frozen=True)
class Axis:
    """What a sweep changes, and to which values."""

    key: str
    """Full key: "transforms.0.photons", or "probability"."""
    values: tuple[float, ...]
    variants: tuple[TransformList, ...]
    """The transforms at each value."""

    @property
    def name(self) -> str:
        """The key in a plot and in lines for people."""
        return self.key if self.key == PROBABILITY else self.key.split(".", 2)[2]


def read_axis(transforms: TransformList, key: str, values: str) -> Axis:
    """The command line's `--key` and `--values`, checked against the transforms: no model is needed for that.

    Raises:
        ValueError: there is no such number, or more than one; or the values are no numbers.
        ConfigError: a value that the transform does not allow.
    """
    known = numeric_keys(transforms.specs)
    full = [name for name in known if name == key or name.endswith(f".{key}")]
    if not full:
        names = ", ".join(_shortest(name, list(known)) for name in known)
        raise ValueError(
            f"--key {key}: these transforms have no such number; "
            + (f"they have {names}" if known else "they have none at all")
        )
    if len(full) > 1:
        raise ValueError(f"--key {key}: there is more than one: name {' or '.join(full)}")
    numbers = _read_values(values, known[full[0]])
    variants = tuple(_at(transforms, full[0], value) for value in numbers)
    return Axis(full[0], tuple(numbers), variants)


def _shortest(name: str, known: Sequence[str]) -> str:
    """The shortest end of a key that no other key has."""
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next(end for end in ends if sum(other == end or other.endswith(f".{end}") for other in known) == 1)


def _read_values(text: str, kind: type) -> list[float]:
    found: list[float] = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"--values: expected finite numbers with commas, not {part.strip()!r}")
        whole = kind is int and value.is_integer()
        found.append(int(value) if whole else value)
    twice = [value for value in found if found.count(value) > 1]
    if twice:
        raise ValueError(f"--values: {twice[0]} is there twice")
    return found


def _at(transforms: TransformList, key: str, value: float) -> TransformList:
    """The transforms with one number changed, validated as a file of them would be."""
    origin = f"--values {value}"
    if key == PROBABILITY:
        if value == 0:
            raise ValueError("--values 0: expected probabilities above 0; the clean model is measured in any case")
        specs = [at_probability(spec, value) for spec in transforms.specs]
        return with_tables(transforms, [spec.model_dump(exclude_none=True) for spec in specs], origin)
    tables = copy.deepcopy(transforms.record())
    _, number, *path, last = key.split(".")
    table: Any = tables[int(number)]
    for part in path:
        table = table[part]
    if last == "bits":
        table["format"] = f"int{value}"
    else:
        table[last] = value
    return with_tables(transforms, tables, origin)


def sweep(
    model: EvalModel,
    axis: Axis,
    text: Path,
    trials: Trials,
    protocol: Protocol | MaskedProtocol,
    clean: Mapping[str, Any],
    batch_size: int = 8,
    seed: int | None = None,
    done: Sequence[float] = (),
    following: Callable[[str, int], AbstractContextManager] = lambda label, passes: nullcontext(),
) -> Iterator[dict[str, Any]]:
    """The points of a sweep, each as it is measured: {"value", "perplexity", ...} with `FIGURES`, and `calibration`.

    Args:
        clean: what `evaluate_text` found without hardware effects.
        seed: of the noise; default the transforms' own.
        done: values that are measured already, and left out.
        following: shows the progress of a point, by its label and how often the text is read.
    """
    for value, variant in zip(axis.values, axis.variants):
        if value in done:
            continue
        # Applied anew each time: how noise is sampled, and which ranges there are, depends on the value.
        noisy = variant.attach(model, variant.seed if seed is None else seed)
        try:
            passes = record(variant, trials, noisy, batch_size)["chips"] + (not noisy.known)
            label = f"{axis.name} = {value:g}"
            with following(label, passes):
                calibration = calibrate_where_unknown(model, noisy, [text], protocol)
                row = text_over_chips(model, noisy, trials, [text], protocol, batch_size, dict(clean))[str(text)]
        finally:
            noisy.detach()
        point = {"value": value, **{name: row[name] for name in FIGURES}}
        point |= {name: row[name] for name in (NON_FINITE_INPUTS,) if name in row}
        yield point | ({"calibration": calibration} if calibration else {})


def describe(key: str, point: Mapping[str, Any]) -> str:
    """One point as a line for people."""
    broken, chips = point["non_finite_chips"], len(point["perplexity_per_chip"])
    spread = "" if point["perplexity_std"] is None else f" ± {point['perplexity_std']:.4f}"
    figure = "" if point["perplexity"] is None else f"{point['perplexity']:.4f}{spread}"
    failed = f"{broken} of {chips} not finite" if broken else ""
    inputs = counted_inputs(point[NON_FINITE_INPUTS]) if NON_FINITE_INPUTS in point else ""
    return f"{key} = {point['value']:g}: perplexity {', '.join(part for part in (figure, failed, inputs) if part)}"


def draw(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    clean: float,
    title: str,
    file: Path,
    key: str = PROBABILITY,
) -> None:
    """Perplexity against the value: mean and chips of each curve, with the band between its extremes.

    The axis of values is logarithmic where all are above 0.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(curves.items()):
        color = f"C{number}"
        finite = sorted((point for point in points if point["perplexity"] is not None), key=lambda one: one["value"])
        chips = [[value for value in point["perplexity_per_chip"] if value is not None] for point in finite]
        place = [point["value"] for point in finite]
        axes.plot(place, [point["perplexity"] for point in finite], color=color, label=label)
        axes.fill_between(place, list(map(min, chips)), list(map(max, chips)), color=color, alpha=0.2, linewidth=0)
        for x, values in zip(place, chips):
            axes.plot([x] * len(values), values, ".", color=color, markersize=3)
        for point in points:
            if point["non_finite_chips"]:
                height = point["perplexity"] or clean
                text = f"{point['non_finite_chips']}/{len(point['perplexity_per_chip'])} not finite"
                axes.annotate(text, (point["value"], height), color=color, fontsize=6, rotation=45)
    everywhere = [point["value"] for points in curves.values() for point in points]
    axes.plot(everywhere, [clean] * len(everywhere), alpha=0)  # the axes span all values, also where no chip is finite
    axes.axhline(clean, color="black", linestyle="--", linewidth=1, label=f"clean: {clean:.2f}")
    scale = "log" if all(value > 0 for value in everywhere) else "linear"
    name = "probability of error per bit" if key == PROBABILITY else key
    axes.set(xscale=scale, yscale="log", xlabel=name, ylabel="perplexity", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
