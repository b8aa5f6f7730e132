"""One training job from configuration to finished run: checks, data, trainer, and what every error becomes."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from models.hf import shape_from_hf
from models.sizes import LlamaShape, num_parameters
from parallel import mesh as meshes
from parallel.apply import compute_dtype
from parallel.degrees import resolve_degrees
from parallel.float8_layers import choices
from train.checkpoint import CheckpointError, find_checkpoint
from train.config import Config, model_title, named_shape
from train.config_rules import layout_problems, length_problems
from train.config_sources import ConfigError
from train.corpus import DataError, input_files
from train.data import TOO_LITTLE_HELD_OUT, PreparedData, TrainingData, mixture_warnings, open_data
from train.distillation import Teacher, find_teacher
from train.faults import is_broken_exchange
from train.local_paths import refuse_missing
from train.metrics import Recorder
from train.outcome import EXIT_CHECKPOINT, EXIT_INTERRUPTED, EXIT_NON_FINITE, EXIT_OTHER, EXIT_PREEMPTED, EXIT_SETUP
from train.preemption import Preempted, Signals
from train.prepare import prepare, run_tokenizer
from train.redaction import redact
from train.row_counts import RowRecord
from train.run_folder import RunFolder, RunFolderError
from train.tokenizer import CHAT_TEMPLATE, FURTHER_TEMPLATES, Tokenizer, copy_chat_templates
from train.trainer import NonFinite, Trainer
from train.watchdog import Watchdog, group_timeout
from transforms.apply import table


class JobError(Exception):
    """The job cannot start or go on; `code` is the exit code, and `of_peer` whether another process has brought it about."""

    def __init__(self, message: str, code: int, of_peer: bool = False):
        super().__init__(message)
        self.code, self.of_peer = code, of_peer


def run_job(config: Config) -> None:
    """Run a configuration to its end on this process.

    Raises:
        JobError: with the exit code 1 (another process, a disk or the network failed), 2 (cannot start), 3 (non-finite),
            4 (checkpoint could not be saved or loaded), 5 (an exchange with the other processes timed out), or 75 or 130 (asked
            to stop, or interrupted with Ctrl-C; the same command goes on).
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = RunFolder.of(config)
    with Signals() as signals:
        try:
            with _explained(folder, checkpoint_code=EXIT_SETUP):
                meshes.choose_device(config.run.device)
                if rank == 0:
                    _check_before_start(config, folder)
                    folder.lock()
                timeout = group_timeout(config.faults.start_timeout)
                degrees = resolve_degrees(config, world_size)._asdict()
                mesh = meshes.start(config.run.device, timeout, **degrees)
                signals.leave_to_agreements()
            try:
                with (
                    Watchdog(config.faults, folder.faults, rank, world_size) as watchdog,
                    _explained(folder, EXIT_CHECKPOINT, watchdog),
                ):
                    _train(config, mesh, folder, signals, watchdog)
            finally:
                dist.destroy_process_group()
        finally:
            folder.unlock()


@contextmanager
def _explained(folder: RunFolder, checkpoint_code: int, watchdog: Watchdog | None = None) -> Iterator[None]:
    """Turn every error that a user can do something about into a `JobError`."""
    try:
        yield
    except Preempted as stop:
        asked = "interrupted" if stop.code == EXIT_INTERRUPTED else "asked to stop"
        message = str(stop) or f"{asked} before the first step: nothing to save; start the same command again"
        raise JobError(message, stop.code) from stop
    except NonFinite as error:
        raise JobError(str(error), EXIT_NON_FINITE) from error
    except CheckpointError as error:
        # Where a peer died during the save, starting again helps: not an error of the checkpoint.
        of_peer = _peer_ended(error)
        raise JobError(str(error), EXIT_OTHER if of_peer else checkpoint_code, of_peer) from error
    except (ConfigError, DataError, RunFolderError, ValueError) as error:
        raise JobError(str(error), EXIT_SETUP) from error
    except OSError as error:
        # A disk or a network that fails in the middle of training may be there again when the run is started again.
        training = watchdog is not None and watchdog.step is not None
        code = EXIT_OTHER if training or isinstance(error, ConnectionError | TimeoutError) else EXIT_SETUP
        raise JobError(f"{error.filename or folder.path}: {error.strerror or error}", code) from error
    except RuntimeError as error:
        if is_broken_exchange(error):
            said = watchdog.explain(error) if watchdog else ("another process of this run has ended", EXIT_OTHER)
            raise JobError(*said, of_peer=True) from error
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise JobError(
            f"out of memory: {str(error).splitlines()[0]}\n  Try a smaller training.micro_batch_size, "
            'activation_checkpointing.mode = "selective" or "full", or more parallel.shard; '
            "`newcompute plan` estimates the memory.",
            EXIT_SETUP,
        ) from error


