"""Saving checkpoints while training goes on.

A save has two halves. `begin` hands the state to a thread that copies it to host memory: the forward and backward of the
next step only read it, and the loop waits for the copy (on a GPU its stream does) before the optimizer changes it. Then the
thread writes, commits, verifies and deletes old checkpoints, talking to the other processes through a group of its own.
All processes learn the same outcome, at the step at which an agreement says that none is saving any more.

Host memory holds one copy of this process's parameters and optimizer state for it (12 bytes per parameter with AdamW).
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from parallel.mesh import Mesh
from parallel.names import LEARNED, named_parameters
from train import checkpoint_files
from train.checkpoint import (
    COMMIT,
    OPTIMIZER_PREFIX,
    SAMPLE,
    STEP_FOLDER,
    CheckpointError,
    Commit,
    Damaged,
    checkpoint_names,
    committed_steps,
    is_url,
    is_verified,
    load_into,
    root_cause,
    verify,
)
from train.config import CheckpointConfig
from train.optimizer import distributed_like, plain_moment, set_moment

CLOSING = 60.0
"""Seconds that the end of a run which failed waits for a save in progress."""


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same on all processes."""

    step: int
    path: Path
    problem: str = ""
    """Why it is not committed; empty where it is."""
    non_finite: str = ""
    """What was not finite, and therefore not saved."""
    warning: str = ""
    """What else went wrong, of no harm to the checkpoint."""
    crash: Exception | None = None
    """What this process could not tell the others, who wait for it."""
    seconds: float = 0.0


@dataclass
class _Request:
    """What `begin` leaves to the thread."""

    commit: Commit
    path: Path
    files: dict[str, bytes]
    staged: dict[str, Tensor]
    copies: list[tuple[Tensor, Tensor]]
    first_bad_step: Tensor


class SaveFailed(Exception):
    """Ends a save on all processes."""


