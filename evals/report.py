"""Evaluation results as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_results(result: dict[str, Any]) -> None:
    """Print what `newcompute eval` found."""
    console = Console()
    console.print(f"[bold]{result['model']}[/bold]", highlight=False)
    if result["text"]:
        protocol = result["protocol"]
        title = (
            f"text: windows of {protocol['context']} tokens, stride {protocol['stride']}, first token unscored, no BOS"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("file", overflow="fold")
        for column in ("perplexity", "bits per byte", "tokens scored"):
            table.add_column(column, justify="right")
        for file, row in result["text"].items():
            table.add_row(file, f"{row['perplexity']:.4f}", f"{row['bits_per_byte']:.4f}", f"{row['tokens']:,}")
        console.print(table)
    if result["tasks"]:
        table = Table(title="tasks (lm-eval)", title_justify="left")
        for column in ("task", "metric", "value"):
            table.add_column(column, justify="right" if column == "value" else "left")
        for task, metrics in result["tasks"].items():
            for metric, value in metrics.items():
                table.add_row(task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
        console.print(table)
