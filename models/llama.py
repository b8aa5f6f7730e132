"""Llama 3 as plain single-device PyTorch.

Module names are Hugging Face's, so that a checkpoint, an export and a transformers model name every weight alike, and
rotary embeddings use Hugging Face's half-split layout, so that no permutation stands between them. Nothing here knows of
devices, sharding, compilation or hardware effects: those are applied from outside (`parallel/apply.py`).

Shapes are written with B batch, T sequence, D model width, H query heads, K key-value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import CausalAttention, Mask
from models.loss import next_token_loss_sum
from models.sizes import LlamaShape

TENSOR_PARALLEL_PLAN = {
    "model.embed_tokens": "vocabulary",
    "input_layernorm": "sequence",
    "self_attn": "gathered",
    "self_attn.q_proj": "columns",
    "self_attn.k_proj": "columns",
    "self_attn.v_proj": "columns",
    "self_attn.o_proj": "rows",
    "post_attention_layernorm": "sequence",
    "mlp": "gathered",
    "mlp.gate_proj": "columns",
    "mlp.up_proj": "columns",
    "mlp.down_proj": "rows",
    "model.norm": "sequence",
    "lm_head": "vocabulary",
}
"""How each module, by the end of its name, is spread over tensor-parallel devices (parallel/tensor.py): outputs of a matrix
("columns") and then its partner's inputs ("rows"), so that a pair needs one exchange before and one after; between pairs
the residual stream is split along the sequence."""


def rope_frequencies(shape: LlamaShape) -> Tensor:
    """Angle per position of each feature pair, (E/2,) float32: theta^(-2i/E), stretched as Llama 3.1 does.

    Computed in float32 like transformers does: at position 100,000 a float64 table would differ in the third digit.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    frequencies = 1.0 / (shape.rope_theta**exponents)
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    longest = scaling.original_context / scaling.low_frequency
    shortest = scaling.original_context / scaling.high_frequency
    stretched = frequencies / scaling.factor
    smooth = (scaling.original_context / wavelengths - scaling.low_frequency) / (
        scaling.high_frequency - scaling.low_frequency
    )
    between = (1 - smooth) * stretched + smooth * frequencies
    scaled = torch.where(wavelengths > longest, stretched, frequencies)
    return torch.where((wavelengths <= longest) & (wavelengths >= shortest), between, scaled)


