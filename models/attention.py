"""Attention as the models use it: which keys a query sees, and the product itself.

A query sees the keys at its own and earlier columns of its row, and, where documents are given, only those of its own
document. Without a mask that is plain causal attention. With one it is FlexAttention on GPU, which skips blocks that are
masked as a whole, and scaled dot-product attention with a dense mask elsewhere: the same numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask: TypeAlias = Tensor | BlockMask

# cuDNN is the fastest on Hopper, flash runs everywhere else; the rest keep odd shapes and the CPU working.
ATTENTION_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(E), over the keys that a query sees) v; each key-value head serves several query heads.

    A module of its own, without parameters, so that context parallelism can bring the other devices' keys and values.

    Args:
        grouped: there are fewer key-value heads than query heads. Given, not read off the tensors: to compiled code that has
            seen several numbers of heads it would not be a constant.
    """

    def __init__(self, grouped: bool):
        super().__init__()
        self.grouped = grouped

    def forward(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Mask | None = None) -> Tensor:
        return self.products(q_BHTE, k_BKSE, v_BKSE, mask)

    def products(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Mask | None) -> Tensor:
        """The two products and the softmax between them, of what is there; hardware effects replace this."""
        if isinstance(mask, BlockMask):
            flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
            return flex(q_BHTE, k_BKSE, v_BKSE, block_mask=mask, enable_gqa=self.grouped)
        with sdpa_kernel(ATTENTION_BACKENDS, set_priority=True):
            return F.scaled_dot_product_attention(
                q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
            )


@cache
def _compiled_flex_attention() -> Any:
    """Uncompiled, FlexAttention writes all scores to memory."""
    return torch.compile(flex_attention, dynamic=False)


def documents_of(tokens_BT: Tensor, bos_id: int) -> Tensor:
    """Number of the document that each token of a packed row belongs to, (B, T) int64: a document begins at its BOS."""
    return (tokens_BT == bos_id).cumsum(1)


def positions_in_documents(documents_BT: Tensor) -> Tensor:
    """Position of each token in its document, (B, T) int64, from the documents' numbers in packed rows."""
    columns = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins = documents_BT[:, 1:] != documents_BT[:, :-1]
    begins = F.pad(begins, (1, 0), value=True)
    return columns - torch.where(begins, columns, 0).cummax(1).values


def attention_mask(
    query_columns: Tensor,
    key_columns: Tensor,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    blocks: bool | None = None,
) -> Mask:
    """Which keys each query sees.

    Args:
        query_columns, key_columns: (T,) and (S,) int64, columns of the row at which queries and keys stand, in any order.
        query_documents, key_documents: (B, T) and (B, S), or None where rows are one document.
        blocks: a block mask for FlexAttention; default on GPU (elsewhere it has no backward).

    Returns:
        The block mask, or (B or 1, 1, T, S) bool.
    """
    if query_columns.is_cuda if blocks is None else blocks:

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            earlier = key_columns[k] <= query_columns[q]
            if query_documents is None or key_documents is None:
                return earlier
            return earlier & (key_documents[b, k] == query_documents[b, q])

        batch = None if query_documents is None else len(query_documents)
        make = _compiled_create_block_mask()
        return make(sees, batch, None, len(query_columns), len(key_columns), device=query_columns.device)
    mask = (key_columns <= query_columns[:, None])[None, None]
    if query_documents is not None and key_documents is not None:
        mask = mask & (key_documents[:, None, None, :] == query_documents[:, None, :, None])
    return mask


@cache
def _compiled_create_block_mask() -> Any:
    """Uncompiled, it evaluates the mask of every pair of positions into memory first."""
    return torch.compile(create_block_mask, dynamic=False)
