"""The summary of a trace as text for people: what a step consists of, in milliseconds per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from train.trace_names import COMMUNICATION
from train.trace_summary import Row, Summary

NAME_WIDTH = 64


def trace_text(summary: Summary, top: int = 15) -> str:
    """A page about one trace, with `top` rows of kernels or operators."""
    steps = len(summary.steps) or 1
    gpu = summary.device == "gpu"
    lines = [
        summary.file,
        _headline(summary),
        *(f"note: {note}" for note in summary.notes),
        "",
        *_parts(summary, steps),
        "",
        *_table(["by kind", "ms/step", "share", "calls/step"], [_row(r, summary, steps)[:4] for r in summary.groups]),
        "",
        *_table(
            ["kernels" if gpu else "operators, own time", "ms/step", "share", "calls/step", "mean us", "kind"],
            [_row(row, summary, steps) for row in summary.top[:top]],
        ),
    ]
    if summary.communication:
        rows = [_row(row, summary, steps)[:5] for row in summary.communication[:top]]
        lines += ["", *_table([COMMUNICATION, "ms/step", "share", "calls/step", "mean us"], rows)]
    if summary.gaps:
        title = f"largest of {summary.gap_count:,} gaps"
        rows = [[f"at {gap.at_ms:.3f} ms", f"{gap.ms:.3f}", gap.host] for gap in summary.gaps]
        lines += ["", *_table([title, "ms", "the host meanwhile" if gpu else "where"], rows, left=(0, 2))]
    for title, found in (("host waits for the device", summary.synchronizations), ("copies", summary.copies)):
        if found:
            lines += ["", *_table([title, "ms/step", "calls/step", "MB/step"], [_call(row, steps) for row in found])]
    return "\n".join(lines)


def comparison_text(summaries: Sequence[Summary]) -> str:
    """Several traces side by side; the one that communicates least is the one that the others wait for."""
    head = ["trace", "rank", "ms/step", "computing", "communication", "exposed", "idle"]
    rows = []
    for summary in summaries:
        steps = len(summary.steps) or 1
        figures = (
            summary.ms,
            summary.computing_ms,
            summary.communication_ms,
            summary.exposed_communication_ms,
            summary.idle_ms,
        )
        rank = "-" if summary.rank is None else str(summary.rank)
        rows.append([summary.file, rank, *(f"{figure / steps:.3f}" for figure in figures)])
    return "\n".join(_table(head, rows))


def trace_record(summary: Summary, top: int = 15) -> dict[str, Any]:
    """The summary as JSON takes it, with `top` rows of kernels or operators."""
    return asdict(replace(summary, top=summary.top[:top]))


def _headline(summary: Summary) -> str:
    who = "" if summary.rank is None else f"rank {summary.rank} of {summary.world_size or '?'}, "
    if not summary.steps:
        return f"{who}{summary.device}: {summary.ms:.3f} ms; steps are not marked, so all below is for the whole of it"
    steps, first, last = len(summary.steps), summary.steps[0], summary.steps[-1]
    which = f"step {first}" if steps == 1 else f"{steps} steps ({first} to {last})"
    return f"{who}{summary.device}, {which}: {summary.ms / steps:.3f} ms per step"


def _parts(summary: Summary, steps: int) -> list[str]:
    hidden = summary.communication_ms - summary.exposed_communication_ms
    parts = [
        ("computing", summary.computing_ms),
        ("communication, hidden behind computing", hidden),
        ("communication, exposed", summary.exposed_communication_ms),
        ("idle", summary.idle_ms),
    ]
    rows = [[name, f"{ms / steps:.3f}", _share(ms, summary.ms)] for name, ms in parts]
    return _table(["gpu" if summary.device == "gpu" else "main thread", "ms/step", "share"], rows)


def _row(row: Row, summary: Summary, steps: int) -> list[str]:
    mean = row.ms / row.count * 1e3 if row.count else 0.0
    return [
        row.name if len(row.name) <= NAME_WIDTH else f"{row.name[: NAME_WIDTH - 3]}...",
        f"{row.ms / steps:.3f}",
        _share(row.ms, summary.ms),
        f"{row.count / steps:,.4g}",
        f"{mean:,.1f}",
        row.group,
    ]


def _call(row: Row, steps: int) -> list[str]:
    size = f"{row.bytes / steps / 1e6:,.3f}" if row.bytes else ""
    return [row.name, f"{row.ms / steps:.3f}", f"{row.count / steps:,.4g}", size]


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _table(head: list[str], rows: list[list[str]], left: tuple[int, ...] = (0, 5)) -> list[str]:
    """Lines with columns as wide as they need, numbers to the right."""
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
