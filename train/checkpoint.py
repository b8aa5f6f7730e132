"""Checkpoints that know nothing of the layout: torch.distributed.checkpoint (DCP) files under plain parameter names.

A folder `step-00000100` counts only once its `commit.json` is there, which is written last and atomically: whatever kills
a save leaves a folder that no resume will look at. Any number of processes can load what any other number saved.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from models.sizes import LlamaShape
from parallel.mesh import Mesh
from parallel.names import named_parameters
from train import records
from train.checkpoint_files import SafeReader, hashes
from train.checkpoint_metadata import DamagedCheckpoint
from train.optimizer import distributed_like, plain_moment, set_moment

COMMIT = "commit.json"
HASHED_PARTS = 64
OPTIMIZER_PREFIX = "optimizer."
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointError(Exception):
    """A checkpoint cannot be saved, found or used; the message says which, why and what to do."""


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
    hashes: dict[str, str] = field(default_factory=dict)
    """Of a sample of its contents (`train.checkpoint_files.hashes`), which loading compares."""

    @classmethod
    def read(cls, folder: Path) -> Commit:
        return records.read(cls, folder / COMMIT, CheckpointError)

    def llama_shape(self) -> LlamaShape:
        """
        Raises:
            CheckpointError: the marker holds no shape of a Llama.
        """
        return records.parse(LlamaShape, json.dumps(self.shape), f"the shape in {COMMIT}", CheckpointError)


def committed_steps(folder: Path) -> dict[int, Path]:
    """Complete checkpoints of a `checkpoints` folder by step, in ascending order."""
    found = {}
    for path in folder.glob("step-*"):
        match = _STEP_FOLDER.fullmatch(path.name)
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
    path = Path(resume)
    if (
        steps
        and folder.resolve() not in (path.resolve(), *path.resolve().parents)
        and path.resolve() != folder.resolve().parent
    ):
        return steps[max(steps)]  # begun from that path before: the run's own progress counts
    if (path / COMMIT).exists():
        return path
    for candidate in (path / "checkpoints", path):
        elsewhere = committed_steps(candidate)
        if elsewhere:
            return elsewhere[max(elsewhere)]
    raise CheckpointError(f'checkpoint.resume = "{resume}": neither a complete checkpoint nor a run that has one')


class Checkpoints:
    """Saves and restores one run's model and optimizer."""

    def __init__(self, folder: Path, keep: int, parts: Sequence[nn.Module], optimizer: Optimizer, mesh: Mesh):
        self.folder, self.keep, self.optimizer, self.mesh = folder, keep, optimizer, mesh
        # Taken once: in the middle of a forward FSDP shows gathered parameters in place of these.
        self.parameters = dict(named_parameters(*parts))

    def save(self, step: int, commit_in: Callable[[Path], Commit]) -> Path:
        """Write a checkpoint of the current state and commit it; collective.

        Args:
            commit_in: called on every rank with the folder, for what else belongs there; main's result is the marker.

        Raises:
            CheckpointError: on every rank, when any rank could not write.
        """
        path = self.folder / f"step-{step:08d}"
        self._on_main(lambda: _make_empty(path), f"prepare {path}")
        try:
            dcp.save(self._state(), storage_writer=dcp.FileSystemWriter(path, single_file_per_rank=True))
        except (CheckpointException, OSError, RuntimeError) as error:
            if isinstance(error, CheckpointException) and any(
                isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()
            ):
                raise KeyboardInterrupt from error
            raise CheckpointError(
                self._advice(f"could not save step {step} to {path}: {_root_cause(error)}")
            ) from error
        commit: list[Commit] = []
        self._on_all(lambda: commit.append(commit_in(path)), f"save step {step} to {path}")
        self._on_main(lambda: _commit(path, replace(commit[0], hashes=hashes(path, HASHED_PARTS))), f"commit {path}")
        self._on_main(self._remove_old, f"remove old checkpoints in {self.folder}")
        return path

    def load(self, path: Path) -> None:
        """Fill model and optimizer from a checkpoint, in place and whatever layout it was saved on; collective.

        Raises:
            CheckpointError: a file is damaged or a tensor is missing.
        """
        state = self._state()
        try:
            dcp.load(state, storage_reader=_reader(path))
        except (CheckpointException, OSError, RuntimeError, EOFError) as error:
            others = [step for step in committed_steps(self.folder) if step != int(path.name.partition("-")[2] or -1)]
            remedy = (
                f"; other complete steps: {', '.join(map(str, others))} (--checkpoint.resume STEP)" if others else ""
            )
            raise CheckpointError(f"could not load {path}: {_root_cause(error)}{remedy}") from error
        for key, moment in self._moments():
            set_moment(moment, state[key])

    def remove_torn(self) -> None:
        """Delete what interrupted saves have left (main process)."""
        for path in self.folder.glob("step-*"):
            if _STEP_FOLDER.fullmatch(path.name) and not (path / COMMIT).exists():
                shutil.rmtree(path, ignore_errors=True)

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename checkpoints later than `step`, so that a run resumed there does not jump to its old future (main process)."""
        renamed = []
        for later, path in committed_steps(self.folder).items():
            if later > step:
                names = (f"{path.name}.superseded{suffix}" for suffix in ["", *(f"-{i}" for i in range(2, 1000))])
                target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
                renamed.append(path.rename(target))
        return renamed

    def _state(self) -> dict[str, Tensor]:
        """Every tensor to keep, under its plain name; loads write into these, of which only quantised moments are copies."""
        state = {name: _plain(parameter.detach()) for name, parameter in self.parameters.items()}
        return state | {key: plain_moment(moment) for key, moment in self._moments()}

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                yield f"{OPTIMIZER_PREFIX}{name}.{key}", value

    def _on_main(self, action: Callable[[], None], what: str) -> None:
        """Run on the main process; its failure is everyone's."""
        self._on_all(action if self.mesh.is_main else lambda: None, what)

    def _on_all(self, action: Callable[[], None], what: str) -> None:
        """Run on every process; the failure of one is everyone's."""
        problem = ""
        try:
            action()
        except (OSError, DamagedCheckpoint) as error:
            problem = f"could not {what}: {error}"
        problems = [found for found in self.mesh.gather_objects(problem) if found]
        if problems:
            raise CheckpointError(self._advice(problems[0]))

    def _advice(self, problem: str) -> str:
        steps = committed_steps(self.folder)
        last = f"the last complete one is step {max(steps)}" if steps else "there is no complete one yet"
        free = shutil.disk_usage(self.folder if self.folder.exists() else ".").free / 2**30
        last += f"; {free:.1f} GiB are free there"
        return f"{problem}\n  Nothing committed is lost ({last}). Make room or repair the disk, then start the same command."

    def _remove_old(self) -> None:
        steps = committed_steps(self.folder)
        for step in list(steps)[: -self.keep]:
            # The marker goes first: a deletion that is interrupted must not leave something that looks complete.
            (steps[step] / COMMIT).unlink()
            shutil.rmtree(steps[step])


