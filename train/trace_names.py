"""What kernels and operators are for, and names short enough for a table."""

from __future__ import annotations

import functools
import re

COMMUNICATION = "communication"
COPY = "copy"
OTHER = "other"

# The first match counts, so the order matters: the name of a fused Triton kernel lists the operators fused into it ("copy",
# "attention"), attention kernels carry "cutlass" in their template arguments, and multi-tensor ones "add" or "norm".
_KERNELS = (
    (COMMUNICATION, r"nccl|rccl|nvshmem|all_reduce_kernel|multimem_|memcpy ptop|deep_ep"),
    ("hardware effects", r"^_?(chunk|dense)_kernel\b"),
    ("optimizer and clipping", r"multi_tensor_apply|triton_for_|adam|lamb_|foreach"),
    ("elementwise", r"^triton_poi_"),
    ("reduction", r"^triton_(red|per)_"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("matmul", r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitk|wgmma|triton_tem_|_mm_|matmul"),
    (COPY, r"^mem(cpy|set)|copy|catarray|chunk_cat|fill"),
    ("reduction", r"reduce|softmax|norm(?!al)|sum_|cumsum|scan|argmax"),
    ("indexing", r"index|gather|scatter|embedding|sort"),
    ("elementwise", r"elementwise|vectorized|unrolled|pointwise|distribution"),
)  # fmt: skip
_OPERATORS = (
    (COMMUNICATION, r"^(gloo|nccl|mpi|ucc|c10d|_c10d_functional|c10d_functional)::?|^record_param_comms"),
    ("attention", r"attention|sdpa|flash"),
    ("matmul", r"::(addmm|addmv|mm|bmm|baddbmm|matmul|linear|einsum|_scaled_mm|mv|dot)(_out|_)?$|mkldnn|mkl::|int_mm"),
    ("optimizer and clipping", r"::_(fused_adam|foreach|fused_sgd)|^optimizer"),
    ("compiled code", r"compiled|dynamo|pregraph|aotdispatcher|^cpp_fused"),
    (COPY, r"copy|::(clone|cat|stack|contiguous|fill_|zero_|zeros\w*|empty\w*|_to_copy|to|chunk_cat|resize_)$"),
    ("reduction", r"::(sum|mean|max|min|amax|norm|_?(log_)?softmax\w*|nll_loss\w*|logsumexp|all|any|cumsum)\b|norm(?!al)"),
    ("indexing", r"index|gather|scatter|embedding|sort|nonzero"),
    ("autograd", r"^autograd::|backward0?$"),
    ("elementwise", r"^aten::"),
)  # fmt: skip
_KERNEL_PATTERNS = [(group, re.compile(pattern)) for group, pattern in _KERNELS]
_OPERATOR_PATTERNS = [(group, re.compile(pattern)) for group, pattern in _OPERATORS]

_HINT = re.compile(r"\w*[Ff]unctor\w*|\w+_kernel_cuda|\w+_kernel_impl|cutlass_\w+|Flash_\w+_traits\w*")


@functools.cache
def kernel_group(name: str) -> str:
    """What a kernel on a GPU does, by its name."""
    return _group(name, _KERNEL_PATTERNS)


@functools.cache
def operator_group(name: str) -> str:
    """What an operator on the host does, by its name."""
    return _group(name, _OPERATOR_PATTERNS)


def _group(name: str, patterns: list[tuple[str, re.Pattern[str]]]) -> str:
    lower = name.lower().removeprefix("void ")
    return next((group for group, pattern in patterns if pattern.search(lower)), OTHER)


def short_name(name: str, width: int = 64) -> str:
    """A kernel's name without return type, namespaces, arguments and most template arguments, at most `width` long.

    Of the template arguments the functor stays: it is all that tells one elementwise kernel from another.
    """
    if name.startswith(("Memcpy", "Memset")):
        return name[:width]
    plain, inside = _without_templates(name.removeprefix("void "))
    plain = plain.partition("(")[0].strip()
    short = plain.rpartition("::")[2] or plain or name
    hint = _HINT.search(inside)
    if hint and hint.group() not in short:
        short = f"{short}<{hint.group()}>"
    return short if len(short) <= width else f"{short[: width - 3]}..."


def _without_templates(name: str) -> tuple[str, str]:
    """A name without what stands between angle brackets, and that."""
    depth = 0
    outside: list[str] = []
    inside: list[str] = []
    for character in name.replace("(anonymous namespace)", "anonymous"):
        if character == "<":
            depth += 1
            inside.append(" ")
        elif character == ">" and depth:
            depth -= 1
        else:
            (inside if depth else outside).append(character)
    return "".join(outside), "".join(inside)
