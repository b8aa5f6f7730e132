"""From a run's checkpoint to a Hugging Face folder, or to tensors in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.hf import SHARD_BYTES, hf_config, strip_padding, write_json, write_safetensors
from models.sizes import LlamaShape, num_parameters
from parallel.init import ADAPTERS, of_model
from parallel.names import LEARNED
from train import read_back
from train.checkpoint import COMMIT, CheckpointError, Commit, checkpoint_names, committed_steps, read_tensors
from train.config import Config
from train.row_counts import tokens_trained
from train.run_folder import opened
from train.tokenizer import Tokenizer, copy_chat_templates, difference, load_tokenizer
from transforms.lora import merge
from transforms.specs import LoraSpec

PROVENANCE = "newcompute.json"
RANGES = "transforms.safetensors"
"""File of an export with the ranges of hardware converters, where the run has some."""


@dataclass(frozen=True)
class TrainedModel:
    """A committed checkpoint with all that is needed to use it."""

    checkpoint: Path
    config: Config
    commit: Commit
    shape: LlamaShape
    tokenizer: Tokenizer | None
    """None where the run trained on random tokens."""
    tokenizer_folder: Path
    """Where its files are, and the chat templates that came with it."""

    @property
    def context(self) -> int:
        """Longest sequence the model has seen in training."""
        return self.config.training.sequence_length

    @property
    def max_context(self) -> int:
        """Longest sequence that an export declares: that of the shape, or the one in training where it was longer."""
        return max(self.shape.max_context, self.context)

    def hf_config(self, dtype: str) -> dict:
        bos, eos = None, []
        if self.tokenizer is not None:
            bos = self.tokenizer.bos_id
            # Documents follow each other behind a boundary token, so that token also ends a text.
            eos = [i for i in dict.fromkeys([self.tokenizer.eos_id, bos]) if i is not None]
        return hf_config(replace(self.shape, max_context=self.max_context), bos, eos, dtype)

    @cached_property
    def sizes(self) -> dict[str, torch.Size]:
        """Shapes of the checkpoint's tensors, padding of the vocabulary included."""
        return checkpoint_names(self.checkpoint)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, float32, padding stripped, under Hugging Face names; adapters are merged into theirs."""
        tensors = self.read([name for name in self.sizes if of_model(name)])
        return {name: strip_padding(name, tensor, self.shape).clone() for name, tensor in tensors.items()}

    def ranges(self) -> dict[str, Tensor]:
        """What hardware effects tracked and learned, float32, by name."""
        learned = {name: size for name, size in self.sizes.items() if name.startswith(LEARNED)}
        return read_tensors(self.checkpoint, learned) if learned else {}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Some weights, float32, with the vocabulary's padding; adapters are merged into theirs."""
        sizes = self.sizes
        layers = [name.removesuffix("weight") for name in names]
        adapters = [layer + adapter for layer in layers for adapter in ADAPTERS if layer + adapter in sizes]
        tensors = read_tensors(self.checkpoint, {name: sizes[name] for name in [*names, *adapters]})
        for spec in self.config.transforms:
            if isinstance(spec, LoraSpec):
                return merge(tensors, spec.rank, spec.alpha)
        return tensors


def is_run_or_checkpoint(path: Path) -> bool:
    return (path / COMMIT).exists() or (path / "config.toml").exists()


def open_trained(path: Path, step: int | None = None) -> TrainedModel:
    """A run folder (its latest complete step, or `step`) or one of its checkpoint folders.

    Raises:
        CheckpointError, RunFolderError: there is no such run or step, or it cannot be read.
    """
    folder = opened(path)
    if (path / COMMIT).exists():
        checkpoint = path
    else:
        if not folder.config_file.exists():
            raise CheckpointError(f"{path} is neither a run folder (no config.toml) nor a checkpoint (no {COMMIT})")
        steps = committed_steps(folder.checkpoints)
        wanted = max(steps, default=None) if step is None else step
        if wanted not in steps:
            what = "no complete checkpoint" if step is None else f"no complete step {step}"
            raise CheckpointError(
                f"{path} has {what} in {folder.checkpoints}; complete steps: {', '.join(map(str, steps)) or 'none'}"
            )
        checkpoint = steps[wanted]
    config, commit = folder.read_config(), Commit.read(checkpoint)
    tokenizer = load_tokenizer(config.tokenizer.kind, str(folder.tokenizer)) if commit.tokenizer else None
    if tokenizer is not None and (what := difference(commit.tokenizer, tokenizer.fingerprint)):
        raise CheckpointError(
            f"{folder.tokenizer} holds {what} than {checkpoint} was trained with: put the files of its training back"
        )
    return TrainedModel(checkpoint, config, commit, commit.llama_shape(), tokenizer, folder.tokenizer)


