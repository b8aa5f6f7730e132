"""How rows become this device's input: the part of the sequence it holds, documents, positions and masks.

Context parallelism cuts each row into 2 n chunks and gives device r the chunks r and 2 n - 1 - r: causal attention costs a
late query more than an early one, and so all devices have the same work. Queries stay where they are; keys and values are
gathered from all devices before the product, and their gradients summed and scattered back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.attention import CausalAttention, Mask, attention_mask, documents_of, positions_in_documents
from models.loss import inputs_and_targets
from parallel.collectives import gather
from parallel.mesh import Mesh

if TYPE_CHECKING:
    from models.llama import Llama


class ContextAttention(CausalAttention):
    """Attention of this device's queries to the keys of the whole row, which come in the order of the devices."""

    context_group: str

    def forward(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: Mask | None = None) -> Tensor:
        k_BKSE, v_BKSE = gather(torch.stack([k_BKTE, v_BKTE]), 3, self.context_group)
        return super().forward(q_BHTE, k_BKSE, v_BKSE, mask)


def split(model: Llama, mesh: Mesh) -> None:
    """Make every attention of a model see the whole row, in place."""
    assert mesh.context_group is not None
    for module in model.modules():
        if type(module) is CausalAttention:
            module.__class__ = ContextAttention
            module.context_group = mesh.context_group.group_name


def columns_of(rank: int, size: int, length: int) -> Tensor:
    """Columns of a row that device `rank` of `size` holds, (length / size,) int64, in order; 2 * size divides the length."""
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


@dataclass
class Batch:
    """Rows as this device's model takes them."""

    tokens: Tensor
    """(B, T) int64; T is this device's part of the row."""
    targets: Tensor
    """(B, T) int64."""
    documents: Tensor | None
    """(B, length) int64 of the whole row, where attention stays within documents."""

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches."""
        parts = [value.split(rows) for value in (self.tokens, self.targets)]
        documents = self.documents.split(rows) if self.documents is not None else [None] * len(parts[0])
        return [Batch(*part) for part in zip(*parts, documents)]


class Sequences:
    """Turns rows into batches, and says where their tokens stand.

    Args:
        bos_id: token with which documents begin, or None where rows are not cut into documents.
        always_positions: give positions also where they are the columns of a whole row.
        dense_masks: never masks of blocks, which only FlexAttention reads.
    """

    def __init__(
        self, mesh: Mesh, length: int, bos_id: int | None, always_positions: bool = False, dense_masks: bool = False
    ):
        self.blocks = False if dense_masks else None
        self.bos_id = bos_id
        self.whole = mesh.context_size == 1
        self.always_positions = always_positions
        columns = [torch.arange(length)]  # of any length, where no device holds a part
        if not self.whole:
            columns = [columns_of(rank, mesh.context_size, length) for rank in range(mesh.context_size)]
        self.columns = columns[mesh.context_rank].to(mesh.device)
        """Columns of this device's tokens."""
        self.key_columns = torch.cat(columns).to(mesh.device)
        """Columns of the keys that its attention sees."""
        self._mask: Mask | None = None

    def batch(self, rows: Tensor) -> Batch:
        """Rows (B, length + 1) as inputs and targets of this device."""
        tokens, targets = inputs_and_targets(rows)
        documents = None if self.bos_id is None else documents_of(tokens, self.bos_id)
        if not self.whole:
            tokens, targets = tokens[:, self.columns], targets[:, self.columns]
        return Batch(tokens, targets, documents)

    def positions_and_mask(self, documents_BT: Tensor | None, rows: int) -> tuple[Tensor | None, Mask | None]:
        """What the model takes beside tokens; None where the model's own default is right."""
        if documents_BT is None:
            positions = None
            if self.always_positions or not self.whole:
                positions = self.columns.expand(rows, -1)
            if not self.whole and self._mask is None:
                self._mask = attention_mask(self.columns, self.key_columns, blocks=self.blocks)
            return positions, self._mask
        positions = positions_in_documents(documents_BT)[:, self.columns]
        own, keys = documents_BT[:, self.columns], documents_BT[:, self.key_columns]
        return positions, attention_mask(self.columns, self.key_columns, own, keys, self.blocks)
