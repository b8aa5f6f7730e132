"""Distillation: the model learns the probabilities of a trained one beside the text.

    loss = (1 - w) CE(text) + w T^2 KL(teacher || student),  both models' logits divided by T before their softmax

(Hinton et al., arXiv 1503.02531, section 2; for noisy hardware Analog Foundation Models, arXiv 2505.09663.) T^2 keeps the
teacher's gradients as large as those of T = 1. Both terms are sums over valid tokens, divided by those of the global batch.

The teacher runs clean and without gradients, in the compute type and sharded as the model is; after each forward its
gathered weights are freed. Its logits come first, so that they are all that is left of it while the student runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.hf import HFWeights, check_names, shape_from_hf
from models.loss import IGNORE, next_token_loss_sum
from models.sizes import LlamaShape, num_parameters
from parallel import apply as parallelize
from parallel.init import load_weights
from parallel.mesh import Mesh
from parallel.names import named_parameters
from train.checkpoint import CheckpointError, load_into
from train.config import Config
from train.export import open_trained, provenance
from train.model import build_model
from train.run_folder import RunFolderError
from train.tokenizer import Tokenizer, difference
from transforms.specs import adds_norms


@dataclass(frozen=True)
class TeacherFiles:
    """Where a teacher's weights lie: a checkpoint of a run, or a Hugging Face folder."""

    path: Path
    shape: LlamaShape
    is_checkpoint: bool


def find_teacher(
    config: Config, shape: LlamaShape, tokenizer: Tokenizer | None, hf_folder: Callable[[str], Path]
) -> TeacherFiles:
    """What `distillation.teacher` means, checked against the model that is to learn from it; no weights are read.

    Args:
        shape: of the student.
        hf_folder: the local folder of a Hugging Face name.

    Raises:
        ValueError: there is no such model, it has another vocabulary or tokenizer, or it cannot read rows as long as these.
    """
    name = config.distillation.teacher
    if name.startswith("hf:"):
        folder = hf_folder(name.removeprefix("hf:"))
        found = TeacherFiles(folder, shape_from_hf(folder), is_checkpoint=False)
        noted = provenance(folder)
        context, fingerprint = noted.get("sequence_length", found.shape.max_context), noted.get("tokenizer", "")
        has_norms = adds_norms(noted.get("transforms", []))
    else:
        try:
            trained = open_trained(Path(name))
        except (CheckpointError, RunFolderError) as error:
            raise ValueError(
                f'distillation.teacher = "{name}": {error}; a Hugging Face folder is "hf:FOLDER"'
            ) from error
        if trained.commit.adapters:
            raise ValueError(
                f'distillation.teacher = "{name}" has adapters beside its weights: export it, which merges them, and name '
                'the folder as "hf:FOLDER"'
            )
        found = TeacherFiles(trained.checkpoint, trained.shape, is_checkpoint=True)
        context, fingerprint = trained.context, trained.commit.tokenizer
        has_norms = adds_norms(trained.config.transforms)
    if has_norms:
        raise ValueError(
            f'distillation.teacher = "{name}" was trained with norms before its layers (norm = true), which a teacher, being '
            "clean, is without: choose one that was trained without them"
        )
    if found.shape.vocab_size != shape.vocab_size:
        raise ValueError(
            f'distillation.teacher = "{name}" has a vocabulary of {found.shape.vocab_size} tokens, this run\'s model has '
            f"{shape.vocab_size}: both must be trained with the same tokenizer"
        )
    if fingerprint and tokenizer is not None and (what := difference(fingerprint, tokenizer.fingerprint)):
        raise ValueError(
            f'distillation.teacher = "{name}" was trained with {what}: its probabilities are of other tokens'
        )
    if context < config.training.sequence_length:
        raise ValueError(
            f'distillation.teacher = "{name}" reads rows of at most {context} tokens, this run\'s have '
            f"{config.training.sequence_length}: shorten training.sequence_length, or choose another teacher"
        )
    return found


class Teacher:
    """A trained model that this process holds its part of; collective, like everything of a model.

    Build it before the student: options of the compiler that are global are then the student's.
    """

    def __init__(self, config: Config, mesh: Mesh, files: TeacherFiles):
        self.files = files
        self.weight, self.temperature = config.distillation.weight, config.distillation.temperature
        dtype = parallelize.compute_dtype(config, mesh.device)
        built = build_model(_clean(config), mesh, files.shape, frozen=dtype)
        (self.model,) = built.parts
        _load(built.parts, files)
        self.model.eval()
        # FSDP says so of every model whose logits are handed on without the vocabulary's padding; nothing writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._losses: Callable[..., tuple[Tensor, Tensor]] = distillation_losses
        if config.compile.enabled:
            self._losses = torch.compile(distillation_losses, fullgraph=True, backend=config.compile.backend)

    def __str__(self) -> str:
        size = f"{num_parameters(self.files.shape):,} parameters"
        return f"{self.files.path}: {size}, weight {self.weight:g}, temperature {self.temperature:g}"

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor, positions_BT: Tensor | None, mask: Any) -> Tensor:
        """Logits (B, T, V) in the compute type, of tokens that stand where `Sequences.positions_and_mask` says."""
        logits = self.model(tokens_BT, None, positions_BT, mask)
        parallelize.reshard(self.model)
        return logits

    def objective(self, student_BTV: Tensor, taught_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """What to differentiate, and without gradient the two losses it consists of, (2,); sums over valid tokens, nats."""
        text, teacher = self._losses(student_BTV, taught_BTV, targets_BT, self.temperature)
        return (1 - self.weight) * text + self.weight * teacher, torch.stack([text, teacher]).detach()


def distillation_losses(
    student_BTV: Tensor, teacher_BTV: Tensor, targets_BT: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the targets, and T^2 KL(teacher || student) at temperature T, each summed over valid targets.

    In float32 nats; two scalars.
    """
    student = F.log_softmax(student_BTV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BTV.float() / temperature, dim=-1)
    divergence_BT = (teacher.exp() * (teacher - student)).sum(-1)
    divergence = divergence_BT.masked_fill(targets_BT == IGNORE, 0).sum()
    return next_token_loss_sum(student_BTV, targets_BT), temperature**2 * divergence


def _clean(config: Config) -> Config:
    """The run's configuration as far as a model that is only read is concerned: no effects, nothing kept for a backward.

    Blocks free their gathered weights at once, whatever the student's do: no backward comes for them. CUDA graphs would
    keep the logits in memory of their own, which the next replay overwrites.
    """
    changes: dict[str, Any] = {
        "transforms": [],
        "float8": config.float8.model_copy(update={"recipe": "none"}),
        "activation_checkpointing": config.activation_checkpointing.model_copy(update={"mode": "none"}),
        "compile": config.compile.model_copy(update={"cuda_graphs": False}),
        "parallel": config.parallel.model_copy(update={"reshard_after_forward": True}),
    }
    return config.model_copy(update=changes)


def _load(parts: list[Any], files: TeacherFiles) -> None:
    parameters = dict(named_parameters(*parts))
    if not files.is_checkpoint:
        weights = HFWeights(files.path)
        check_names(weights, {name: p.shape for name, p in parameters.items()}, files.shape)
        load_weights(parts, weights.read)
        return
    load_into({name: parameter.detach() for name, parameter in parameters.items()}, files.path)
