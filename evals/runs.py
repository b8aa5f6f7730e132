"""What a run folder says of its run, read while the run may be writing it; torch-free.

Nothing is taken on trust: the last line of the metrics may be torn, the configuration of another version, the checkpoints
on a storage that does not answer. What cannot be read is left out, and `Run.problems` says so.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from models.sizes import LlamaShape, RopeScaling, flops_per_token
from parallel.degrees import resolve_degrees
from train.config import Config, named_shape, total_steps
from train.plan_setup import Setup
from train.plan_time import ASSUMED_MFU, GPUS, plan_time
from train.row_counts import RowCounts, Stretch
from train.run_folder import OWNER, RunFolder, RunFolderError, opened, owner

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
RECENT = 50
"""Rows that a present speed is taken from."""
RESTART = 10
"""A pause between two rows that is so many times the usual one is no training time."""


@dataclass(frozen=True)
class SavedStep:
    """One folder of a run's checkpoints."""

    step: int
    complete: bool
    """It has its marker; without one it is being written, or was interrupted."""
    permanent: bool = False
    time: float | None = None
    """Of its commit, unix seconds."""
    size: int | None = None
    """Bytes."""
    verified: bool = False
    """The verification in the background has passed."""
    rows_consumed: int | None = None
    """Rows of data that it was trained on."""
    rows_fingerprint: str = ""
    """Of these rows."""


@dataclass(frozen=True)
class Event:
    step: int
    kind: str
    message: str
    time: float | None


@dataclass(frozen=True)
class Plan:
    """The throughput that `newcompute plan` estimates for a run."""

    tokens_per_second: float | None
    """Per device; None where there is no estimate."""
    explanation: str


@dataclass
class Run:
    """A run folder's contents."""

    path: Path
    config: Config | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Logged training steps in ascending order; values are numbers, None where they were not finite."""
    validation: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    checkpoints: list[SavedStep] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Each has `step`, `prompt` and `text`."""
    shape: LlamaShape | None = None
    in_use: bool | None = None
    """A job holds the lock; None where that cannot be found out."""
    started: float | None = None
    """When a job last took the lock, unix seconds."""
    counts: RowCounts | None = None
    """Rows and tokens of each step; None where the folder cannot tell."""
    rows_fingerprint: str = ""
    """Of the rows that it trains on; empty where nothing tells."""
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.config.run.name if self.config is not None else self.path.resolve().name

    @property
    def step(self) -> int:
        return max((row["step"] for row in [*self.rows, *self.validation]), default=0)

    @property
    def total_steps(self) -> int | None:
        if self.config is None:
            return None
        if self.shape is None and self.config.training.tokens_per_parameter is not None:
            return None
        trained = self.counts.unchanged_since if self.counts is not None else (0, 0)
        return total_steps(
            self.config, cast(LlamaShape, self.shape), trained
        )  # the shape for tokens_per_parameter only

    @property
    def last_step(self) -> int | None:
        """Where the job stops: the end, or `training.stop_after` before it."""
        total = self.total_steps
        return None if total is None or self.config is None else min(total, self.config.training.stop_after or total)

    @property
    def tokens(self) -> float | None:
        """Tokens until the last logged step."""
        if not self.rows:
            return None
        step = self.rows[-1]["step"]
        if self.counts is not None and step >= self.counts.first_step:
            return self.counts.tokens(step)
        return latest(self.rows, "tokens")

    @property
    def saved(self) -> SavedStep | None:
        """The latest complete checkpoint."""
        return max((c for c in self.checkpoints if c.complete), key=lambda c: c.step, default=None)

    @property
    def processes(self) -> int | None:
        rates = latest(self.rows, "tokens_per_second"), latest(self.rows, "tokens_per_second_per_device")
        return round(rates[0] / rates[1]) if rates[0] and rates[1] else None

    @property
    def checkpoint_folder(self) -> str:
        if self.config is None or not self.config.checkpoint.dir:
            return str(self.path / "checkpoints")
        if (self.path / OWNER).exists():
            return str(self.path)  # the folder of the checkpoints itself
        return f"{self.config.checkpoint.dir.rstrip('/')}/{self.config.run.name}"