class Checkpoints:
    """Saves and restores one run's model and optimizer."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        parts: Sequence[nn.Module],
        optimizer: Optimizer,
        mesh: Mesh,
        timeout: timedelta,
        ranges: dict[str, Tensor] | None = None,
    ):
        self.ranges = ranges or {}
        """What hardware effects track, by name; plain tensors, the same on all processes that have the layer."""
        self.folder, self.settings, self.optimizer, self.mesh = folder, settings, optimizer, mesh
        # Taken once: in the middle of a forward FSDP shows gathered parameters in place of these.
        self.parameters = dict(named_parameters(*parts))
        self.group = dist.new_group(backend="gloo", timeout=timeout) if mesh.world_size > 1 else None
        self.retry_at: int | None = None
        self.last_saved = 0
        self._host: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(mesh.device) if mesh.device.type == "cuda" else None
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._outcome: Saved | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this process."""
        return self._thread is not None and self._outcome is None

    @property
    def crashed(self) -> bool:
        """Whether the thread of this process has failed and the others wait for it."""
        return self._outcome is not None and self._outcome.crash is not None

    def due(self, step: int) -> bool:
        """Whether a save begins after this step: at the interval, or again after one that failed."""
        interval = self.settings.interval
        return interval > 0 and (step % interval == 0 or (self.retry_at is not None and step >= self.retry_at))

    def make_host_copy(self) -> None:
        """Reserve the host memory that saves copy to, as far as the optimizer has its state.

        Pinning it stops the process for seconds (12 bytes per parameter with AdamW). The loop therefore does it after the first
        step of a run, which compiles for longer than that, and not in the middle of training, when the first save is due.
        """
        self._reserve(self.state())

    def _reserve(self, state: dict[str, Tensor]) -> None:
        for key, tensor in state.items():
            if key not in self._host:
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                self._host[key] = torch.empty_like(local, device="cpu", pin_memory=self._stream is not None)

    def begin(self, commit: Commit, files: dict[str, bytes], first_bad_step: Tensor) -> None:
        """Start to save the current state.

        Args:
            commit: what the marker is to say, the same on all processes.
            files: this process's own small files for the folder, by name.
            first_bad_step: as the trainer has it; a step that was not finite is never saved.
        """
        assert self._thread is None, "settle the last save first"
        interval = self.settings.permanent_interval
        commit = replace(commit, permanent=bool(interval and commit.step % interval == 0), time=time.time())
        self.retry_at, self._outcome = None, None
        self._copied.clear()
        state = self.state()
        self._reserve(state)
        staged, copies = {}, []
        bad = torch.empty_like(first_bad_step, device="cpu", pin_memory=self._stream is not None)
        for key, tensor in state.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            copies.append((self._host[key], local))
            spec = tensor._spec if isinstance(tensor, DTensor) else None
            # Not from_local, which would move it to the mesh's device.
            staged[key] = self._host[key] if spec is None else DTensor(self._host[key], spec, requires_grad=False)
        copies.append((bad, first_bad_step))
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for host, local in copies:
                    if local.is_cuda:
                        host.copy_(local, non_blocking=True)
                self._on_host = self._stream.record_event()
        self._partly_on_host = any(not local.is_cuda for _, local in copies)
        path = self.folder / f"step-{commit.step:08d}"
        request = _Request(commit, path, files, staged, copies, bad)
        thread = threading.Thread(target=self._run, args=(request,), daemon=True, name="save")
        thread.start()
        self._thread = thread

    def wait_copied(self) -> None:
        """Before the state changes: a save that has begun must have its copy."""
        if self._thread is None:
            return
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._on_host)
        if self._partly_on_host:
            self._copied.wait()

    def settle(self, step: int) -> Saved | None:
        """How the last save ended; waits for it. None where none was begun since.

        A failed save is tried again after a tenth of the interval.

        Raises:
            RuntimeError: the thread of this process has failed in the middle of an exchange with the others.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, outcome = None, self._outcome
        assert outcome is not None
        if outcome.crash:
            raise RuntimeError(outcome.problem) from outcome.crash
        if outcome.problem:
            self.retry_at = step + max(1, self.settings.interval // 10)
        elif not outcome.non_finite:
            self.last_saved = outcome.step
        return outcome

    def too_far(self, step: int) -> bool:
        """Whether more steps are not saved than the configuration allows."""
        return self.settings.interval > 0 and step - self.last_saved >= self._allowed

    def check_unsaved(self, step: int, problem: str) -> None:
        """
        Raises:
            CheckpointError: more steps than allowed would be lost if the run ended now.
        """
        if self.too_far(step):
            allowed = f"checkpoint.max_unsaved_steps allows {self._allowed}"
            unsaved = f"{step - self.last_saved} steps are not saved, and {allowed}: {problem}"
            raise CheckpointError(self.advice(unsaved))

    @property
    def _allowed(self) -> int:
        return self.settings.max_unsaved_steps or 3 * self.settings.interval

    def close(self) -> None:
        """Let a save in progress end, also where the run has failed."""
        if self._thread is not None:
            self._thread.join(CLOSING)

    def load(self, path: Path) -> None:
        """Fill model and optimizer from a checkpoint, in place and whatever layout it was saved on; collective.

        Raises:
            CheckpointError: a file is damaged or a tensor is missing.
        """
        state = self.state()
        held = checkpoint_names(path)
        load_into({key: tensor for key, tensor in state.items() if _of_model(key) or _effects_own(key) in held}, path)
        for key, moment in self._moments():
            set_moment(moment, state[key])

    def state(self) -> dict[str, Tensor]:
        """Every tensor to keep, under its plain name; loads write into these, of which only quantised moments are copies."""
        state = {name: _plain(parameter.detach()) for name, parameter in self.parameters.items()}
        return state | self.ranges | {key: plain_moment(moment) for key, moment in self._moments()}

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{OPTIMIZER_PREFIX}{name}.{key}", value

    # The thread's side

    def _run(self, request: _Request) -> None:
        began, step, path = time.perf_counter(), request.commit.step, request.path
        saved = Saved(step, path)
        try:
            if self._stream is not None:
                torch.cuda.set_device(self.mesh.device)  # a new thread begins on the first one
            non_finite = self._stage(partial(self._copy, request), f"copy step {step}")
            first_bad = min((bad for bad, _ in non_finite if bad >= 0), default=-1)
            if first_bad >= 0:
                saved = replace(saved, non_finite=f"the loss or gradient of step {first_bad} is not finite")
            elif not all(finite for _, finite in non_finite):
                saved = replace(saved, non_finite=f"a weight or optimizer moment after step {step} is not finite")
            else:
                saved = replace(saved, warning=self._write(request))
        except SaveFailed as error:
            saved = replace(saved, problem=str(error))
            if self.mesh.is_main:
                _remove_uncommitted(path)  # its room is what the next try needs
        except Exception as error:  # of this process alone, while the others wait for it: it has to end
            saved = replace(saved, problem=f"could not save step {step} to {path}: {root_cause(error)}", crash=error)
        self._copied.set()
        self._outcome = replace(saved, seconds=time.perf_counter() - began)

    def _copy(self, request: _Request) -> tuple[int, bool]:
        """Wait for the copy in host memory, or make it: the first step that was not finite, and whether all of it is."""
        for host, local in request.copies:
            if not local.is_cuda:
                host.copy_(local)
        self._copied.set()  # of what is on the device, the device itself waits
        if self._stream is not None:
            self._on_host.synchronize()
        hosts = [host for host, _ in request.copies]
        request.copies.clear()  # plain copies of quantised moments are freed
        numbers = [host for host in hosts if host.is_floating_point() and host.numel()]
        largest = torch.stack([number.float() for number in torch._foreach_norm(numbers, ord=float("inf"))])
        return int(request.first_bad_step), bool(torch.isfinite(largest).all())

    def _write(self, request: _Request) -> str:
        """Write, commit, verify, and delete what is no longer kept; what went wrong with the last."""
        path, commit = request.path, request.commit
        step = f"step {commit.step} to {path}"
        self._on_main(lambda: _make_empty(path), f"prepare {path}")
        writers: list[dcp.FileSystemWriter] = []
        kind = FsspecWriter if is_url(path) else dcp.FileSystemWriter
        # What is copied ahead goes through the device's current stream, where the training is; here all is in host memory.
        self._stage(lambda: writers.append(kind(str(path), per_thread_copy_ahead=0)), f"open {path}")
        try:
            dcp.save(request.staged, storage_writer=writers[0], process_group=self.group)
        except CheckpointException as error:
            raise SaveFailed(f"could not save {step}: {root_cause(error)}") from error
        self._stage(lambda: _write_durably(path, request.files), f"save {step}")
        self._on_main(lambda: self._commit(path, commit), f"commit {path}")
        self._on_main(lambda: self._verify(path), f"verify {path}")
        try:
            self._on_main(self._remove_old, f"delete old checkpoints in {self.folder}")
        except SaveFailed as error:
            return str(error)
        return ""

    def _commit(self, path: Path, commit: Commit) -> None:
        files = checkpoint_files.file_sizes(*checkpoint_files.open_folder(str(path)))
        hashes = checkpoint_files.hashes(str(path), SAMPLE)
        replace(commit, files=files, hashes=hashes).write(path)

    def _verify(self, path: Path) -> None:
        """What is not as it was written counts no longer."""
        _forget(path)
        try:
            verify(path)
        except Damaged:
            (path / COMMIT).unlink()
            raise

    def _remove_old(self) -> None:
        steps = {step: path for step, path in committed_steps(self.folder).items() if not _permanent(path)}
        newest_verified = max((step for step, path in steps.items() if is_verified(path)), default=None)
        for step in list(steps)[: -self.settings.keep]:
            if step != newest_verified:
                # The marker goes first: a deletion that is interrupted must not leave something that looks complete.
                (steps[step] / COMMIT).unlink()
                remove_tree(steps[step])

    def _gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values = [None] * self.mesh.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _on_main(self, action: Callable[[], None], what: str) -> None:
        """Run on the main process; its failure is everyone's."""
        self._stage(action if self.mesh.is_main else lambda: None, what)

    def _stage(self, action: Callable[[], Any], what: str) -> list[Any]:
        """Run on every process, and give everyone's result; the failure of one, whatever it is, is everyone's."""
        problem, result = "", None
        try:
            result = action()
        except Exception as error:
            problem = f"could not {what}: {error}"
        found = self._gather((problem, result))
        problems = [problem for problem, _ in found if problem]
        if problems:
            raise SaveFailed(problems[0])
        return [result for _, result in found]

    def advice(self, problem: str) -> str:
        """A problem with what is safe and what to do."""
        last = f"the last complete one is {self.newest()}"
        with suppress(OSError):
            if not is_url(self.folder):
                free = shutil.disk_usage(self.folder if self.folder.exists() else ".").free / 2**30
                last += f"; {free:.1f} GiB are free there"
        return f"{problem}\n  Nothing committed is lost ({last}). Make room or repair the disk, then start the same command."

    def newest(self) -> str:
        """The newest complete checkpoint, in words."""
        try:
            steps = committed_steps(self.folder)
        except Exception as error:  # a storage that is gone has errors of its own
            return f"unknown, {self.folder} cannot be read: {error}"
        return f"step {max(steps)} in {self.folder}" if steps else "none"

    # Between runs

    def without_damaged(self, path: Path, error: Damaged, others_will_do: bool) -> str:
        """Set a damaged checkpoint aside, so that the one before it is taken; collective. What was wrong with it.

        Raises:
            CheckpointError: just this one was asked for.
        """
        self.mesh.gather_objects(None)  # all have read what it says of itself before it is renamed
        if not others_will_do or path.parent != self.folder:
            others = [step for step, other in committed_steps(self.folder).items() if other != path]
            there_are = (
                f"; other complete steps: {', '.join(map(str, others))} (--checkpoint.resume STEP)" if others else ""
            )
            raise CheckpointError(f"{error}{there_are}") from error
        if self.mesh.is_main:
            target = _set_aside(path, "damaged")
            print(f"{error}\n  It is set aside as {target}; trying the one before it.", flush=True)
        self.mesh.broadcast_object(None)  # nobody looks before it is done
        return str(error)

    def remove_torn(self) -> None:
        """Delete what interrupted saves have left."""
        for path in self.folder.glob("step-*"):
            if STEP_FOLDER.fullmatch(path.name) and not (path / COMMIT).exists():
                remove_tree(path, ignore_errors=True)

    def set_aside_after(self, step: int) -> list[Path]:
        """Take checkpoints later than `step` out of the count, so that a run resumed there does not jump to its old future."""
        steps = committed_steps(self.folder)
        return [_set_aside(path, "superseded") for later, path in steps.items() if later > step]


