"""The folder of a run: its resolved configuration, its metrics, its tokenizer, and the rule who may continue it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import tomli

from train import records
from train.config import Config
from train.config_sources import to_toml
from train.row_counts import RowRecord

# What may differ when a run goes on: its length, where it stops, how it is spread, kept and watched.
MAY_CHANGE = (
    "run.dir",
    "run.device",
    "data.dir",
    "training.steps",
    "training.tokens",
    "training.tokens_per_parameter",
    "training.stop_after",
    "training.micro_batch_size",
    "training.loss_chunk_tokens",
    "parallel.",
    "compile.",
    "activation_checkpointing.",
    "checkpoint.",
    "faults.",
    "metrics.",
    "profiling.",
)

LOCK_TRIALS = 3
OWNER = "run.json"
"""File among checkpoints that lie elsewhere: whose they are."""


class RunFolderError(Exception):
    """The run folder cannot be used for this configuration."""


class RunFolder:
    """Paths inside `run.dir`/`run.name`."""

    def __init__(self, path: Path, checkpoints: str = "", name: str | None = None):
        self.path = path
        self._checkpoints, self._name = checkpoints, name
        self.config_file = path / "config.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.tokenizer = path / "tokenizer"
        self.faults = path / "faults"
        self.rows_file = path / "rows.json"
        self.saved_file = path / ".saved"
        self.profiles = path / "profiles"
        self._lock: IO[str] | None = None

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        return cls(Path(config.run.dir) / config.run.name, config.checkpoint.dir, config.run.name)

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints, which `checkpoint.dir` may have put elsewhere, also behind a URL.

        There it has the run's name, which renaming the run folder does not change.
        """
        if self._name is None:
            config = self.read_config() if self.config_file.exists() else None
            self._checkpoints = config.checkpoint.dir if config is not None else ""
            self._name = config.run.name if config is not None else self.path.name
        if (self.path / OWNER).exists() and self._checkpoints:
            return self.path  # it is the folder of the checkpoints itself, wherever that lies by now
        if not self._checkpoints:
            return self.path / "checkpoints"
        from train.checkpoint import as_path  # imports torch, which a look at a run need not

        return as_path(self._checkpoints) / self._name

    @property
    def copies(self) -> list[RunFolder]:
        """Where configuration and tokenizer are kept: here, and beside checkpoints that lie elsewhere on this machine.

        So a checkpoint can be used by its path alone, and when either folder has moved.
        """
        elsewhere = self.checkpoints
        if elsewhere.parent == self.path or elsewhere == self.path or "://" in str(elsewhere):
            return [self]
        return [self, RunFolder(elsewhere)]

    def check(self, config: Config) -> None:
        """
        Raises:
            RunFolderError: the folder holds a run of another configuration.
        """
        if not self.config_file.exists():
            return
        stored = self.read_config()
        mine, theirs = flat(config.model_dump()), flat(stored.model_dump())
        keys = [key for key in sorted(mine.keys() | theirs.keys()) if not key.startswith(MAY_CHANGE)]
        different = [key for key in keys if mine.get(key) != theirs.get(key)]
        if different:
            lines = "\n".join(f"      {key}: {theirs.get(key)!r} there, {mine.get(key)!r} now" for key in different)
            raise RunFolderError(
                f"{self.path} holds a run with another configuration:\n{lines}\n"
                "  Choose another run.name, or give the same configuration to continue this run."
            )

    def lock(self) -> None:
        """Keep other jobs out until `unlock`, or until this process ends however it ends.

        Raises:
            RunFolderError: another job is using the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / ".lock"
        self._lock = open(file, "a")  # noqa: SIM115 - held as long as the job
        for trial in range(LOCK_TRIALS):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # `newcompute status` takes it for an instant, to see whether a job has it.
                if trial < LOCK_TRIALS - 1:
                    time.sleep(0.1)
                    continue
                raise RunFolderError(
                    f"{self.path} is in use by another job: wait for it, stop it, or choose another run.name"
                ) from None
        os.utime(file)  # when this job began

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read_config(self) -> Config:
        """
        Raises:
            RunFolderError: `config.toml` is missing or not a configuration of this version.
        """
        try:
            return Config.model_validate(tomli.loads(self.config_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(f"{self.config_file} cannot be read as a run's configuration: {error}") from error

    def write_config(self, config: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_file, to_toml(config))

    def write_rows(self, record: RowRecord) -> None:
        """Keep which rows the steps of this run train on, for whoever looks at them before a checkpoint is there."""
        write_atomically(self.rows_file, records.sealed(asdict(record)))

    def read_rows(self) -> RowRecord | None:
        """What `write_rows` kept; None where an earlier version made the run.

        Raises:
            RunFolderError: the record is damaged.
        """
        return records.read(RowRecord, self.rows_file, RunFolderError) if self.rows_file.exists() else None

    @property
    def has_saved(self) -> bool:
        """Whether the run has ever had a complete checkpoint."""
        return self.saved_file.exists()

    def note_saved(self) -> None:
        if not self.saved_file.exists():
            with suppress(OSError):
                self.saved_file.touch()

    def check_owner(self) -> None:
        """
        Raises:
            RunFolderError: the checkpoints in `checkpoint.dir` are those of another run of this name.
        """
        note = self.checkpoints / OWNER
        if not note.exists():
            return
        theirs = json.loads(note.read_text(encoding="utf-8")).get("run")
        if theirs != str(self.path.resolve()):
            raise RunFolderError(
                f"{self.checkpoints} holds the checkpoints of {theirs}: choose another run.name or checkpoint.dir, or remove "
                f"{note} if that run has moved here"
            )

    def write_owner(self) -> None:
        """Say whose checkpoints these are, where they do not lie in the run folder."""
        if self.checkpoints.parent != self.path:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.checkpoints / OWNER).write_text(json.dumps({"run": str(self.path.resolve())}), encoding="utf-8")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`; a torn last line is left out."""
        if not self.metrics_file.exists():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

    def cut_metrics_after(self, step: int) -> None:
        """Drop metrics of steps beyond the checkpoint: they will be written again. A torn last line goes too."""
        if not self.metrics_file.exists():
            return
        kept = [json.dumps(row) + "\n" for row in self.metrics() if row["step"] <= step]
        write_atomically(self.metrics_file, "".join(kept))


