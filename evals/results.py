"""Evaluation results as tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

_DERIVED = ("_std", "_per_chip", "_clean")


def print_results(result: dict[str, Any]) -> None:
    """Print what `newcompute eval` found."""
    console = Console()
    console.print(f"[bold]{result['model']}[/bold]", highlight=False)
    over_chips = result.get("chips", 0)
    for line in result.get("table", ()):
        console.print(line, highlight=False, markup=False)
    if "mode" in result:
        console.print(_hardware(result), highlight=False, markup=False)
    if result.get("languages"):
        from evals.languages import describe

        console.print(_language_table(result["languages"], result["protocol"]))
        console.print(describe(result["disparity"]), highlight=False, markup=False)
    if result["text"]:
        console.print(_text_table(result["text"], result["protocol"], bool(over_chips)))
    if result["tasks"]:
        console.print(_task_table(result["tasks"], bool(over_chips)))
    for line in _non_finite_inputs(result):
        console.print(line, highlight=False, markup=False)


def _hardware(result: dict[str, Any]) -> str:
    """On which hardware the figures were measured."""
    if result["mode"] == "clean":
        return "clean: no hardware effects"
    seed = f"noise seed {result['noise_seed']}"
    if result["mode"] == "resample":
        return f"{result['chips']} passes, weights drawn anew for every batch of {result['batch_size']}; {seed}"
    if result["chips"] == 1:
        return f"one chip, number {result['first_chip']}; {seed}"
    return f"mean ± standard deviation over {result['chips']} chips, from chip {result['first_chip']} on; {seed}"


def _non_finite_inputs(result: dict[str, Any]) -> Iterator[str]:
    """What was measured although quantisers were given infinity or NaN, which a finite figure does not show."""
    for part in ("languages", "text", "tasks"):
        for name, row in (result.get(part) or {}).items():
            if counts := row.get("non_finite_inputs_per_chip"):
                listed = ", ".join(f"{count:,}" for count in counts)
                yield f"{name}: rows with infinity or NaN on their way into the hardware, per chip: {listed}"


def _windows(protocol: dict[str, Any]) -> str:
    """How texts were read."""
    if "mask_every" in protocol:
        return f"windows of {protocol['context']} tokens, every {protocol['mask_every']}th masked at a time"
    return f"windows of {protocol['context']} tokens, stride {protocol['stride']}, first token unscored, no BOS"


def _language_table(rows: dict[str, Any], protocol: dict[str, Any]) -> Table:
    """One line per language: what it costs clean, and what the hardware adds."""
    table = Table(title=f"languages: {_windows(protocol)}", title_justify="left")
    table.add_column("language", overflow="fold")
    broken = any(row["non_finite_chips"] for row in rows.values())
    extra = ("not finite",) if broken else ()
    for column in ("clean bits per byte", "rise", "nats per token", "perplexity", *extra, "tokens"):
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    for name, row in rows.items():
        cells = [
            _spread(row, "degradation", "{:+.2%}", "{:.2%}"),
            _spread(row, "nats_rise", "{:+.4f}", "{:.4f}"),
            _spread(row, "perplexity_ratio", "x {:.4g}", "{:.2g}"),
        ]
        cells += [str(row["non_finite_chips"])] if broken else []
        table.add_row(name, _number(row["bits_per_byte_clean"]), *cells, f"{row['tokens']:,}")
    return table


def _spread(row: dict[str, Any], name: str, of_mean: str, of_spread: str) -> str:
    if row[name] is None:
        return "-"
    spread = "" if row[f"{name}_std"] is None else f" ± {of_spread.format(row[f'{name}_std'])}"
    return of_mean.format(row[name]) + spread


def _text_table(rows: dict[str, Any], protocol: dict[str, Any], over_chips: bool) -> Table:
    table = Table(title=f"text: {_windows(protocol)}", title_justify="left")
    table.add_column("file", overflow="fold")
    columns = ("perplexity", "bits per byte", "tokens scored")
    for column in ("figure", "mean", "± std", "clean", "not finite", "tokens scored") if over_chips else columns:
        table.add_column(column, justify="left" if column == "figure" else "right")
    for file, row in rows.items():
        tokens = f"{row['tokens']:,}"
        if not over_chips:
            table.add_row(file, _number(row["perplexity"]), _number(row["bits_per_byte"]), tokens)
            continue
        for name, figure in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
            cells = (_number(row[key]) for key in _columns(name, over_chips))
            table.add_row(file, figure, *cells, str(row["non_finite_chips"]), tokens)
    return table


def _task_table(tasks: dict[str, Any], over_chips: bool) -> Table:
    table = Table(title="tasks (lm-eval)", title_justify="left")
    extra = ("± std", "clean", "not finite") if over_chips else ()
    for column in ("task", "metric", "value", *extra):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, metrics in tasks.items():
        for metric in metrics:
            if over_chips and (metric == "non_finite_chips" or metric.endswith(_DERIVED)):
                continue
            broken = [str(metrics["non_finite_chips"])] if over_chips else []
            table.add_row(task, metric, *(_number(metrics[key]) for key in _columns(metric, over_chips)), *broken)
    return table


def _columns(name: str, over_chips: bool) -> tuple[str, ...]:
    return (name, f"{name}_std", f"{name}_clean") if over_chips else (name,)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
