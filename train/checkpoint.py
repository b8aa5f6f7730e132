"""Checkpoints that know nothing of the layout: torch.distributed.checkpoint (DCP) files under plain parameter names.

A folder `step-00000100` counts only once its `commit.json` is there, which is written last and atomically: whatever kills
a save leaves a folder that no resume will look at. Any number of processes can load what any other number saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from models.sizes import LlamaShape
from train import checkpoint_files, records
from train.checkpoint_files import SafeReader
from train.checkpoint_metadata import DamagedCheckpoint
from train.run_folder import RunFolder, write_atomically
from train.tokenizer import difference

COMMIT = "commit.json"
VERIFIED = "verified.json"
OPTIMIZER_PREFIX = "optimizer."
SAMPLE = 64
"""Parts of tensors whose hashes are recorded at a save and compared by its verification."""
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointError(Exception):
    """A checkpoint cannot be saved, found or used; the message says which, why and what to do."""


class Damaged(CheckpointError):
    """A complete checkpoint is not what was saved."""


@dataclass(frozen=True)
class Commit:
    """What the marker of a complete checkpoint records."""

    __pydantic_config__ = records.STRICT
    step: records.Count
    data: dict[str, Any]
    shape: dict[str, Any]
    tokenizer: str
    """Fingerprint; empty for random data."""
    adapters: list[dict[str, Any]] = field(default_factory=list)
    """The tables of the adapters whose weights it holds."""
    optimizer: str = "adamw"
    """Whose state it holds; older markers do not say."""
    permanent: bool = False
    """Never deleted."""
    time: float = 0.0
    """When it was saved, in seconds since 1970."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of every file."""
    hashes: dict[str, str] = field(default_factory=dict)
    """blake2b sums of `.metadata` and of a sample of the parts, as `train.checkpoint_files` has them."""

    @classmethod
    def read(cls, folder: Path) -> Commit:
        """
        Raises:
            Damaged: the marker is not one; CheckpointError: there is none, or it cannot be read.
        """
        try:
            text = (folder / COMMIT).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{folder} is no complete checkpoint: {error}") from error
        return records.parse(cls, text, folder / COMMIT, Damaged)

    def write(self, folder: Path) -> None:
        """Make a folder a complete checkpoint."""
        write_whole(folder / COMMIT, records.sealed(asdict(self)))

    def llama_shape(self) -> LlamaShape:
        """
        Raises:
            CheckpointError: the marker holds no shape of a Llama.
        """
        return records.parse(LlamaShape, json.dumps(self.shape), f"the shape in {COMMIT}", CheckpointError)