def _set_aside(path: Path, why: str) -> Path:
    """Give a checkpoint a name that does not count."""
    names = (f"{path.name}.{why}{suffix}" for suffix in ["", *(f"-{i}" for i in range(2, 1000))])
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    if not is_url(path):
        return path.rename(target)
    path.fs.mv(path.path, target.path, recursive=True)  # type: ignore[attr-defined]
    return target


def _effects_own(key: str) -> str:
    """The parameter that a tensor of the optimizer belongs to, or the name itself."""
    return key.removeprefix(OPTIMIZER_PREFIX).rpartition(".")[0] if key.startswith(OPTIMIZER_PREFIX) else key


def _of_model(key: str) -> bool:
    """Not what hardware effects track or learn: a clean checkpoint, which has none, begins them anew."""
    return not key.removeprefix(OPTIMIZER_PREFIX).startswith(LEARNED)


def _plain(tensor: Tensor) -> Tensor:
    """A parameter without what a library has wrapped its storage in (torchao, to gather it as float8)."""
    if isinstance(tensor, DTensor) and is_traceable_wrapper_subclass(tensor._local_tensor):
        return distributed_like(tensor._local_tensor._tensor, tensor)
    return tensor


def remove_tree(path: Path, ignore_errors: bool = False) -> None:
    if is_url(path):
        path.fs.rm(path.path, recursive=True)  # type: ignore[attr-defined]
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def _permanent(path: Path) -> bool:
    try:
        return Commit.read(path).permanent
    except CheckpointError:
        return True  # what cannot be read is not ours to delete


def _remove_uncommitted(path: Path) -> None:
    with suppress(Exception):
        if path.exists() and not (path / COMMIT).exists():
            remove_tree(path)


def _make_empty(path: Path) -> None:
    if path.exists():
        (path / COMMIT).unlink(missing_ok=True)
        remove_tree(path)
    path.mkdir(parents=True)


def _write_durably(path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        with (path / name).open("wb") as file:
            file.write(data)
            if not is_url(path):
                file.flush()
                os.fsync(file.fileno())


def _forget(path: Path) -> None:
    """Have the system read a folder's files from the disk again, not from its memory (where it knows how)."""
    if is_url(path) or not hasattr(os, "posix_fadvise"):
        return
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