def read_run(path: Path) -> Run:
    """A run by its folder, or by one of its checkpoints.

    Raises:
        ValueError: `path` holds no run.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder; expected a run folder, such as outputs/NAME")
    try:
        folder = opened(path)
    except RunFolderError as error:
        raise ValueError(str(error)) from error
    folder = owner(folder.path) or folder  # which has the metrics
    path = folder.path
    if not any(file.exists() for file in (folder.config_file, folder.metrics_file, path / ".lock")):
        raise ValueError(f"{path} is not a run folder: it has neither config.toml nor metrics.jsonl")
    run = Run(path)
    try:
        run.config = folder.read_config() if folder.config_file.exists() else None
    except RunFolderError as error:
        run.problems.append(str(error))
    run.in_use, run.started = _lock(path / ".lock")
    _read_metrics(run, folder.metrics_file)
    run.samples = [
        {"step": row["step"], "prompt": row["prompt"], "text": row["text"]}
        for row in _json_lines(path / "samples.jsonl", run.problems)
        if isinstance(row.get("prompt"), str) and isinstance(row.get("text"), str)
    ]
    shape = _read_checkpoints(run)
    run.shape = shape or _shape_of(run, folder)
    _read_counts(run, folder)
    return run


def read_runs(paths: Sequence[str]) -> list[Run]:
    """
    Raises:
        ValueError: one of them holds no run.
    """
    return [read_run(Path(path)) for path in dict.fromkeys(paths)]


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run that no other one has."""
    names = [run.name for run in runs]
    return [str(run.path) if names.count(run.name) > 1 else run.name for run in runs]


