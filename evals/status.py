"""`newcompute status`: where runs stand, from their folders alone; torch-free, and quick while a run is going on."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evals.formats import count, duration, figure, one_line, share, size
from evals.runs import Run, SavedStep, gaps, labels, latest, planned, read_runs, seconds_per_step, throughput
from train.redaction import redact

LAST_EVENTS = 5
SILENT = 5
"""A run is silent when its next row is late by so many times the usual distance, and by `faults.timeout`."""
SILENT_SECONDS = 600.0


@dataclass(frozen=True)
class Status:
    """One run now. The fields are those of `--json`; None: not known."""

    run: str
    """Its folder."""
    name: str
    state: str
    """starting, running, silent, finished, stopped (at training.stop_after), not running, unknown."""
    explanation: str
    step: int
    total_steps: int | None
    progress: float | None
    eta_seconds: float | None
    """To the last step; for a run that is not going on, what it would take."""
    seconds_per_step: float | None
    last_row_age_seconds: float | None
    loss: float | None
    bits_per_byte: float | None
    val_loss: float | None
    val_bits_per_byte: float | None
    val_step: int | None
    tokens: float | None
    tokens_per_second: float | None
    """All devices, median of the recent rows."""
    tokens_per_second_per_device: float | None
    processes: int | None
    mfu: float | None
    planned_tokens_per_second_per_device: float | None
    of_plan: float | None
    """Measured over planned."""
    plan_explanation: str
    checkpoint: dict[str, Any] | None
    """The latest complete one: step, age_seconds, verified, permanent, bytes."""
    checkpoint_folder: str
    unverified_steps: list[int]
    """Complete checkpoints whose verification has not passed (yet)."""
    events: list[dict[str, Any]]
    """The last ones: step, event, message, time."""
    num_events: int
    problems: list[str]
    """What could not be read."""


def status_of(run: Run, now: float) -> Status:
    """
    Args:
        now: unix seconds, from which ages are counted.
    """
    state, explanation = _state(run, now)
    pace, last = seconds_per_step(run), _last_time(run)
    eta = None
    if run.last_step is not None and pace is not None:
        eta = (run.last_step - run.step) * pace
        if state == "running" and last is not None:
            eta -= now - last
        eta = max(0.0, eta)
    rate, plan, saved = throughput(run), planned(run), run.saved
    per_device = rate / run.processes if rate and run.processes else None
    total = run.total_steps
    return Status(
        run=str(run.path),
        name=run.name,
        state=state,
        explanation=explanation,
        step=run.step,
        total_steps=total,
        progress=run.step / total if total else None,
        eta_seconds=eta,
        seconds_per_step=pace,
        last_row_age_seconds=None if last is None else now - last,
        loss=latest(run.rows, "loss"),
        bits_per_byte=latest(run.rows, "bits_per_byte"),
        val_loss=latest(run.validation, "val_loss"),
        val_bits_per_byte=latest(run.validation, "val_bits_per_byte"),
        val_step=run.validation[-1]["step"] if run.validation else None,
        tokens=run.tokens,
        tokens_per_second=rate,
        tokens_per_second_per_device=per_device,
        processes=run.processes,
        mfu=latest(run.rows, "mfu"),
        planned_tokens_per_second_per_device=plan.tokens_per_second,
        of_plan=per_device / plan.tokens_per_second if per_device and plan.tokens_per_second else None,
        plan_explanation=plan.explanation,
        checkpoint=_saved(saved, now),
        checkpoint_folder=redact(run.checkpoint_folder),
        unverified_steps=[c.step for c in run.checkpoints if c.complete and not c.verified],
        events=[
            {"step": e.step, "event": e.kind, "message": e.message, "time": e.time} for e in run.events[-LAST_EVENTS:]
        ],
        num_events=len(run.events),
        problems=[redact(problem) for problem in run.problems],
    )


def print_status(paths: Sequence[str], as_json: bool) -> None:
    """Print where runs stand: one in full, several as a table, or an array of JSON objects.

    Raises:
        ValueError: a path is no run folder.
    """
    now, runs = time.time(), read_runs(paths)
    found = [status_of(run, now) for run in runs]
    if as_json:
        print(json.dumps([asdict(status) for status in found], indent=2))
    elif len(found) == 1:
        print("\n".join(lines(found[0], now)))
    else:
        _print_table(found, labels(runs))


def _saved(saved: SavedStep | None, now: float) -> dict[str, Any] | None:
    if saved is None:
        return None
    age = None if saved.time is None else now - saved.time
    return {
        "step": saved.step,
        "age_seconds": age,
        "verified": saved.verified,
        "permanent": saved.permanent,
        "bytes": saved.size,
    }


def _state(run: Run, now: float) -> tuple[str, str]:
    """What the lock, the last row and the length say together."""
    last, usual = _last_time(run), _usual_distance(run)
    timeout = run.config.faults.timeout if run.config is not None else SILENT_SECONDS
    start_timeout = run.config.faults.start_timeout if run.config is not None else SILENT_SECONDS
    if run.in_use is None:
        return "unknown", "whether a job holds the folder's lock cannot be found out here"
    if run.in_use:
        started = run.started or now
        if last is None or last < started:
            if now - started > start_timeout:
                return "silent", f"a job holds the folder and has logged nothing for {duration(now - started)}"
            return "starting", f"for {duration(now - started)}"
        if now - last > max(timeout, SILENT * usual):
            often = f", usually every {duration(usual)}" if usual else ""
            return "silent", f"nothing logged for {duration(now - last)}{often}: it may hang"
        return "running", f"last row {duration(now - last)} ago"
    ago = "" if last is None else f"last row {duration(now - last)} ago"
    if run.total_steps is not None and run.step >= run.total_steps:
        return "finished", ago
    if run.last_step is not None and run.step >= run.last_step:
        return "stopped", "as stop_after asks"
    return "not running", ago or "nothing logged"


def _last_time(run: Run) -> float | None:
    times = [row["time"] for row in [*run.rows[-1:], *run.validation[-1:]] if row.get("time")]
    return max([*times, *(event.time for event in run.events[-1:] if event.time)], default=None)


def _usual_distance(run: Run) -> float:
    """Seconds between rows, of late."""
    pairs = gaps(run.rows[-20:])
    return sum(seconds for _, seconds in pairs) / len(pairs) if pairs else 0.0


def lines(status: Status, now: float) -> list[str]:
    """One run for people."""
    found = [
        f"{status.name}: {status.state}{f', {status.explanation}' if status.explanation else ''}",
        f"  step         {_progress(status)}",
    ]
    if status.tokens is not None:
        found.append(f"  loss         {_losses(status)}")
        found.append(f"  throughput   {_throughput(status)}")
    found.append(f"  checkpoint   {_checkpoint(status)}")
    found += [
        f"  {'event' if i == 0 else '':12} step {event['step']:,}"
        + (f", {duration(now - event['time'])} ago" if event["time"] else "")
        + f": {one_line(event['event'])}: {one_line(event['message'])}"
        for i, event in enumerate(status.events)
    ]
    if status.num_events > len(status.events):
        found.append(f"{'':14} (the last {len(status.events)} of {status.num_events} events)")
    return found + [f"  not read     {one_line(problem)}" for problem in status.problems]


def _progress(status: Status) -> str:
    if status.total_steps is None:
        return f"{status.step:,}"
    text = f"{status.step:,} of {status.total_steps:,} ({status.progress:.1%})"
    if status.seconds_per_step is not None:
        text += f", {duration(status.seconds_per_step)} per step"
    if status.eta_seconds and status.state in ("running", "silent", "starting"):
        return f"{text}, {duration(status.eta_seconds)} left"
    return f"{text}, would take {duration(status.eta_seconds)} more" if status.eta_seconds else text


def _losses(status: Status) -> str:
    text = f"{figure(status.loss)}, {figure(status.bits_per_byte)} bits per byte"
    if status.val_step is None:
        return text
    return (
        f"{text}; validation at step {status.val_step:,}: {figure(status.val_loss)}, "
        f"{figure(status.val_bits_per_byte)} bits per byte"
    )


def _throughput(status: Status) -> str:
    text = f"{count(status.tokens_per_second)} tokens/s"
    if (status.processes or 1) > 1:
        text += f" on {status.processes} devices, {count(status.tokens_per_second_per_device)} each"
    if status.of_plan is None:
        return f"{text}; {status.plan_explanation}"
    planned_rate = count(status.planned_tokens_per_second_per_device)
    return f"{text}; {status.of_plan:.0%} of the {planned_rate} per device that are planned ({status.plan_explanation})"


def _checkpoint(status: Status) -> str:
    saved = status.checkpoint
    if saved is None:
        return f"none complete in {status.checkpoint_folder}"
    parts = [f"step {saved['step']:,}", f"{duration(saved['age_seconds'])} ago", size(saved["bytes"])]
    parts.append("verified" if saved["verified"] else "not verified (yet)")
    return ", ".join([*parts, "permanent"] if saved["permanent"] else parts)


def _print_table(found: Sequence[Status], names: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    planned_any = any(status.of_plan is not None for status in found)
    columns = ["state", "step", "left", "loss", "bits/byte", "tokens/s", *(["of plan"] if planned_any else []), "saved"]
    for column in columns:
        table.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
    for status, name in zip(found, names, strict=True):
        saved = status.checkpoint
        table.add_row(
            Text(name),
            status.state,
            f"{status.step:,}" + ("" if status.total_steps is None else f"/{status.total_steps:,}"),
            duration(status.eta_seconds or None),
            figure(status.loss),
            figure(status.bits_per_byte),
            count(status.tokens_per_second),
            *([share(status.of_plan)] if planned_any else []),
            "-" if saved is None else f"{saved['step']:,}{' verified' if saved['verified'] else ''}",
        )
    Console().print(table, highlight=False)
