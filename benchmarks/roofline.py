"""The fastest that a training step can be on one H100, per token, from the bytes and FLOPs of each of its kernels.

    python benchmarks/roofline.py        a table of all sizes that `benchmarks/gpu.py` measures

A matmul takes as long as its FLOPs or its bytes do, whichever is more; an elementwise kernel takes as long as its bytes;
fused attention as long as its FLOPs. The kernels are those that Inductor makes of a block today: separate matmuls for q, k,
v and for gate and up (`fused` counts them merged), and one elementwise kernel for each norm with its residual sum, rotary
embedding, and SiLU with its product. Not counted: the optimizer, gradient clipping and the weights' casts, which go with
parameters and not with tokens (44 bytes for each parameter are 1% of a step of 98,304 tokens at 60M and 2% of one of 65,536 at
1.1B), launches, and the host. What is reached is always less.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

from models.sizes import SIZES, LlamaShape, flops_per_token, peak_flops  # noqa: E402

H100 = "NVIDIA H100 80GB HBM3"
"""The device of all figures here, by the name that its driver gives."""
TARGET = 0.85
"""Part of the roofline that the trainer is to reach."""
BFLOAT16 = 2  # bytes


@dataclass(frozen=True)
class Rates:
    """What one H100 SXM does on large, well-shaped work; `gpu_smoke.py` measures the same on the machine at hand."""

    copy: float = 2.8e12
    """Bytes per second, read and written. A copy of 4 GiB moved 3.0e12."""
    matmul: float = 650e12
    """FLOP/s in bfloat16. 8192 x 8192 x 8192 reached 798e12; the matmuls here have short inner or outer dimensions."""
    attention_forward: float = 400e12
    """FLOP/s of the half of the scores that a causal mask keeps, heads of 64."""
    attention_backward: float = 330e12


@dataclass(frozen=True)
class Roofline:
    """Seconds per token, by kind of kernel."""

    matmul: float
    elementwise: float
    attention: float
    head: float

    @property
    def seconds(self) -> float:
        return self.matmul + self.elementwise + self.attention + self.head

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds


def roofline(shape: LlamaShape, sequence_length: int, fused: bool = False, rates: Rates | None = None) -> Roofline:
    """The roofline of forward and backward in bfloat16.

    Args:
        shape: the model; D is its width, F of its feed-forward layer, Q and K of queries and keys, V the padded vocabulary.
        sequence_length: T, tokens per row.
        fused: one matmul for q, k and v, and one for gate and up.
        rates: of the device; default an H100 SXM.
    """
    rates = rates or Rates()
    D, F, V = shape.dim, shape.ffn_dim, shape.padded_vocab_size
    Q, K = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

    def memory(numbers: int) -> float:
        return BFLOAT16 * numbers / rates.copy

    def matmul(inputs: int, outputs: int) -> float:
        return max(2 * inputs * outputs / rates.matmul, memory(inputs + outputs))

    into = [Q + 2 * K] if fused else [Q, K, K]
    up = [2 * F] if fused else [F, F]
    pairs = [*((D, out) for out in into), (Q, D), *((D, out) for out in up), (F, D)]
    # A backward has two matmuls of the same size: the gradient of the input, and that of the weight.
    matmuls = sum(3 * matmul(inputs, outputs) for inputs, outputs in pairs)
    # Read and written by: norm, rotary embedding, sum and norm, SiLU and product, sum.
    forward = memory(2 * D) + memory(2 * (Q + K)) + memory(4 * D) + memory(3 * F) + memory(3 * D)
    # SiLU and product (reads the gradient, gate, up; writes two), both norms with their sums, rotary embedding.
    backward = memory(5 * F) + 2 * memory(5 * D) + memory(2 * (Q + K))
    if not fused:  # gradients of the input from three and from two matmuls are added up
        backward += memory(4 * D) + memory(3 * D)
    scores = 2 * 2 * sequence_length * Q / 2  # FLOPs: two matmuls, of which the causal mask keeps half
    attention = scores / rates.attention_forward + 2.5 * scores / rates.attention_backward + memory(2 * Q)
    # The loss reads the logits twice (largest, sum), its backward reads them and writes their gradient.
    head = 3 * matmul(D, V) + memory(4 * V) + memory(6 * D)
    n = shape.num_layers
    return Roofline(n * matmuls, n * (forward + backward), n * attention, head)


def table() -> str:
    """Every size that is measured, in markdown: nanoseconds per token by kind, tokens/s, and the target."""
    peak = peak_flops(H100)
    assert peak is not None
    lines = [
        "| model | matmuls | elementwise | attention | head, loss | ns/token | tokens/s | merged matmuls | MFU | target |",
        "|---|" + "---:|" * 9,
    ]
    for family, size, length in (
        *(("clm", size, 2048) for size in ("60M", "200M", "400M", "1.1B")), ("llama3", "1B", 8192), ("llama3", "3B", 8192),
    ):  # fmt: skip
        shape = SIZES[family][size]
        found, merged = roofline(shape, length), roofline(shape, length, fused=True)
        nanoseconds = [found.matmul, found.elementwise, found.attention, found.head, found.seconds]
        mfu = found.tokens_per_second * flops_per_token(shape, length) / peak
        cells = [f"{family} {size}", *(f"{1e9 * value:,.0f}" for value in nanoseconds)]
        cells += [f"{found.tokens_per_second:,.0f}", f"{merged.tokens_per_second:,.0f}", f"{mfu:.1%}"]
        lines.append("| " + " | ".join([*cells, f"{TARGET * found.tokens_per_second:,.0f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