def rope_table(shape: LlamaShape, context: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, two float32 tensors (context, E): both halves of a head turn alike."""
    angles = torch.outer(torch.arange(context).float(), rope_frequencies(shape))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn feature i together with feature i + E/2 (half-split layout), in float32, returned in the input's dtype."""
    x = x_BHTE.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BHTE.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention: each of K key-value heads serves H / K query heads."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.dim, shape.num_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.dim, shape.num_kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.dim, shape.num_kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, shape.dim, bias=False)
        self.attend = CausalAttention(grouped=shape.num_kv_heads != shape.num_heads)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None = None) -> Tensor:
        def heads(projected: Tensor) -> Tensor:  # (B, T, heads * E) -> (B, heads, T, E)
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q = rotate(heads(self.q_proj(x_BTD)), cos, sin)
        k = rotate(heads(self.k_proj(x_BTD)), cos, sin)
        v = heads(self.v_proj(x_BTD))
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.up_proj = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.down_proj = nn.Linear(shape.ffn_dim, shape.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None = None) -> Tensor:
        h = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, mask)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: tokens (B, T) -> hidden states (B, T, D).

    A stage of a pipeline has some of the blocks, and None in place of an embedding or norm that other stages hold; its
    input are then the hidden states of the stage before.
    """

    def __init__(self, shape: LlamaShape, context: int):
        super().__init__()
        self.embed_tokens: nn.Module | None = nn.Embedding(shape.padded_vocab_size, shape.dim)
        # String keys, so that a pipeline stage can hold any subset of layers under their own names.
        self.layers = nn.ModuleDict({str(i): Block(shape) for i in range(shape.num_layers)})
        self.norm: nn.Module | None = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.register_buffer("rope_cos", torch.empty(context, shape.head_dim), persistent=False)
        self.register_buffer("rope_sin", torch.empty(context, shape.head_dim), persistent=False)

    def forward(self, x: Tensor, positions_BT: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        if positions_BT is None:
            cos, sin = self.rope_cos[: x.shape[1]], self.rope_sin[: x.shape[1]]
        else:
            cos, sin = self.rope_cos[positions_BT].unsqueeze(1), self.rope_sin[positions_BT].unsqueeze(1)
        h = x if self.embed_tokens is None else self.embed_tokens(x)
        for block in self.layers.values():
            h = block(h, cos, sin, mask)
        return h if self.norm is None else self.norm(h)


class Head(nn.Linear):
    """Output matrix: hidden states (B, T, D) -> logits (B, T, V), or with targets (B, T) the loss summed over them.

    One module, so that product and cross-entropy compile as one and the logits need not be written twice. With
    `chunk_tokens` the loss takes that many tokens at a time and computes their logits again in the backward: a third
    more work for the head, and memory for the logits of one chunk only.
    """

    def __init__(self, shape: LlamaShape):
        super().__init__(shape.dim, shape.padded_vocab_size, bias=False)
        self.vocab_size, self.chunk_tokens = shape.vocab_size, 0

    def forward(self, h_BTD: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        if targets_BT is None:
            return self.logits(h_BTD)
        if not self.chunk_tokens or targets_BT.numel() <= self.chunk_tokens:
            return self.loss_sum(h_BTD, targets_BT)
        hidden = h_BTD.reshape(1, -1, h_BTD.shape[-1]).split(self.chunk_tokens, dim=1)
        targets = targets_BT.reshape(1, -1).split(self.chunk_tokens, dim=1)
        parts = [checkpoint(self.loss_sum, h, t, use_reentrant=False) for h, t in zip(hidden, targets)]
        return torch.stack(parts).sum()

    def logits(self, h_BTD: Tensor) -> Tensor:
        """Without the padding of the vocabulary."""
        return self.multiply(h_BTD)[..., : self.vocab_size]

    def loss_sum(self, h_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        return next_token_loss_sum(self.logits(h_BTD), targets_BT)

    def multiply(self, h_BTD: Tensor) -> Tensor:
        return F.linear(h_BTD, self.weight)


class Llama(nn.Module):
    """A causal language model: tokens (B, T) int64 -> logits (B, T, V), in the dtype of the weights.

    The vocabulary is padded inside to a multiple of 128; logits, losses and exports never show the padding.

    Args:
        shape: the architecture.
        context: longest sequence that `forward` will see (length of the rotary table); default the shape's own.
    """

    def __init__(self, shape: LlamaShape, context: int = 0):
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape, context or shape.max_context)
        self.lm_head: Head | None = Head(shape)
        self.reset_after_to_empty()

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        """Logits, or with targets the sum of their losses in nats, float32.

        Args:
            tokens_BT: or hidden states, in a later stage of a pipeline; a stage without head returns hidden states.
            targets_BT: next tokens; `loss.IGNORE` counts for nothing.
            positions_BT: for the rotary embedding; default the columns 0 to T - 1.
            mask: which keys a query sees (`attention.attention_mask`); default those at its own and earlier columns.
        """
        h = self.model(tokens_BT, positions_BT, mask)
        return h if self.lm_head is None else self.lm_head(h, targets_BT)

    @torch.no_grad()
    def reset_after_to_empty(self) -> None:
        """Restore what `to_empty` loses: the rotary table (a buffer that no checkpoint holds) and weight tying."""
        if self.shape.tied_embeddings and self.lm_head is not None and self.model.embed_tokens is not None:
            self.lm_head.weight = self.model.embed_tokens.weight
        if not self.model.rope_cos.is_meta:
            cos, sin = rope_table(self.shape, self.model.rope_cos.shape[0])
            self.model.rope_cos.copy_(cos)
            self.model.rope_sin.copy_(sin)

    def initial_std(self, name: str) -> float | None:
        """Standard deviation of a parameter's initial truncated normal; None for norms, which start at 1.

        0.02 everywhere, and the two matrices that write into the residual stream are scaled by 1/sqrt(2 layers), so that
        the stream's variance does not grow with depth (GPT-2 report, section 2.3).
        """
        if "norm" in name:
            return None
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return 0.02 / math.sqrt(2 * self.shape.num_layers)
        return 0.02

    def is_vocabulary(self, name: str) -> bool:
        """Whether dim 0 of this parameter is the vocabulary, padding included."""
        return name in ("model.embed_tokens.weight", "lm_head.weight")
