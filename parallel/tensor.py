"""Tensor parallelism with sequence parallelism and a loss over a split vocabulary.

A pair of matrices is split so that one exchange serves both: of the first each device holds some outputs ("columns"), of
the second the inputs that belong to them ("rows"). Between pairs the residual stream is split along the sequence, and so
are norms. The exchange before a pair gathers the sequence, the one after it sums over devices and scatters (Korthikanti et
al., arXiv 2205.05198, section 4.2.2). Head and embedding are split by vocabulary, and no device ever holds all logits.

Parameters become DTensors, so that FSDP, the optimizer and checkpoints know the whole; activations stay plain tensors.
Each kind of layer is one class, shared by all layers of that kind, put in place of the model's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from models.llama import MLP, TENSOR_PARALLEL_PLAN, Attention, Head
from models.loss import IGNORE
from parallel.collectives import gather, largest_over, reduce_scatter, sum_over

if TYPE_CHECKING:
    from models.llama import Llama

SEQUENCE = 1
"""Dimension of an activation (B, T, D) that is split between pairs of matrices."""


def local(parameter: Tensor, partial: bool = False) -> Tensor:
    """This device's part of a parameter as a plain tensor.

    Args:
        partial: each device computes a part of the gradient of a parameter that all of them hold.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial()] if partial else None)


class GatheredAttention(Attention):
    """Attention of some heads: x (B, T / n, D) -> (B, T / n, D); the sequence is gathered once for q, k and v."""

    tensor_group: str

    def forward(self, x_BTD: Tensor, *rest: Any) -> Tensor:
        return super().forward(gather(x_BTD, SEQUENCE, self.tensor_group), *rest)


class GatheredMLP(MLP):
    """Some of the hidden features: x (B, T / n, D) -> (B, T / n, D)."""

    tensor_group: str

    def forward(self, x_BTD: Tensor) -> Tensor:
        return super().forward(gather(x_BTD, SEQUENCE, self.tensor_group))


class SplitLinear(nn.Linear):
    """A linear layer of which each device holds a part of the weight; `multiply` is the product with that part."""

    tensor_group: str
    tensor_rank: int

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.multiply(x))

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight))

    def leave(self, y: Tensor) -> Tensor:
        return y


class ColumnLinear(SplitLinear):
    """Some of the outputs: x (B, T, in) -> (B, T, out / n)."""


class RowLinear(SplitLinear):
    """Some of the inputs, summed over devices: x (B, T, in / n) -> (B, T / n, out)."""

    def leave(self, y: Tensor) -> Tensor:
        return reduce_scatter(y, SEQUENCE, self.tensor_group)


class SequenceNorm(nn.RMSNorm):
    """A norm of this device's part of the sequence; every device holds the whole weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, local(self.weight, partial=True), self.eps)


class VocabularyEmbedding(nn.Embedding):
    """Some rows of the embedding: tokens (B, T) -> (B, T / n, D)."""

    tensor_group: str
    tensor_rank: int

    def forward(self, tokens_BT: Tensor) -> Tensor:
        weight = local(self.weight)
        index = tokens_BT - self.tensor_rank * len(weight)
        elsewhere = (index < 0) | (index >= len(weight))
        rows = F.embedding(index.masked_fill(elsewhere, 0), weight)
        return reduce_scatter(rows.masked_fill(elsewhere[..., None], 0), SEQUENCE, self.tensor_group)


class VocabularyHead(Head):
    """Some rows of the output matrix: hidden states (B, T / n, D) and targets (B, T) -> the loss, equal on all devices."""

    tensor_group: str
    tensor_rank: int

    def forward(self, h_BTD: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        return super().forward(gather(h_BTD, SEQUENCE, self.tensor_group), targets_BT)

    def multiply(self, h_BTD: Tensor) -> Tensor:
        return F.linear(h_BTD, local(self.weight))

    def logits(self, h_BTD: Tensor) -> Tensor:
        return gather(self.multiply(h_BTD), 2, self.tensor_group)[..., : self.vocab_size]

    def loss_sum(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """As `next_token_loss_sum`, by three sums of a number per token over devices, none of them in the backward."""
        group = self.tensor_group
        logits = self.multiply(h_BTD).float()
        first = self.tensor_rank * logits.shape[-1]
        if first + logits.shape[-1] > self.vocab_size:  # padding of the vocabulary; a device may hold nothing else
            column = torch.arange(logits.shape[-1], device=logits.device)
            logits = logits.masked_fill(column >= self.vocab_size - first, -1e30)
        top = largest_over(logits.amax(-1), group)
        total = sum_over((logits - top[..., None]).exp().sum(-1), group)
        index = targets_BT - first
        elsewhere = (index < 0) | (index >= logits.shape[-1])
        of_target = logits.gather(-1, index.masked_fill(elsewhere, 0)[..., None]).squeeze(-1)
        of_target = sum_over(of_target.masked_fill(elsewhere, 0), group)
        losses = total.log() + top - of_target
        return losses.masked_fill(targets_BT == IGNORE, 0).sum()


_CLASSES: dict[str, tuple[type, Placement]] = {
    "columns": (ColumnLinear, Shard(0)),
    "rows": (RowLinear, Shard(1)),
    "sequence": (SequenceNorm, Replicate()),
}
_VOCABULARY: dict[type, type] = {nn.Embedding: VocabularyEmbedding, Head: VocabularyHead}
_GATHERED: dict[type, type] = {Attention: GatheredAttention, MLP: GatheredMLP}


def split(model: Llama, mesh: DeviceMesh) -> None:
    """Spread a model over a one-dimensional mesh, in place, as the plan beside the model says."""
    if model.shape.tied_embeddings:
        embedding = model.model.embed_tokens
        assert embedding is not None
        tied = _part(embedding.weight, mesh, Shard(0))
    for name, module in model.named_modules():
        kind = next((kind for end, kind in TENSOR_PARALLEL_PLAN.items() if name.endswith(end)), None)
        if kind is None:
            continue
        module.tensor_group, module.tensor_rank = mesh.get_group().group_name, mesh.get_local_rank()
        if kind == "gathered":
            module.__class__ = _GATHERED[type(module)]
            if isinstance(module, Attention):
                heads = module.q_proj.out_features // module.head_dim
                module.attend.first_head = mesh.get_local_rank() * heads // mesh.size()
            continue
        if kind == "vocabulary":
            module.__class__, placement = _VOCABULARY[type(module)], Shard(0)
        else:
            module.__class__, placement = _CLASSES[kind]
        shared = kind == "vocabulary" and model.shape.tied_embeddings
        module.weight = tied if shared else _part(module.weight, mesh, placement)


def _part(weight: Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(weight.detach(), mesh, [placement], src_data_rank=None))