def opened(path: Path) -> RunFolder:
    """The run that a path stands for: a run folder, or the one that a checkpoint's path belongs to.

    A checkpoint's run is looked for beside it: around `checkpoints/`, or in its own folder, where a run with
    `checkpoint.dir` leaves a copy of what is needed. Runs of earlier versions left a note only, of where the run was.

    Raises:
        RunFolderError: it is a checkpoint whose run cannot be found.
    """
    if not (path / "commit.json").exists():
        return RunFolder(path)
    steps = path.resolve().parent
    beside = RunFolder(steps.parent if steps.name == "checkpoints" else steps)
    if beside.config_file.exists():
        return beside
    noted = owner(steps)
    if noted is not None:
        return noted
    raise RunFolderError(
        f"{path} is a checkpoint without its run: there is no {beside.config_file}, and {steps / OWNER} does not name a run "
        "that is there. Move it back beside its run's config.toml and tokenizer/, or name the run folder and the step"
    )


def owner(checkpoints: Path) -> RunFolder | None:
    """The run folder whose checkpoints lie in a folder elsewhere; None where it is not known, or has moved."""
    try:
        run = RunFolder(Path(json.loads((checkpoints / OWNER).read_text(encoding="utf-8"))["run"]))
        return run if run.config_file.exists() and run.checkpoints.resolve() == checkpoints.resolve() else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError, RunFolderError):
        return None


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings under their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
