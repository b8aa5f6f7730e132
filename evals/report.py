"""`newcompute report`: one HTML page of a run, or of several to compare, that needs nothing but itself.

Everything from a run (its name, configuration, events, samples) is text of others: it is escaped, and a content security
policy lets the page load nothing and run no script but its own. The environment is never read into it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evals.charts import Chart, Curve, Mark, Point, decimate, draw, rarest, style_of
from evals.formats import count, duration, figure, share, size
from evals.runs import Run, gaps, labels, latest, read_runs
from evals.samples import add_samples
from evals.status import status_of
from models.sizes import num_parameters
from train.config import Config
from train.run_folder import flat

LAST_EVENTS = 200
LAST_SAMPLES = 20

# key of a row, title, unit, from zero, may be logarithmic, factor; validation rows have the first two as val_KEY.
CHARTS = (
    ("loss", "Loss", "nats per token", False, True, 1.0),
    ("bits_per_byte", "Bits per byte", "", False, True, 1.0),
    ("grad_norm", "Gradient norm", "before clipping", False, True, 1.0),
    ("lr", "Learning rate", "", True, False, 1.0),
    ("tokens_per_second", "Throughput", "tokens/s, all devices", True, False, 1.0),
    ("memory_gib", "Memory", "GiB, peak so far", True, False, 1.0),
    ("data_wait", "Data wait", "% of the time", True, False, 100.0),
)


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
    out.write_text(page(runs, time.time()), encoding="utf-8")
    return out


def page(runs: Sequence[Run], now: float) -> str:
    """The whole document; `now` is unix seconds."""
    names = labels(runs)
    title = f"Run {names[0]}" if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [
        ("summary", "Summary", _summary(runs, names, now)),
        ("curves", "Curves", _curves(runs, names)),
        ("configuration", "Configuration", _configuration(runs, names)),
        ("transforms", "Hardware effects", _each(runs, names, _transforms)),
        ("checkpoints", "Checkpoints", _each(runs, names, lambda run: _checkpoints(run, now))),
        ("events", "Events", _each(runs, names, lambda run: _events(run))),
        ("samples", "Samples", _each(runs, names, _samples)),
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
        Chart(key, title, unit, list(_curves_of(runs, names, key, factor)), from_zero, may_be_log)
        for key, title, unit, from_zero, may_be_log, factor in CHARTS
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
    marks = [Mark(number, event.step, f"{name}, step {event.step}: {event.message}") for event in events]
    return rarest(marks, [event.kind for event in events])


def _data(runs: Sequence[Run], names: Sequence[str]) -> str:
    """What the script draws from, as JSON that cannot end its element."""
    charts = {
        chart.key: {
            "may_be_log": chart.may_be_log,
            "from_zero": chart.from_zero,
            "curves": [
                {
                    "run": curve.run,
                    "label": curve.label,
                    "dotted": curve.dotted,
                    "points": [[step, None if value is None else float(f"{value:.6g}")] for step, value in curve.points],
                }
                for curve in chart.curves
            ],
        }
        for chart in charts_of(runs, names)
    }
    found = {
        "runs": [{"tokens_per_step": run.tokens_per_step} for run in runs],
        "ends": [run.step for run in runs],
        "charts": charts,
    }
    return json.dumps(found, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _summary(runs: Sequence[Run], names: Sequence[str], now: float) -> str:
    problems = "".join(f"<p class=notice>{escape(redact(problem))}</p>" for run in runs for problem in run.problems)
    rows: list[tuple[str, list[str]]] = []
    states = [status_of(run, now) for run in runs]
    rows.append(("state", [f"{s.state}<small>{escape(s.explanation)}</small>" for s in states]))
    rows.append(("step", [f"{count(s.step)} of {count(s.total_steps)}" for s in states]))
    rows.append(("parameters", [count(run.shape and num_parameters(run.shape)) for run in runs]))
    rows.append(("tokens", [count(s.tokens) for s in states]))
    figures: list[tuple[str, Callable[[Run], float | None], int]] = [
        ("loss, last logged", lambda run: latest(run.rows, "loss"), 4),
        ("bits per byte, last logged", lambda run: latest(run.rows, "bits_per_byte"), 4),
        ("validation loss, last", lambda run: latest(run.validation, "val_loss"), 4),
        ("validation bits per byte, last", lambda run: latest(run.validation, "val_bits_per_byte"), 4),
        ("the same without hardware effects", lambda run: latest(run.validation, "val_bits_per_byte_clean"), 4),
        ("throughput, tokens/s (median)", lambda run: _middle(run, "tokens_per_second"), 0),
        ("tokens/s per device (median)", lambda run: _middle(run, "tokens_per_second_per_device"), 0),
        ("MFU (median)", lambda run: _middle(run, "mfu"), 4),
        ("memory, GiB (peak)", lambda run: _largest(run, "memory_gib"), 3),
        ("largest gradient norm", lambda run: _largest(run, "grad_norm"), 3),
    ]
    for heading, value, digits in figures:
        values = [value(run) for run in runs]
        if any(v is not None for v in values):
            rows.append((heading, [figure(v, digits) + _difference(v, values[0], i) for i, v in enumerate(values)]))
    rows.append(("time between rows, in all", [duration(sum(s for _, s in gaps(run.rows)) or None) for run in runs]))
    rows.append(("data wait (mean)", [share(_mean(run, "data_wait")) for run in runs]))
    rows.append(("latest checkpoint", [_saved(run) for run in runs]))
    heads = ["", *(escape(name) for name in names)]
    caption = "Small figures are the difference to the first run." if len(runs) > 1 else ""
    cells = [[f"<th scope=row>{head}</th>", *(f"<td class=number>{cell}</td>" for cell in row)] for head, row in rows]
    return problems + _table("Summary", heads, cells, caption, numbers=True)


def _difference(value: float | None, first: float | None, number: int) -> str:
    if number == 0 or value is None or first is None:
        return ""
    difference = value - first
    relative = f" ({difference / first:+.1%})" if first else ""
    return f"<small>{difference:+,.4g}{relative}</small>"


def _saved(run: Run) -> str:
    if run.saved is None:
        return "-"
    return f"step {run.saved.step:,}<small>{'verified' if run.saved.verified else 'not verified'}</small>"


def _finite(run: Run, key: str) -> list[float]:
    return [row[key] for row in run.rows if row.get(key) is not None]


def _middle(run: Run, key: str) -> float | None:
    values = _finite(run, key)
    return statistics.median(values) if values else None


def _mean(run: Run, key: str) -> float | None:
    values = _finite(run, key)
    return statistics.fmean(values) if values else None


def _largest(run: Run, key: str) -> float | None:
    return max(_finite(run, key), default=None)


def _configuration(runs: Sequence[Run], names: Sequence[str]) -> str:
    defaults = flat(Config().model_dump(mode="json"))
    settings = [flat(run.config.model_dump(mode="json")) if run.config is not None else {} for run in runs]
    found = ""
    if len(runs) > 1:
        keys = [key for key in _keys(settings) if len({_shown(s, key) for s in settings}) > 1]
        cells = [[_key(key), *(f"<td class=text>{_shown(s, key)}</td>" for s in settings)] for key in keys]
        heads = ["setting", *(escape(name) for name in names)]
        found = "<h3>What differs between the runs</h3>"
        found += _table("Settings that differ between the runs", heads, cells) if keys else "<p>Nothing.</p>"
    for run, name, setting in zip(runs, names, settings, strict=True):
        keys = [key for key in _keys([setting]) if _shown(setting, key) != _shown(defaults, key)]
        cells = [[_key(k), *(f"<td class=text>{_shown(s, k)}</td>" for s in (setting, defaults))] for k in keys]
        table = _table(f"Settings of {name} that are not the default", ["setting", "value", "default"], cells)
        body = table if keys else "<p class=empty>There is no configuration to be read.</p>"
        what = "What differs from the defaults"
        if len(runs) == 1:
            found += f"<h3>{what}</h3>{body}"
        else:
            found += f"<details><summary>{what}: {escape(name)}</summary>{body}</details>"
        found += f"<details><summary>Resolved configuration: {escape(name)}</summary>{_toml(run)}</details>"
    return found


def _keys(settings: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for setting in settings for key in setting))


def _key(key: str) -> str:
    return f"<th scope=row>{escape(key)}</th>"


def _shown(setting: dict[str, Any], key: str) -> str:
    value = setting.get(key)
    return "-" if value is None else escape(redact(json.dumps(value, ensure_ascii=False)))


def _toml(run: Run) -> str:
    file = run.path / "config.toml"
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "<p class=empty>There is none.</p>"
    return f"<pre>{escape(redact(text))}</pre>"


def redact(text: str) -> str:
    """Without passwords and signatures that an address may carry: a configuration has no other place for secrets."""
    text = re.sub(r"(\w://)[^/@\s\"']+@", r"\1***@", text)
    return re.sub(r"(?i)([?&][^=&\s\"']*(?:token|secret|key|signature|credential|password|sig)[^=&\s\"']*=)[^&\s\"']+", r"\1***", text)


def _each(runs: Sequence[Run], names: Sequence[str], section: Callable[[Run], str]) -> str:
    if len(runs) == 1:
        return section(runs[0])
    return "".join(f"<h3>{escape(name)}</h3>{section(run)}" for run, name in zip(runs, names, strict=True))


def _transforms(run: Run) -> str:
    if run.config is None or not run.config.transforms:
        return "<p class=empty>None: plain training.</p>" if run.config else "<p class=empty>Not known.</p>"
    if run.shape is None:
        return "<p class=empty>The architecture is not known.</p>"
    from train.plan import transform_table

    try:
        lines, _ = transform_table(run.config, run.shape)
    except ValueError as error:
        return f"<p class=notice>{escape(str(error))}</p>"
    return f"<pre>{escape(chr(10).join(lines))}</pre><p class=quiet>Noise seed {run.config.noise_seed}.</p>"


def _checkpoints(run: Run, now: float) -> str:
    if not run.checkpoints:
        return f"<p class=empty>None in {escape(redact(run.checkpoint_folder))}.</p>"
    cells = []
    for saved in run.checkpoints:
        state = ("verified" if saved.verified else "complete, not verified") if saved.complete else "incomplete"
        age = "-" if saved.time is None else f"{duration(now - saved.time)} ago"
        texts = [state, "yes" if saved.permanent else "no", size(saved.size), age]
        cells.append([f"<th scope=row class=number>{saved.step:,}</th>", *(f"<td>{text}</td>" for text in texts)])
    return _table("Checkpoints", ["step", "state", "permanent", "size", "written"], cells)


def _events(run: Run) -> str:
    if not run.events:
        return "<p class=empty>None.</p>"
    cells = [
        [
            f"<th scope=row class=number>{event.step:,}</th>",
            f"<td>{_moment(event.time)}</td>",
            f"<td>{escape(event.kind)}</td>",
            f"<td class=text>{escape(redact(event.message))}</td>",
        ]
        for event in run.events[-LAST_EVENTS:]
    ]
    left_out = len(run.events) - len(cells)
    caption = f"The last {len(cells)}; {left_out} earlier ones are in metrics.jsonl." if left_out else ""
    return _table("Events", ["step", "time (UTC)", "event", "message"], cells, caption)


def _moment(seconds: float | None) -> str:
    try:
        return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "-"


def _samples(run: Run) -> str:
    if not run.samples:
        return "<p class=empty>None; <code>newcompute report RUN --sample PROMPT</code> makes some.</p>"
    return "".join(
        f"<figure class=chart><figcaption>Step {sample['step']:,}, greedy, without hardware effects; prompt "
        f"<code>{escape(json.dumps(sample['prompt'], ensure_ascii=False))}</code></figcaption>"
        f"<pre>{escape(sample['text'])}</pre></figure>"
        for sample in run.samples[-LAST_SAMPLES:]
    )


def _table(
    label: str, heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", numbers: bool = False
) -> str:
    """A table that scrolls within itself where it is wider than the page; heads and cells are HTML."""
    style = " class=number" if numbers else ""
    head = "".join(f"<th scope=col{style}>{text}</th>" if text else "<td></td>" for text in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    note = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class=scroll role=region tabindex=0 aria-label="{escape(label)}"><table>{note}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _paths(runs: Sequence[Run]) -> str:
    return ", ".join(escape(str(run.path)) for run in runs)


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
