"""Curves as HTML and inline SVG, readable at any width and without a script.

Only lines and marks are SVG, stretched to the room there is (`vector-effect` keeps their strokes); ticks and their labels
are HTML, placed by percentages, so that text has its own size on a telephone as on a desktop. evals/report.js draws the same
charts again for another axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from evals.formats import short

LIMIT = 1000
"""Points of a curve that are drawn, about."""
MARKS = 40
"""Events that are marked in a chart, per run."""
COLORS = 6
SIDE = 1000.0
"""Of the SVG's own coordinates."""

Point = tuple[int, float | None]


@dataclass(frozen=True)
class Curve:
    """One run's line."""

    run: int
    """Its number in the report, which gives colour and dash."""
    label: str
    points: list[Point]
    """(step, value) in ascending order; a value of None is a gap."""
    dotted: bool = False
    """Points of their own, joined by a thin line: measured now and then."""


@dataclass(frozen=True)
class Mark:
    run: int
    step: int
    text: str


@dataclass(frozen=True)
class Chart:
    key: str
    title: str
    unit: str
    curves: list[Curve]
    from_zero: bool = False
    may_be_log: bool = False
    may_be_smoothed: bool = False


def decimate(points: Sequence[Point], limit: int = LIMIT) -> list[Point]:
    """At most `limit` of the points: the first, the last, and the smallest, the largest and one gap of every stretch."""
    if len(points) <= limit:
        return list(points)
    stretches = (limit - 2) // 3
    kept = {0, len(points) - 1}
    for i in range(stretches):
        start, end = i * len(points) // stretches, (i + 1) * len(points) // stretches
        finite = [(value, j) for j in range(start, end) if (value := points[j][1]) is not None]
        gap = next((j for j in range(start, end) if points[j][1] is None), None)
        if gap is not None:
            kept.add(gap)
        if finite:
            kept |= {min(finite)[1], max(finite)[1]}
    return [points[j] for j in sorted(kept)]


def ticks(low: float, high: float, at_most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def value_range(chart: Chart) -> tuple[float, float] | None:
    """The vertical axis; None where nothing is finite."""
    values = [value for curve in chart.curves for _, value in curve.points if value is not None]
    if not values:
        return None
    low, high = min(values), max(values)
    if chart.from_zero:
        low = min(0.0, low)
    pad = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return (low if chart.from_zero and low == 0.0 else low - pad), high + pad


def path(points: Sequence[Point], steps: tuple[float, float], values: tuple[float, float]) -> str:
    """The `d` of a line; a point without neighbours becomes a dot by its round ends."""
    parts, pen_down = [], False
    for i, (step, value) in enumerate(points):
        if value is None:
            pen_down = False
            continue
        x = SIDE * (step - steps[0]) / (steps[1] - steps[0])
        y = SIDE * (values[1] - value) / (values[1] - values[0])
        alone = not pen_down and (i + 1 == len(points) or points[i + 1][1] is None)
        parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}{'h0' if alone else ''}")
        pen_down = True
    return "".join(parts)


def style_of(run: int) -> str:
    """Classes of a run's lines: six colours, and dashes that differ between runs of one colour as well."""
    return f"c{run % COLORS} d{(run + run // COLORS) % COLORS}"


def draw(chart: Chart, steps: tuple[float, float], marks: Sequence[Mark]) -> str:
    """A chart as an HTML figure."""
    name = f"chart-{chart.key}"
    values = value_range(chart)
    unit = f" <span class=unit>{escape(chart.unit)}</span>" if chart.unit else ""
    head = f'<figure class=chart id="{name}" data-key="{chart.key}"><figcaption><h3>{escape(chart.title)}{unit}</h3></figcaption>'
    if values is None:
        return f"{head}<p class=empty>Nothing finite was logged.</p></figure>"
    horizontal = [(100 * (values[1] - tick) / (values[1] - values[0]), tick) for tick in ticks(*values)]
    vertical = [(100 * (tick - steps[0]) / (steps[1] - steps[0]), tick) for tick in ticks(*steps, at_most=6)]
    grid = [f"M0 {10 * place:.1f}H{SIDE:g}" for place, _ in horizontal]
    grid += [f"M{10 * place:.1f} 0V{SIDE:g}" for place, _ in vertical]
    body = [f'<path class=grid d="{"".join(grid)}"/>']
    for mark in marks:
        x = SIDE * (mark.step - steps[0]) / (steps[1] - steps[0])
        body.append(
            f'<path class="mark c{mark.run % COLORS}" data-step="{mark.step}" data-run="{mark.run}" '
            f'd="M{x:.1f} 0V{SIDE:g}"><title>{escape(mark.text)}</title></path>'
        )
    for i, curve in enumerate(chart.curves):
        d = path(curve.points, steps, values)
        body.append(
            f'<path class="line {style_of(curve.run)}{" thin" if curve.dotted else ""}" data-curve="{i}" d="{d}"/>'
        )
        if curve.dotted or len(curve.points) == 1:
            dots = path([p for point in curve.points for p in (point, (point[0], None))], steps, values)
            body.append(f'<path class="dots c{curve.run % COLORS}" data-curve="{i}" d="{dots}"/>')
    rows = "".join(f'<span style="top:{place:.2f}%">{short(tick)}</span>' for place, tick in horizontal)
    columns = "".join(f'<span style="left:{place:.2f}%">{short(tick)}</span>' for place, tick in vertical)
    described = escape(describe(chart))
    return (
        f"{head}<div class=plot><div class=rows aria-hidden=true>{rows}</div>"
        f'<svg viewBox="0 0 {SIDE:g} {SIDE:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{described}">{"".join(body)}</svg>'
        f"<div class=columns aria-hidden=true>{columns}</div></div>"
        f"<p class=axis>step</p><p class=reading aria-live=polite>&nbsp;</p></figure>"
    )


def describe(chart: Chart) -> str:
    """A chart in words, for who does not see it."""
    parts = []
    for curve in chart.curves:
        finite = [(step, value) for step, value in curve.points if value is not None]
        if not finite:
            parts.append(f"{curve.label}: nothing finite")
            continue
        low, high = (pick(finite, key=lambda point: point[1]) for pick in (min, max))
        parts.append(
            f"{curve.label}: from {finite[0][1]:.4g} at step {finite[0][0]} to {finite[-1][1]:.4g} at step "
            f"{finite[-1][0]}, lowest {low[1]:.4g} at step {low[0]}, highest {high[1]:.4g} at step {high[0]}"
        )
    return f"{chart.title}. {'. '.join(parts)}."


def rarest(marks: Sequence[Mark], kinds: Sequence[str], limit: int = MARKS) -> list[Mark]:
    """At most `limit` marks: events of frequent kinds would hide the others, so the rarest kinds come first."""
    frequency = {kind: kinds.count(kind) for kind in set(kinds)}
    order = sorted(range(len(marks)), key=lambda i: (frequency[kinds[i]], -marks[i].step))
    return [marks[i] for i in sorted(order[:limit])]
