"""Perplexity against the probability of bit errors: the same transforms at one probability after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evals.chips import TransformList, Trials, record, text_over_chips
from evals.masked import MaskedProtocol
from evals.models import EvalModel
from evals.text import Protocol, evaluate_text
from transforms.specs import BitflipSpec, CellFaults, Hardware

FIGURES = ("perplexity", "perplexity_std", "perplexity_per_chip", "non_finite_chips")


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


def sweep(
    model: EvalModel,
    transforms: TransformList,
    text: Path,
    probabilities: Sequence[float],
    trials: Trials,
    protocol: Protocol | MaskedProtocol,
    batch_size: int = 8,
    seed: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """{"clean": perplexity, "points": [{"p", "perplexity", ...}]} at every probability, and on what it was measured.

    Args:
        seed: of the noise; default the transforms' own.
        say: takes a line for people as each point is finished.

    Raises:
        ValueError: the transforms have no probability to change, or a probability that no transform can have.
    """
    wrong = [p for p in probabilities if not 0 < p <= 1]
    if wrong or not probabilities:
        raise ValueError(
            f"probabilities: expected some above 0 and at most 1, not {', '.join(map(str, wrong)) or 'none'}"
        )
    if all(at_probability(spec, 0.5) == at_probability(spec, 1.0) for spec in transforms.specs):
        raise ValueError("every probability of these transforms is 0: a sweep changes only those above 0")
    clean_rows = evaluate_text(model, [text], protocol, batch_size)
    clean = clean_rows[str(text)]["perplexity"]
    say(f"clean: perplexity {clean:.4f}")
    points = []
    for p in probabilities:
        changed = replace(transforms, specs=[at_probability(spec, p) for spec in transforms.specs])
        # Applied anew each time: the sampling law depends on the probability.
        noisy = changed.attach(model, transforms.seed if seed is None else seed)
        hardware = record(transforms, trials, noisy, batch_size)
        try:
            row = text_over_chips(model, noisy, trials, [text], protocol, batch_size, clean_rows)[str(text)]
        finally:
            noisy.detach()
        points.append({"p": p, **{name: row[name] for name in FIGURES}})
        say(describe(points[-1]))
    del hardware["table"]  # that of the last probability
    return {**hardware, "clean": clean, "points": points}


def describe(point: Mapping[str, Any]) -> str:
    """One point as a line for people."""
    broken, chips = point["non_finite_chips"], len(point["perplexity_per_chip"])
    spread = "" if point["perplexity_std"] is None else f" ± {point['perplexity_std']:.4f}"
    figure = "" if point["perplexity"] is None else f"{point['perplexity']:.4f}{spread}"
    failed = f"{broken} of {chips} not finite" if broken else ""
    return f"p = {point['p']:.3g}: perplexity {', '.join(part for part in (figure, failed) if part)}"


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]], clean: float, title: str, file: Path) -> None:
    """Perplexity against p, both logarithmic: mean and chips of each curve, with the band between its extremes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(curves.items()):
        color = f"C{number}"
        finite = sorted((point for point in points if point["perplexity"] is not None), key=lambda point: point["p"])
        chips = [[value for value in point["perplexity_per_chip"] if value is not None] for point in finite]
        place = [point["p"] for point in finite]
        axes.plot(place, [point["perplexity"] for point in finite], color=color, label=label)
        axes.fill_between(place, list(map(min, chips)), list(map(max, chips)), color=color, alpha=0.2, linewidth=0)
        for p, values in zip(place, chips):
            axes.plot([p] * len(values), values, ".", color=color, markersize=3)
        for point in points:
            if point["non_finite_chips"]:
                height = point["perplexity"] or clean
                text = f"{point['non_finite_chips']}/{len(point['perplexity_per_chip'])} not finite"
                axes.annotate(text, (point["p"], height), color=color, fontsize=6, rotation=45)
    everywhere = [point["p"] for points in curves.values() for point in points]
    axes.plot(everywhere, [clean] * len(everywhere), alpha=0)  # the axes span all p, also where no chip is finite
    axes.axhline(clean, color="black", linestyle="--", linewidth=1, label=f"clean: {clean:.2f}")
    axes.set(xscale="log", yscale="log", xlabel="probability of error per bit", ylabel="perplexity", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def read_probabilities(text: str) -> list[float]:
    """
    Raises:
        ValueError: not numbers above 0 and at most 1, separated by commas.
    """
    found = []
    for part in text.split(","):
        try:
            p = float(part)
        except ValueError:
            p = math.nan
        if not 0 < p <= 1:
            raise ValueError(
                f"--probabilities: expected numbers above 0 and at most 1 with commas, not {part.strip()!r}"
            )
        found.append(p)
    return found
