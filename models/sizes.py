"""Shapes of every model by name, and what follows from a shape alone: parameter and FLOP counts.

Torch-free, so that `--help`, `plan` and the configuration checks stay fast.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

VOCABULARY_MULTIPLE = 128
"""Embedding and head rows are padded to this multiple: tensor cores want it, and TP degrees then divide it."""


LARGEST_DIM = 1 << 24
LARGEST = {"num_layers": 1 << 12, "max_context": 1 << 31}
"""Beyond these a shape is a mistake, or a damaged file: checks would build a model of it."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's frequency scaling (Llama 3 herd paper, section 3.4.2 and the released reference code).

    Wavelengths longer than `original_context / low_frequency` are stretched by `factor`, those shorter than
    `original_context / high_frequency` are kept, and the band between is interpolated.
    """

    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class LlamaShape:
    """Everything that fixes the architecture; two equal shapes have interchangeable checkpoints."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    head_dim: int = 0
    """0 means dim / num_heads."""
    max_context: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size", "max_context"):
            limit = LARGEST.get(name, LARGEST_DIM)
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} {getattr(self, name)} must be from 1 to {limit}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.dim % self.num_heads:  # transformers asks for it also where head_dim is given
            raise ValueError(f"dim {self.dim} must be a multiple of num_heads {self.num_heads}")
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary embeddings turn pairs of features")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _clm(dim: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn_dim: int, vocab_size: int = 49_152):
    """Compute-optimal language models of NewComputeBench: untied, RoPE base 10,000, cosmo2's vocabulary."""
    return LlamaShape(dim, num_layers, num_heads, num_kv_heads, ffn_dim, vocab_size)


def _llama3(
    dim: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn_dim: int, factor: float = 8.0, tied=False
):
    """Llama 3.1 (factor 8) and 3.2 (factor 32, tied): RoPE base 500,000, context 131,072."""
    return LlamaShape(
        dim, num_layers, num_heads, num_kv_heads, ffn_dim, vocab_size=128_256, max_context=131_072,
        rope_theta=500_000.0, rope_scaling=RopeScaling(factor), tied_embeddings=tied,
    )  # fmt: skip


# dim, layers, heads, KV heads, FFN
SIZES: dict[str, dict[str, LlamaShape]] = {
    "clm": {
        "debug": _clm(128, 4, 4, 2, 384, vocab_size=2048),
        "60M": _clm(384, 22, 6, 2, 1408),
        "200M": _clm(768, 24, 12, 4, 2688),
        "400M": _clm(960, 30, 15, 5, 3328),
        "600M": _clm(1152, 32, 18, 6, 4096),
        "1.1B": _clm(1536, 32, 24, 8, 5376),
    },
    "llama3": {
        "1B": _llama3(2048, 16, 32, 8, 8192, factor=32.0, tied=True),
        "3B": _llama3(3072, 28, 24, 8, 8192, factor=32.0, tied=True),
        "8B": _llama3(4096, 32, 32, 8, 14_336),
        "70B": _llama3(8192, 80, 64, 8, 28_672),
        "405B": _llama3(16_384, 126, 128, 8, 53_248),
    },
}


def with_overrides(shape: LlamaShape, **overrides) -> LlamaShape:
    """`shape` with some fields replaced; None means "as it was". `head_dim` follows dim / num_heads again unless given."""
    given = {key: value for key, value in overrides.items() if value is not None}
    if given and "head_dim" not in given and ("dim" in given or "num_heads" in given):
        given["head_dim"] = 0
    return replace(shape, **given)


def layer_parameters(shape: LlamaShape) -> int:
    """Parameters of one block: q, k, v, o projections, gate, up and down, two norms."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return 2 * shape.dim * queries + 2 * shape.dim * keys + 3 * shape.dim * shape.ffn_dim + 2 * shape.dim


def num_parameters(shape: LlamaShape, padded: bool = False) -> int:
    """All parameters; tied embeddings count once. `padded` counts the vocabulary rows that are really allocated."""
    vocabulary = (shape.padded_vocab_size if padded else shape.vocab_size) * shape.dim
    embeddings = vocabulary if shape.tied_embeddings else 2 * vocabulary
    return embeddings + shape.num_layers * layer_parameters(shape) + shape.dim


def num_parameters_without_embedding(shape: LlamaShape) -> int:
    """Parameters that take part in a matrix product for every token: all but a separate input embedding.

    A tied matrix stays in the count, since it is the output head as well. `training.tokens_per_parameter` and the FLOP
    formula use this number.
    """
    return num_parameters(shape) - (0 if shape.tied_embeddings else shape.vocab_size * shape.dim)


def flops_per_token(shape: LlamaShape, sequence_length: int) -> int:
    """Training FLOPs (forward and backward) per token: 6 N + 12 L H Q T.

    The formula of PaLM (arXiv 2204.02311, appendix B): N counts `num_parameters_without_embedding`, the second term is
    attention's two products, without a discount for the causal mask, as torchtitan and most reports have it.
    """
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim * sequence_length
    return 6 * num_parameters_without_embedding(shape) + attention


FLOPS_FORMULA = "6 * parameters without input embedding + 12 * layers * heads * head_dim * sequence_length"

_PEAK_BF16_FLOPS = {  # dense bf16, vendor data sheets; longest match wins
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "B200": 2250e12,
    "A100": 312e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name in FLOP/s, or None where it is not known (then no MFU is shown)."""
    # Whole words: an A1000 is no A100, and a GB200 has another peak than a B200.
    matches = [name for name in _PEAK_BF16_FLOPS if re.search(rf"\b{name}\b", device_name)]
    return _PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None