def _peer_ended(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that another process has closed its connection."""
    while error is not None:
        if any(text in str(error) for text in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_before_start(config: Config, folder: RunFolder) -> None:
    """What can be refused without a process group: the run folder, the checkpoint to resume, the data (rank 0)."""
    folder.check(config)
    found = find_checkpoint(folder.checkpoints, config.checkpoint.resume)
    if found is None and folder.has_saved and config.checkpoint.interval:
        raise CheckpointError(
            f"{folder.path} has saved before, but {folder.checkpoints} holds no complete checkpoint: is checkpoint.dir right, "
            f"and mounted? To start anew, choose another run.name or remove {folder.saved_file}"
        )
    folder.check_owner()
    _check_data(config)
    if config.distillation.teacher:
        tokenizer = _tokenizer(config)
        find_teacher(config, resolve_shape(config, tokenizer)[0], tokenizer, hf_folder)


def _check_data(config: Config) -> None:
    if config.data.all_sources[0].source == "random":
        return
    if config.data.streaming:
        from train.streaming import Shards

        run_tokenizer(config)
        Shards(config.data.all_sources[0])  # finds the files, or reaches the Hub
        return
    if [source.source for source in config.data.all_sources] == ["embedded"]:
        prepare(config)  # seconds, and the first run needs no other command
    tokenizer = run_tokenizer(config)
    try:
        _, held_out = open_data(config, tokenizer, tokenizer.vocab_size)
    except DataError:
        for source in config.data.all_sources:
            input_files(source)  # where the text itself is not there, that is what to say
        raise
    if config.validation.interval and held_out is not None and held_out.count < 1:
        raise DataError(TOO_LITTLE_HELD_OUT)


def _train(config: Config, mesh: meshes.Mesh, folder: RunFolder, signals: Signals, watchdog: Watchdog) -> None:
    _set_determinism(config, mesh.device)
    if mesh.device.type == "cpu":
        keep_freed_memory()
    tokenizer = _tokenizer(config)
    shape, hf_weights = resolve_shape(config, tokenizer)
    data = _training_data(config, mesh, tokenizer, shape)
    teacher = None
    if config.distillation.teacher:
        files = find_teacher(config, shape, tokenizer, hf_folder)
        # A run that still trains may have saved meanwhile; a folder of the Hub is each node's own.
        files = mesh.broadcast_object(files) if files.is_checkpoint else files
        teacher = Teacher(config, mesh, files)
    trainer = Trainer(config, mesh, shape, tokenizer, data, hf_weights, signals, watchdog.beat, teacher)
    watchdog.beat("load")
    resumed_from = trainer.resume()
    if mesh.is_main:
        # Only now, so that a start which fails leaves a folder that a corrected one may use.
        folder.write_owner()
        for copy in folder.copies:
            copy.write_config(config)
            copy.write_rows(RowRecord(trainer.batches.fingerprint, trainer.batches.counts.stretches))
            if tokenizer is not None:
                tokenizer.save(copy.tokenizer)
                if hf_weights is not None:
                    copy_chat_templates(hf_weights, copy.tokenizer)
        trainer.checkpoints.remove_torn()
        for path in trainer.checkpoints.set_aside_after(trainer.step):
            print(f"set aside {path}: this run goes on from step {trainer.step} (checkpoint.resume says so each time)")
        folder.cut_metrics_after(trainer.step)
    recorder = Recorder(config, folder.path, mesh.is_main, trainer.total_steps, trainer.step + 1)
    try:
        recorder.say(_headline(config, shape, mesh, trainer))
        num_rows = trainer.batches.counts.rows(trainer.last_step)
        for warning in mixture_warnings(config, data.held_out, num_rows) if mesh.is_main else ():
            recorder.say(f"warning: {warning}")
        if config.float8.recipe != "none":
            taken = [c.name for c in choices(shape, config.float8, mesh.tensor.size()) if not c.reason]
            layers = (
                f"{', '.join(taken)} of every block" if taken else "no layer is large enough (newcompute plan says why)"
            )
            recorder.say(f"float8, {config.float8.recipe}: {layers}")
        for line in table(trainer.noise) if trainer.noise is not None else ():
            recorder.say(line)
        if trainer.teacher is not None:
            recorder.say(f"learning from {trainer.teacher}")
        recorder.say(f"resuming from {resumed_from}" if resumed_from else f"starting in {folder.path}")
        if trainer.step >= trainer.last_step:
            recorder.say(f"step {trainer.step} is not before the last one, {trainer.last_step}: nothing to do")
        if not trainer.run(recorder):
            by_hand = trainer.agreement.interrupted
            kind, asked = ("interrupted", "interrupted with Ctrl-C") if by_hand else ("preempted", "asked to stop")
            recorder.event(trainer.step, kind, asked)
            raise Preempted(_after_stop(trainer, asked), EXIT_INTERRUPTED if by_hand else EXIT_PREEMPTED)
        recorder.say(f"finished step {trainer.step} of {trainer.total_steps}: {folder.path}")
    finally:
        recorder.close()


def _tokenizer(config: Config) -> Tokenizer | None:
    return None if config.data.all_sources[0].source == "random" else run_tokenizer(config)


def _after_stop(trainer: Trainer, asked: str) -> str:
    """What a run that was asked to stop leaves behind, and how it goes on."""
    checkpoints = trainer.checkpoints
    if not trainer.config.checkpoint.interval:
        return f"{asked} after step {trainer.step}; nothing is saved, since checkpoint.interval is 0"
    if checkpoints.last_saved != trainer.step or not trainer.step:
        return f"{asked} before the first step: nothing to save; start the same command again"
    return f"{asked}: step {trainer.step} is saved in {checkpoints.folder}, and the same command goes on from there"


def _training_data(config: Config, mesh: meshes.Mesh, tokenizer: Tokenizer | None, shape: LlamaShape) -> TrainingData:
    if config.data.streaming:
        from train.streaming import StreamedData

        assert tokenizer is not None
        return StreamedData.start(config, mesh, tokenizer)
    return PreparedData(*open_data(config, tokenizer, shape.vocab_size, check=False))


def resolve_shape(config: Config, tokenizer: Tokenizer | None) -> tuple[LlamaShape, Path | None]:
    """The architecture of a run, and the folder its initial weights come from.

    Raises:
        ValueError: the tokenizer has ids that the model's vocabulary has not, or the folder holds no Llama.
    """
    if config.model.init_from:
        source = hf_folder(config.model.init_from.removeprefix("hf:"))
        shape = shape_from_hf(source)
    else:
        source = None
        shape = named_shape(config.model, tokenizer.vocab_size if tokenizer else None)
    if tokenizer is not None and tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model's vocabulary is {shape.vocab_size}: use the "
            "model's own tokenizer, or leave model.shape.vocab_size out"
        )
    degrees = resolve_degrees(config, int(os.environ.get("WORLD_SIZE", 1)))
    problems = [*length_problems(config, shape), *layout_problems(config, shape, degrees)]
    if problems:
        raise ConfigError(problems)
    return shape, source


def hf_folder(name: str) -> Path:
    """A local Hugging Face folder, or the downloaded one of a Hub id: JSON, chat templates and the model's safetensors.

    Raises:
        ValueError: neither exists.
    """
    if Path(name).is_dir():
        return Path(name)
    refuse_missing(name)
    from huggingface_hub import snapshot_download

    try:
        weights = ["model.safetensors", "model-?????-of-?????.safetensors"]
        files = [*weights, "*.json", CHAT_TEMPLATE, f"{FURTHER_TEMPLATES}/*"]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:
        raise ValueError(f"{name!r} is neither a folder here nor a model that the Hub gives: {error}") from error


def keep_freed_memory() -> None:
    """Let glibc keep the pages of freed tensors instead of handing them back to the system and getting them anew.

    By default each large tensor is its own mapping, zeroed page by page whenever it is made: with that a step of a 60M
    model takes about 15% longer on two CPU cores (docs/log.md). Elsewhere than on glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not sys.platform.startswith("linux"):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the parameters' numbers in malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 64 << 20)


def _set_determinism(config: Config, device: torch.device) -> None:
    if config.run.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda" and compute_dtype(config, device) != torch.float32:
        torch.set_float32_matmul_precision("high")


def _headline(config: Config, shape: LlamaShape, mesh: meshes.Mesh, trainer: Trainer) -> str:
    degrees = resolve_degrees(config, mesh.world_size)
    precision = f"{config.precision.compute}" if config.precision.compute != "auto" else "automatic precision"
    return (
        f"{redact(' '.join(sys.argv))}\n"
        f"{model_title(config.model)}: "
        f"{num_parameters(shape):,} parameters, {mesh.world_size} x {mesh.device.type} "
        f"({degrees}), {precision}\n"
        f"{trainer.total_steps:,} steps of {config.tokens_per_step:,} tokens "
        f"({config.training.global_batch_size} rows x {config.training.sequence_length}); {trainer.throughput.explanation}"
    )
