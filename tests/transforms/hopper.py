"""Kernels as an H100 would have them, on a machine without one."""

from __future__ import annotations

from typing import Any

import pytest


def compile_for_hopper(kernel: Any, signature: dict, constants: dict, attributes: dict, num_warps: int) -> Any:
    """A Triton kernel compiled ahead of time for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def pretend_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let those who ask Triton for its device hear of one with compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


def written_by(kernel: Any, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The tensors that torch.compile believes a kernel to write, and copies."""
    from torch._higher_order_ops import triton_kernel_wrap

    pretend_hopper(monkeypatch)
    arguments = {name: value for name, value in arguments.items() if name != "num_warps"}
    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):  # torch 2.13
        found = triton_kernel_wrap.identify_accessed_tensors(kernel, arguments, {})
        return {written.name for written in found.read_writes.writes}
    return set(triton_kernel_wrap.identify_mutated_tensors(kernel, arguments, {}))