def _reader(path: Path) -> SafeReader:
    return SafeReader(path, Commit.read(path).hashes)


def checkpoint_names(path: Path) -> dict[str, torch.Size]:
    """Names and shapes of the model's tensors in a checkpoint."""
    try:
        metadata = _reader(path).read_metadata().state_dict_metadata
    except (OSError, DamagedCheckpoint) as error:
        raise CheckpointError(f"could not load {path}: {_root_cause(error)}") from error
    return {name: entry.size for name, entry in metadata.items() if not name.startswith(OPTIMIZER_PREFIX)}


def read_tensors(path: Path, names: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Read some of a checkpoint's tensors whole, float32 on CPU, without a process group."""
    state: dict[str, Any] = {name: torch.empty(size, dtype=torch.float32) for name, size in names.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=_reader(path), no_dist=True)
    except (CheckpointException, OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"could not load {path}: {_root_cause(error)}") from error
    return state


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
    if tokenizer and commit.tokenizer and tokenizer != commit.tokenizer:
        raise CheckpointError(
            f"{path} was trained with another tokenizer (fingerprint {commit.tokenizer[:12]}, this run's is {tokenizer[:12]})"
        )


def _plain(tensor: Tensor) -> Tensor:
    """A parameter without what a library has wrapped its storage in (torchao, to gather it as float8)."""
    if isinstance(tensor, DTensor) and is_traceable_wrapper_subclass(tensor._local_tensor):
        return distributed_like(tensor._local_tensor._tensor, tensor)
    return tensor


def _make_empty(path: Path) -> None:
    if path.exists():
        (path / COMMIT).unlink(missing_ok=True)
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _commit(path: Path, commit: Commit) -> None:
    temporary = path / (COMMIT + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(records.sealed(asdict(commit)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path / COMMIT)
    for folder in (path, path.parent):  # the marker's name, and the step's
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _root_cause(error: BaseException) -> str:
    """The first rank's own error, out of DCP's collected ones."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"{type(cause).__name__} on rank {rank}: {cause}"
    return f"{type(error).__name__}: {error}"