def latest(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """The last value that was logged under a key; None where that one was not finite."""
    return next((row[key] for row in reversed(rows) if key in row), None)


def gaps(rows: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """(steps, seconds) between neighbouring rows, without the pauses of a run that was not running."""
    pairs = [
        (b["step"] - a["step"], b["time"] - a["time"])
        for a, b in pairwise(rows)
        if a.get("time") and b.get("time") and b["step"] > a["step"] and b["time"] > a["time"]
    ]
    if not pairs:
        return []
    usual = statistics.median(seconds / steps for steps, seconds in pairs)
    return [(steps, seconds) for steps, seconds in pairs if seconds / steps <= RESTART * usual]


def seconds_per_step(run: Run) -> float | None:
    """Of late, with validation and saving."""
    pairs = gaps(run.rows[-RECENT:])
    if pairs:
        return sum(seconds for _, seconds in pairs) / sum(steps for steps, _ in pairs)
    rate = latest(run.rows, "tokens_per_second")
    return run.config.tokens_per_step / rate if rate and run.config is not None else None


def throughput(run: Run) -> float | None:
    """Tokens per second of all devices: the median of the recent rows, for one slow interval says little."""
    rates = [row["tokens_per_second"] for row in run.rows[-RECENT:] if row.get("tokens_per_second")]
    return statistics.median(rates) if rates else None


def planned(run: Run) -> Plan:
    """What `newcompute plan` would estimate with its own assumptions, for the device that the logged MFU speaks of."""
    if run.config is None or run.shape is None:
        return Plan(None, "no plan without the run's configuration and architecture")
    if not run.rows:
        return Plan(None, "no plan before the first logged step: it tells the device")
    measured = [row for row in run.rows if row.get("mfu") and row.get("tokens_per_second_per_device")]
    if not measured and run.config.run.device == "cpu":
        return Plan(None, "a plan has no figure for a CPU")
    if not measured:
        return Plan(None, "a plan has no figure for a CPU, or for a GPU whose peak is not known")
    row = measured[-1]
    flops = flops_per_token(run.shape, run.config.training.sequence_length)
    peak = row["tokens_per_second_per_device"] * flops / row["mfu"]
    gpu = min(GPUS.values(), key=lambda known: abs(known.peak / peak - 1))
    if abs(gpu.peak / peak - 1) > 0.1:
        return Plan(None, f"a plan knows no GPU with a peak of {peak / 1e12:.0f} TFLOP/s")
    try:
        setup = Setup.of(run.config, run.shape, resolve_degrees(run.config, run.processes or 1))
    except ValueError as error:
        return Plan(None, f"no plan: {error}")
    names = " or ".join(known.name for known in GPUS.values() if known.peak == gpu.peak)
    rate = plan_time(setup, gpu, ASSUMED_MFU).tokens_per_second
    return Plan(rate, f"{names}, arithmetic at {ASSUMED_MFU:.0%} of its peak")


def _lock(file: Path) -> tuple[bool | None, float | None]:
    """Whether a job holds the lock of a run folder, and when one last took it."""
    try:
        with open(file, encoding="utf-8") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True, file.stat().st_mtime
            return False, file.stat().st_mtime
    except FileNotFoundError:
        return False, None
    except OSError:
        return None, None


def _read_metrics(run: Run, file: Path) -> None:
    for row in _json_lines(file, run.problems):
        if "event" in row:
            kind, message = str(row["event"]), str(row.get("message", ""))
            run.events.append(Event(row["step"], kind, message, _number(row.get("time"))))
            continue
        figures = {key: _number(value) for key, value in row.items()}
        if "loss" in row:
            run.rows.append(figures | {"step": row["step"]})
        elif any(key.startswith("val_") for key in row):
            run.validation.append(figures | {"step": row["step"]})
    for rows in (run.rows, run.validation):
        rows.sort(key=lambda row: row["step"])


def _read_counts(run: Run, folder: RunFolder) -> None:
    """Fill in which rows and tokens each step had."""
    try:
        record = folder.read_rows()
    except RunFolderError as error:
        run.problems.append(str(error))
        return
    if record is not None:
        run.counts, run.rows_fingerprint = RowCounts(record.stretches), record.fingerprint
    elif run.config is not None and run.rows:
        run.counts = _counts_of_old(run, run.config)
        run.rows_fingerprint = run.saved.rows_fingerprint if run.saved is not None else ""
        if run.counts is None:
            run.problems.append(
                "an earlier version made this run and does not say which rows each step had: tokens are as it logged them, "
                "which is wrong if it began from a checkpoint with another batch size"
            )


def _counts_of_old(run: Run, config: Config) -> RowCounts | None:
    """The counts of a run without a record, as far as they are certain: from the first logged step on.

    Within a folder the batch size is one. How many rows came before it is known from a checkpoint, or where the run's first
    step is logged.
    """
    rows_per_step, length = config.training.global_batch_size, config.training.sequence_length
    before = run.rows[0]["step"] - 1
    saved = run.saved
    if saved is not None and saved.rows_consumed is not None:
        rows = saved.rows_consumed - (saved.step - before) * rows_per_step
    elif before == 0:
        rows = 0
    else:
        return None
    return RowCounts([Stretch(before, rows, rows * length, rows_per_step, rows_per_step * length)])


def _json_lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The objects of a file that have a step; a line that is torn, or no such object, is passed over."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{file}: {error.strerror or error}")
        return []
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53:
            rows.append(row)
    return rows


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def _read_checkpoints(run: Run) -> LlamaShape | None:
    """Fill in the checkpoints; returns the architecture that the latest complete one records."""
    import fsspec

    where = run.checkpoint_folder
    shapes: dict[int, LlamaShape] = {}
    try:
        files, root = fsspec.core.url_to_fs(where)
        for entry in files.ls(root, detail=True) if files.exists(root) else []:
            match = _STEP_FOLDER.fullmatch(entry["name"].rstrip("/").rpartition("/")[2])
            if match is None:
                continue
            step = int(match[1])
            saved, shape = _saved_step(files, entry["name"], step)
            run.checkpoints.append(saved)
            if shape is not None:
                shapes[step] = shape
    except Exception as error:  # every storage has errors of its own
        run.problems.append(f"checkpoints in {where} cannot be read: {type(error).__name__}: {error}")
    run.checkpoints.sort(key=lambda saved: saved.step)
    return shapes[max(shapes)] if shapes else None


def _saved_step(files: Any, folder: str, step: int) -> tuple[SavedStep, LlamaShape | None]:
    commit = _json_file(files, f"{folder}/commit.json")
    if commit is None:
        return SavedStep(step, complete=False), None
    sizes = commit.get("files")
    if isinstance(sizes, dict) and all(isinstance(value, int) for value in sizes.values()):
        total: int | None = sum(sizes.values())
    else:
        total = files.du(folder)
    time = _number(commit.get("time"))
    if time is None and hasattr(files, "modified"):
        time = files.modified(f"{folder}/commit.json").timestamp()
    verified = _json_file(files, f"{folder}/verified.json") is not None
    data = commit["data"] if isinstance(commit.get("data"), dict) else {}
    rows = data["rows_consumed"] if type(data.get("rows_consumed")) is int else None
    fingerprint = str(data.get("fingerprint", ""))
    saved = SavedStep(step, True, commit.get("permanent") is True, time, total, verified, rows, fingerprint)
    try:
        fields = dict(commit["shape"])
        scaling = fields.get("rope_scaling")
        return saved, LlamaShape(**fields | {"rope_scaling": RopeScaling(**scaling) if scaling else None})
    except (KeyError, TypeError, ValueError):
        return saved, None


def _json_file(files: Any, path: str) -> dict[str, Any] | None:
    """A file's object; None where it is missing (or goes away now: old checkpoints are removed) or holds none."""
    try:
        found = json.loads(files.cat_file(path))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _shape_of(run: Run, folder: RunFolder) -> LlamaShape | None:
    """The architecture that the configuration names, before there is a checkpoint."""
    if run.config is None or run.config.model.init_from:
        return None
    try:
        vocab_size = None
        if folder.tokenizer.is_dir():
            from train.tokenizer import load_tokenizer

            vocab_size = load_tokenizer(run.config.tokenizer.kind, str(folder.tokenizer)).vocab_size
        return named_shape(run.config.model, vocab_size)
    except Exception as error:  # a tokenizer's library has errors of its own
        run.problems.append(f"the architecture cannot be told: {error}")
        return None
