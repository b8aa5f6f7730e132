"""The folder of a run: its resolved configuration, its metrics, its tokenizer, and the rule who may continue it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

import tomli

from train.config import Config
from train.config_sources import to_toml

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
)


class RunFolderError(Exception):
    """The run folder cannot be used for this configuration."""


class RunFolder:
    """Paths inside `run.dir`/`run.name`."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer"
        self.faults = path / "faults"
        self._lock: IO[str] | None = None

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        return cls(Path(config.run.dir) / config.run.name)

    def check(self, config: Config) -> None:
        """
        Raises:
            RunFolderError: the folder holds a run of another configuration.
        """
        if not self.config_file.exists():
            return
        stored = self.read_config()
        mine, theirs = _flat(config.model_dump()), _flat(stored.model_dump())
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
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held as long as the job
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"{self.path} is in use by another job: wait for it, stop it, or choose another run.name"
            ) from None

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
        _write_atomically(self.config_file, to_toml(config))

    def cut_metrics_after(self, step: int) -> None:
        """Drop metrics of steps beyond the checkpoint: they will be written again. A torn last line goes too."""
        if not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        _write_atomically(self.metrics_file, "".join(kept))


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