def _digest(record: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def committed_steps(folder: Path) -> dict[int, Path]:
    """Complete checkpoints of a `checkpoints` folder by step, in ascending order."""
    found = {}
    for path in folder.glob("step-*"):
        match = STEP_FOLDER.fullmatch(path.name)
        if match and (path / COMMIT).exists():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def find_checkpoint(folder: Path, resume: str | int) -> Path | None:
    """The checkpoint that `checkpoint.resume` means, or None to start anew.

    Args:
        folder: the run's `checkpoints`.
        resume: "auto", "none", a step of this run, or the path of a checkpoint or of a run.

    Raises:
        CheckpointError: it does not exist, or "none" was asked for where checkpoints are.
    """
    steps = committed_steps(folder)
    available = f"complete steps in {folder}: {', '.join(map(str, steps)) or 'none'}"
    if resume == "auto":
        return steps[max(steps)] if steps else None
    if resume == "none":
        if steps:
            raise CheckpointError(
                f'checkpoint.resume = "none" would overwrite this run; choose another run.name ({available})'
            )
        return None
    if isinstance(resume, int):
        if resume not in steps:
            raise CheckpointError(f"checkpoint.resume = {resume}: there is no such step; {available}")
        return steps[resume]
    path = as_path(resume)
    if (
        steps
        and folder.resolve() not in (path.resolve(), *path.resolve().parents)
        and path.resolve() != folder.resolve().parent
    ):
        return steps[max(steps)]  # begun from that path before: the run's own progress counts
    if (path / COMMIT).exists():
        return path
    for candidate in (RunFolder(path).checkpoints, path):
        elsewhere = committed_steps(candidate)
        if elsewhere:
            return elsewhere[max(elsewhere)]
    raise CheckpointError(f'checkpoint.resume = "{resume}": neither a complete checkpoint nor a run that has one')


def as_path(place: str) -> Path:
    """A folder of this machine, or one behind a URL that fsspec knows (s3://, gs://, memory://, ...)."""
    if "://" not in place:
        return Path(place)
    from upath import UPath

    return cast(Path, UPath(place))


def is_url(path: Path) -> bool:
    """Whether a path is one of fsspec's URLs and not of this machine."""
    return "://" in str(path)


def checkpoint_names(path: Path) -> dict[str, torch.Size]:
    """Names and shapes of the model's tensors in a checkpoint.

    Raises:
        Damaged: its metadata is not what was saved; CheckpointError: it cannot be read.
    """
    try:
        metadata: dict[str, Any] = SafeReader(str(path), Commit.read(path).hashes).read_metadata().state_dict_metadata
    except (DamagedCheckpoint, OSError) as error:
        raise _explained(error, path) from error
    return {name: entry.size for name, entry in metadata.items() if not name.startswith(OPTIMIZER_PREFIX)}


def read_tensors(path: Path, names: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Read some of a checkpoint's tensors whole, float32 on CPU, without a process group."""
    state: dict[str, Any] = {name: torch.empty(size, dtype=torch.float32) for name, size in names.items()}
    load_into(state, path, no_dist=True)
    return state


def load_into(state: dict[str, Any], path: Path, no_dist: bool = False) -> None:
    """Fill tensors from a complete checkpoint, in place; collective unless `no_dist`.

    Raises:
        Damaged: a file is not what was saved; CheckpointError: a tensor is missing, or the storage cannot be read.
    """
    reader = SafeReader(str(path), Commit.read(path).hashes)
    try:
        reader.read_metadata()  # DCP would report what is wrong with it as its own AssertionError
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, no_dist=no_dist)
    except (CheckpointException, DamagedCheckpoint, OSError, RuntimeError, EOFError) as error:
        raise _explained(error, path) from error


def verify(path: Path) -> None:
    """Compare a complete checkpoint with what its marker says: files, sizes, and the hashes of a sample.

    Raises:
        Damaged: it differs; CheckpointError: it cannot be read.
    """
    commit = Commit.read(path)
    try:
        checkpoint_files.verify(str(path), commit.files or None, SAMPLE, commit.hashes)
    except (DamagedCheckpoint, OSError) as error:
        raise _explained(error, path) from error
    record = {"time": round(time.time(), 3), "files": len(commit.files), "parts": len(commit.hashes)}
    write_whole(path / VERIFIED, json.dumps(record) + "\n")


def is_verified(path: Path) -> bool:
    return (path / VERIFIED).exists()


def write_whole(path: Path, text: str) -> None:
    """Write a small file that is there whole or not at all."""
    if is_url(path):
        path.write_text(text)  # an object appears when it is complete
        return
    write_atomically(path, text)
    for folder in (path.parent, path.parent.parent):  # the file's name, and its folder's
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_model(
    commit: Commit, path: Path, shape: LlamaShape, tokenizer: str, adapters: list[dict[str, Any]], optimizer: str
) -> None:
    """
    Raises:
        CheckpointError: the checkpoint is of another architecture, or was trained with another tokenizer, other adapters or
            another optimizer.
    """
    if adapters != commit.adapters:
        raise CheckpointError(
            f"{path} was trained with {commit.adapters or 'no adapters'}, this run has {adapters or 'none'}: "
            "export it (which merges its adapters) and begin from there with model.init_from"
        )
    if optimizer != commit.optimizer:
        raise CheckpointError(
            f'{path} holds the state of optimizer.name = "{commit.optimizer}", this run\'s is "{optimizer}": go on with that '
            "one, or export it and begin a new run from there with model.init_from"
        )
    mine = asdict(shape)
    # A longer context changes no weight.
    different = [key for key in mine if key != "max_context" and mine[key] != commit.shape.get(key)]
    if different:
        what = ", ".join(f"{key} {commit.shape.get(key)} (this run: {mine[key]})" for key in different)
        raise CheckpointError(f"{path} is a checkpoint of another model: {what}")
    if tokenizer and commit.tokenizer and (what := difference(commit.tokenizer, tokenizer)):
        raise CheckpointError(f"{path} was trained with {what}: give the tokenizer of its training, or begin a new run")


def root_cause(error: BaseException) -> str:
    """The first process's own error, out of DCP's collected ones."""
    if isinstance(error, DamagedCheckpoint):
        return str(error)
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"{type(cause).__name__} on rank {rank}: {cause}"
    return f"{type(error).__name__}: {error}"


def _explained(error: BaseException, path: Path) -> CheckpointError:
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    kind = Damaged if any(isinstance(cause, DamagedCheckpoint) for cause in causes) else CheckpointError
    return kind(f"could not load {path}: {root_cause(error)}")
