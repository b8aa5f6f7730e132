"""The parts of a report that are tables and text; what a run says of itself is escaped here."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from evals.formats import count, duration, figure, redact, share, size
from evals.runs import Run, gaps, latest
from evals.status import status_of
from models.sizes import num_parameters
from train.config import Config
from train.run_folder import flat

LAST_EVENTS = 200
LAST_SAMPLES = 20


def summary(runs: Sequence[Run], names: Sequence[str], now: float) -> str:
    problems = "".join(f"<p class=notice>{escape(redact(problem))}</p>" for run in runs for problem in run.problems)
    rows: list[tuple[str, list[str]]] = []
    states = [status_of(run, now) for run in runs]
    rows.append(("state", [f"{s.state}<small>{escape(s.explanation)}</small>" for s in states]))
    rows.append(("step", [f"{count(s.step)} of {count(s.total_steps)}" for s in states]))
    rows.append(("parameters", [count(num_parameters(run.shape) if run.shape is not None else None) for run in runs]))
    rows.append(("tokens", [count(s.tokens) for s in states]))
    figures: list[tuple[str, Callable[[Run], float | None], int]] = [
        ("loss, last logged", lambda run: latest(run.rows, "loss"), 4),
        ("bits per byte, last logged", lambda run: latest(run.rows, "bits_per_byte"), 4),
        ("validation loss, last", lambda run: latest(run.validation, "val_loss"), 4),
        ("validation bits per byte, last", lambda run: latest(run.validation, "val_bits_per_byte"), 4),
        ("the same without hardware effects", lambda run: latest(run.validation, "val_bits_per_byte_clean"), 4),
        ("tokens/s, median", lambda run: _middle(run, "tokens_per_second"), 0),
        ("tokens/s per device", lambda run: _per_device(run), 0),
        ("MFU, median", lambda run: _middle(run, "mfu"), 4),
        ("peak memory, GiB", lambda run: _largest(run, "memory_gib"), 3),
        ("largest gradient norm", lambda run: _largest(run, "grad_norm"), 3),
    ]
    for heading, value, digits in figures:
        values = [value(run) for run in runs]
        if any(v is not None for v in values):
            rows.append(
                (heading, [figure(v, digits) + _difference(v, values[0], i, digits) for i, v in enumerate(values)])
            )
    rows.append(("training time", [duration(sum(s for _, s in gaps(run.rows)) or None) for run in runs]))
    rows.append(("data wait, mean", [share(_mean(run, "data_wait")) for run in runs]))
    rows.append(("latest checkpoint", [_saved(run) for run in runs]))
    heads = ["", *(escape(name) for name in names)]
    caption = "Small figures are the difference to the first run." if len(runs) > 1 else ""
    cells = [[f"<th scope=row>{head}</th>", *(f"<td class=number>{cell}</td>" for cell in row)] for head, row in rows]
    return problems + _table("Summary", heads, cells, caption, numbers=True)


def _difference(value: float | None, first: float | None, number: int, digits: int) -> str:
    if number == 0 or value is None or first is None:
        return ""
    difference = value - first
    relative = f" ({difference / first:+.1%})" if first else ""
    return f"<small>{difference:+,.{digits}f}{relative}</small>"


def _saved(run: Run) -> str:
    if run.saved is None:
        return "-"
    return f"step {run.saved.step:,}<small>{'verified' if run.saved.verified else 'not verified'}</small>"


def _finite(run: Run, key: str) -> list[float]:
    return [row[key] for row in run.rows if row.get(key) is not None]


def _middle(run: Run, key: str) -> float | None:
    values = _finite(run, key)
    return statistics.median(values) if values else None


def _per_device(run: Run) -> float | None:
    return _middle(run, "tokens_per_second_per_device") if (run.processes or 1) > 1 else None


def _mean(run: Run, key: str) -> float | None:
    values = _finite(run, key)
    return statistics.fmean(values) if values else None


def _largest(run: Run, key: str) -> float | None:
    return max(_finite(run, key), default=None)


def configuration(runs: Sequence[Run], names: Sequence[str]) -> str:
    defaults = _settings(Config())
    settings = [_settings(run.config) if run.config is not None else {} for run in runs]
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


def _settings(config: Config) -> dict[str, Any]:
    """Every setting that has a value under its dotted key, those of a list of tables with the table's number."""
    found: dict[str, Any] = {}
    for key, value in flat(config.model_dump(mode="json", exclude_none=True)).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for number, table in enumerate(value):
                found |= {f"{key}[{number}].{inner}": leaf for inner, leaf in flat(table).items()}
        else:
            found[key] = value
    return found


def _keys(settings: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for setting in settings for key in setting))


def _key(key: str) -> str:
    """A setting's name, which breaks behind its dots and underscores where there is little room."""
    breakable = re.sub(r"([._])", r"\1<wbr>", escape(key))
    return f"<th scope=row>{breakable}</th>"


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


def transforms(run: Run) -> str:
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


def checkpoints(run: Run) -> str:
    if not run.checkpoints:
        return f"<p class=empty>None in {escape(redact(run.checkpoint_folder))}.</p>"
    cells = []
    for saved in run.checkpoints:
        state = ("verified" if saved.verified else "complete, not verified") if saved.complete else "incomplete"
        texts = [state, "yes" if saved.permanent else "no", size(saved.size), _moment(saved.time)]
        cells.append([f"<th scope=row>{saved.step:,}</th>", *(f"<td>{text}</td>" for text in texts)])
    return _table("Checkpoints", ["step", "state", "permanent", "size", "written (UTC)"], cells)


def events(run: Run) -> str:
    if not run.events:
        return "<p class=empty>None.</p>"
    cells = [
        [
            f"<th scope=row>{event.step:,}</th>",
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
    """HTML that breaks between day and time only."""
    try:
        form = "<span class=whole>%Y-%m-%d</span> <span class=whole>%H:%M:%S</span>"
        return "-" if seconds is None else time.strftime(form, time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "-"


def samples(run: Run) -> str:
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
    head = "".join(f"<th scope=col{style}>{text}</th>" if text else "<th></th>" for text in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    note = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class=scroll role=region tabindex=0 aria-label="{escape(label)}"><table>{note}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