def export(model: TrainedModel, out: Path, dtype: str = "float32") -> None:
    """Write a Hugging Face folder: weights, config.json, generation_config.json, tokenizer, and where it came from.

    transformers reads it back before it becomes `out` (`train/read_back.py`).

    Raises:
        ReadBackError: what transformers reads is not the model of the training, or not its tokenizer.
        ValueError: `out` holds something that is no export of ours.
    """
    stored = getattr(torch, dtype)
    with export_folder(out) as folder:
        describe(model, folder, dtype)
        write_safetensors(folder, _groups(model), model.shape, stored)
        ranges = model.ranges()
        if ranges:
            save_file(ranges, folder / RANGES)
        if model.tokenizer is not None:
            read_back.check_tokenizer(read_back.load_tokenizer(folder), model.tokenizer)

        def rounded(names: list[str]) -> dict[str, Tensor]:
            return {name: tensor.to(stored).float() for name, tensor in model.read(names).items()}

        read_back.check_llama(folder, replace(model.shape, max_context=model.max_context), rounded)


@contextmanager
def export_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` by a rename once it is whole.

    An earlier export there is replaced, anything else is not.

    Raises:
        ValueError: `out` holds something that is no export of ours.
    """
    if out.exists() and any(out.iterdir()) and not (out / PROVENANCE).exists():
        raise ValueError(f"{out} is not empty and was not written by `newcompute export`: choose another --out")
    partial = out.with_name(f".{out.name}.export")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # Renamed first: removing takes time, and a half removed export would still look like one.
    earlier = out.with_name(f".{out.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if out.exists():
        os.rename(out, earlier)
    os.rename(partial, out)
    shutil.rmtree(earlier, ignore_errors=True)


def describe(model: TrainedModel, folder: Path, dtype: str) -> None:
    """Write all of an export but the weights."""
    config = model.hf_config(dtype)
    write_json(folder / "config.json", config)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "do_sample": False}
    write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    if model.tokenizer is not None:
        model.tokenizer.save_hf(folder)
        _limit_length(folder / "tokenizer_config.json", model.max_context)
        copy_chat_templates(model.tokenizer_folder, folder)
    provenance = {
        "run": model.config.run.name,
        "step": model.commit.step,
        "parameters": num_parameters(model.shape),
        "tokens": tokens_trained(model.commit.data, model.commit.step, model.config.training.sequence_length),
        "transforms": [spec.model_dump(exclude_none=True) for spec in model.config.transforms],
        "noise_seed": model.config.noise_seed,
        "tokenizer": model.commit.tokenizer,
        "sequence_length": model.context,
    }
    write_json(folder / PROVENANCE, provenance)


def provenance(folder: Path) -> dict[str, Any]:
    """What an export notes of where it comes from; empty for a folder that is no export.

    Raises:
        ValueError: the note cannot be read.
    """
    file = folder / PROVENANCE
    try:
        noted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(noted, dict):
        raise ValueError(f"{file} cannot be read: expected a JSON object")
    return noted


def _groups(model: TrainedModel) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's tensors in groups of one file's size, so that no more than that is in memory."""
    sizes = model.sizes
    names = [name for name in sizes if of_model(name)]
    layers = {name.removesuffix("weight") for name in names}
    left = sorted(n for n in sizes if n.endswith(ADAPTERS) and n.removesuffix(n.rpartition(".")[2]) not in layers)
    if left:
        raise CheckpointError(f"{model.checkpoint} has adapters without a weight: {', '.join(left)}")
    group: list[str] = []
    for name in names:
        if group and 4 * sum(sizes[n].numel() for n in [*group, name]) > SHARD_BYTES:
            yield model.read(group)
            group = []
        group.append(name)
    yield model.read(group)


def _limit_length(file: Path, context: int) -> None:
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    write_json(file, settings | {"model_max_length": context})
