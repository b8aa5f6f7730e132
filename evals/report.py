"""`newcompute report`: one HTML page of a run, or of several to compare, that needs nothing but itself.

Everything from a run (its name, configuration, events, samples) is text of others: it is escaped, and a content security
policy lets the page load nothing and run no script but its own. The environment is never read into it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evals import report_tables as tables
from evals.charts import Chart, Curve, Mark, Point, decimate, draw, rarest, style_of
from evals.runs import Run, labels, read_runs
from evals.samples import add_samples
from train.redaction import redact

NOISY = {"loss", "bits_per_byte", "grad_norm", "tokens_per_second", "data_wait"}
"""Curves that a reader may smooth."""
LOGARITHMIC = {"loss", "bits_per_byte", "grad_norm"}
"""Curves that a reader may see on a logarithmic axis; the others begin at zero."""
CHARTS = (
    ("loss", "Loss", "nats per token", 1.0),
    ("bits_per_byte", "Bits per byte", "", 1.0),
    ("grad_norm", "Gradient norm", "before clipping", 1.0),
    ("lr", "Learning rate", "", 1.0),
    ("tokens_per_second", "Throughput", "tokens/s, all devices", 1.0),
    ("memory_gib", "Memory", "GiB, peak so far", 1.0),
    ("data_wait", "Data wait", "% of the time", 100.0),
)
"""Key of a row, title, unit, and the factor that makes it that unit."""


def write_report(paths: Sequence[str], out: Path | None, prompts: Sequence[str] = ()) -> Path:
    """Write the page and return where.

    Args:
        paths: run folders; differences are to the first.
        out: default RUN/report.html, with several runs report.html in the current folder.
        prompts: texts that the latest checkpoint of each run continues first.

    Raises:
        ValueError: a path is no run, or a run has nothing to generate with.
    """
    runs = read_runs(paths)
    if prompts:
        for run in runs:
            add_samples(run, prompts)
        runs = read_runs(paths)
    if out is None:
        out = runs[0].path / "report.html" if len(runs) == 1 else Path("report.html")
    out.write_bytes(page(runs, time.time()).encode("utf-8", errors="replace"))
    return out


def page(runs: Sequence[Run], now: float) -> str:
    """The whole document; `now` is unix seconds."""
    names = labels(runs)
    title = f"Run {names[0]}" if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [
        ("summary", "Summary", tables.summary(runs, names, now)),
        ("curves", "Curves", _curves(runs, names)),
        ("configuration", "Configuration", tables.configuration(runs, names)),
        ("transforms", "Hardware effects", _each(runs, names, tables.transforms)),
        ("checkpoints", "Checkpoints", _each(runs, names, tables.checkpoints)),
        ("events", "Events", _each(runs, names, tables.events)),
        ("samples", "Samples", _each(runs, names, tables.samples)),
    ]
    style, script = (_beside(f"report.{kind}") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    links = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, heading, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{heading}</h2>{content}</section>'
        for key, heading, content in sections
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1><p class=quiet>{_paths(runs)}, as of {made}</p>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main>\n'
        f'<script type="application/json" id="data">{_data(runs, names)}</script>\n<script>{script}</script></body></html>\n'
    )


def charts_of(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """Every chart, with a curve for each run that has something to show."""
    return [
        Chart(
            key,
            title,
            unit,
            list(_curves_of(runs, names, key, factor)),
            from_zero=key not in LOGARITHMIC,
            may_be_log=key in LOGARITHMIC,
            may_be_smoothed=key in NOISY,
        )
        for key, title, unit, factor in CHARTS
    ]


def _curves_of(runs: Sequence[Run], names: Sequence[str], key: str, factor: float) -> Iterator[Curve]:
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        points = _points(run.rows, key, factor)
        if points:
            yield Curve(number, name, decimate(points))
        if key not in ("loss", "bits_per_byte"):
            continue
        for suffix, what in (("", "validation"), ("_clean", "validation without hardware effects")):
            points = _points(run.validation, f"val_{key}{suffix}", factor)
            if points:
                yield Curve(number, f"{name}, {what}", decimate(points), dotted=True)


def _points(rows: Sequence[dict[str, Any]], key: str, factor: float) -> list[Point]:
    return [(row["step"], None if row[key] is None else factor * row[key]) for row in rows if key in row]


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    if not any(run.rows or run.validation for run in runs):
        return "<p class=empty>Nothing is logged yet.</p>"
    ends = [run.step for run in runs]
    marks = [mark for number, run in enumerate(runs) for mark in _marks(number, run, names[number])]
    missing = sum(row.get(key, 0) is None for run in runs for row in run.rows for key in ("loss", "grad_norm"))
    keys = "".join(
        f'<li><svg viewBox="0 0 40 10" aria-hidden="true"><path class="line {style_of(i)}" d="M1 5H39"/></svg>{escape(n)}</li>'
        for i, n in enumerate(names)
    )
    notes = ["Dots on the loss and bits per byte are validation.", "Thin dotted verticals are events."]
    if missing:
        notes.append(f"{missing} logged losses or gradient norms are not finite: gaps in the curves.")
    figures = "".join(draw(chart, (0, max(*ends, 1)), marks) for chart in charts_of(runs, names))
    return (
        f'<ul class=legend aria-label="Runs">{keys}</ul><p class=quiet>{" ".join(notes)}</p>'
        "<form id=controls class=controls hidden><label>Horizontal axis <select name=axis>"
        "<option value=steps>steps</option><option value=tokens>tokens</option></select></label>"
        "<label><input type=checkbox name=log> logarithmic loss, bits per byte and gradient norm</label>"
        "<label>Smoothing <input type=range name=smoothing min=0 max=0.98 step=0.02 value=0></label></form>"
        f"<div class=charts>{figures}</div>"
    )


def _marks(number: int, run: Run, name: str) -> list[Mark]:
    end = run.step
    events = [event for event in run.events if event.step <= end]
    marks = [Mark(number, event.step, f"{name}, step {event.step}: {redact(event.message)}") for event in events]
    return rarest(marks, [event.kind for event in events])


def _data(runs: Sequence[Run], names: Sequence[str]) -> str:
    """What the script draws from, as JSON that cannot end its element."""
    charts = {
        chart.key: {
            "may_be_log": chart.may_be_log,
            "may_be_smoothed": chart.may_be_smoothed,
            "from_zero": chart.from_zero,
            "curves": [
                {
                    "run": curve.run,
                    "label": curve.label,
                    "dotted": curve.dotted,
                    "points": [
                        [step, None if value is None else float(f"{value:.6g}")] for step, value in curve.points
                    ],
                }
                for curve in chart.curves
            ],
        }
        for chart in charts_of(runs, names)
    }
    found = {
        "runs": [{"stretches": _stretches(run)} for run in runs],
        "ends": [run.step for run in runs],
        "charts": charts,
    }
    return json.dumps(found, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _stretches(run: Run) -> list[list[int]]:
    """[step, tokens until it, tokens of each step from there on], for the axis of tokens."""
    if run.counts is not None:
        return [[stretch.step, stretch.tokens, stretch.tokens_per_step] for stretch in run.counts.stretches]
    return [[0, 0, run.config.tokens_per_step if run.config is not None else 1]]


def _each(runs: Sequence[Run], names: Sequence[str], section: Callable[[Run], str]) -> str:
    if len(runs) == 1:
        return section(runs[0])
    return "".join(f"<h3>{escape(name)}</h3>{section(run)}" for run, name in zip(runs, names, strict=True))


def _paths(runs: Sequence[Run]) -> str:
    return ", ".join(escape(str(run.path)) for run in runs)


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
