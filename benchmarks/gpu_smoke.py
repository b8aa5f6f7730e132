"""Whether a GPU machine works at all, and what it does at the shapes of the models: the first minute of `gpu_session.py`.

    python benchmarks/gpu_smoke.py --out smoke.json [--device cpu]

Versions, a collective, the kernels that attention really runs (a fused backend that refuses a shape is replaced silently, by
one that is many times slower), and the rates of attention, matmuls and copies beside those that `roofline.py` takes for
granted. Each part is in the file as soon as it is known; a part that fails keeps no other from being tried. Exit code 1
where one failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks import common  # noqa: E402
from benchmarks.gpu_step import describe  # noqa: E402
from benchmarks.roofline import Rates  # noqa: E402
from models.attention import CausalAttention  # noqa: E402
from models.sizes import SIZES  # noqa: E402
from parallel import mesh as meshes  # noqa: E402

REPEATS = 10


class Smoke:
    """The parts of the check, each a method that returns its figures for the result file.

    Args:
        device: the GPU, or the CPU in a dry run.
        tokens: rows of the matmuls' input; a micro-batch of 48 sequences of 2,048 tokens has 98,304.
        rows, length: sequences of the attention, and their tokens.
        num_bytes: size of the copied tensor.
    """

    def __init__(self, device: torch.device, tokens: int, rows: int, length: int, num_bytes: int):
        self.device, self.tokens, self.rows, self.length, self.num_bytes = device, tokens, rows, length, num_bytes
        self.dtype = torch.bfloat16

    def seconds(self, action: Callable[[], Any], repeats: int = REPEATS) -> float:
        """Of one call, after an untimed one."""
        action()
        self.wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            action()
        self.wait()
        return (time.perf_counter() - begin) / repeats

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype, requires_grad=True)

    def machine(self) -> dict[str, Any]:
        found = describe(self.device)
        if self.device.type == "cuda":
            found["free_and_total_bytes"] = torch.cuda.mem_get_info(self.device)
        return found

    def collective(self) -> dict[str, Any]:
        """An all-reduce over this one process, through the backend of real runs."""
        tensor = torch.ones(8, device=self.device)
        dist.all_reduce(tensor)
        assert tensor.sum().item() == 8.0, "a sum over one process changed its numbers"
        return {"backend": dist.get_backend()}

    def attention(self, heads: int, kv_heads: int) -> dict[str, Any]:
        """Attention of heads of 64 as the models call it, with the kernels that ran; and by each fused backend."""
        q = self.randn(self.rows, heads, self.length, 64)
        k, v = (self.randn(self.rows, kv_heads, self.length, 64) for _ in "kv")
        grad = torch.randn_like(q)
        module = CausalAttention(grouped=heads != kv_heads)
        flops = 2 * 2 * self.rows * heads * self.length**2 * 64 / 2

        def rates(forward: Callable[[], torch.Tensor]) -> dict[str, float]:
            alone = self.seconds(forward)
            both = self.seconds(lambda: torch.autograd.grad(forward(), (q, k, v), grad))
            return {
                "forward_tflops": round(flops / alone / 1e12, 1),
                "backward_tflops": round(2.5 * flops / max(both - alone, 1e-9) / 1e12, 1),
            }

        found: dict[str, Any] = {"as_the_models_call_it": rates(lambda: module(q, k, v))}
        found["kernels"] = self.kernels(lambda: torch.autograd.grad(module(q, k, v), (q, k, v), grad))
        on_gpu = self.device.type == "cuda"
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if on_gpu else (SDPBackend.MATH,):

            def forced(backend: SDPBackend = backend) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

            try:
                found[backend.name] = rates(forced)
            except RuntimeError as error:  # this backend does not take the shape: what is asked here
                found[backend.name] = f"refused: {' '.join(str(error).split())[:200]}"
        if on_gpu and all(isinstance(found[name], str) for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION")):
            raise RuntimeError(f"no fused attention takes {heads}:{kv_heads} heads of 64: {found}")
        return found

    def kernels(self, action: Callable[[], Any]) -> list[str]:
        """Names of the device's kernels (on a CPU: operations) of a call, the longest-running first."""
        on_gpu = self.device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        with torch.profiler.profile(activities=kinds) as profiler:
            action()
            self.wait()
        wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        events = [event for event in profiler.key_averages() if event.device_type == wanted]
        events.sort(key=lambda event: -(event.self_device_time_total if on_gpu else event.self_cpu_time_total))
        return [event.key[:120] for event in events[:6]]

    def matmul(self, inputs: int, outputs: int) -> dict[str, float]:
        """One linear layer over the tokens of a micro-batch."""
        x, weight = self.randn(self.tokens, inputs).detach(), self.randn(outputs, inputs).detach()
        seconds = self.seconds(lambda: F.linear(x, weight))
        return {
            "tflops": round(2 * self.tokens * inputs * outputs / seconds / 1e12, 2),
            "terabytes_per_second": round(2 * self.tokens * (inputs + outputs) / seconds / 1e12, 3),
        }

    def copy(self) -> dict[str, float]:
        source = torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        seconds = self.seconds(lambda: target.copy_(source))
        return {"terabytes_per_second": round(2 * self.num_bytes / seconds / 1e12, 3)}

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Everything, by its name in the result file."""
        parts: dict[str, Callable[[], Any]] = {
            "machine": self.machine,
            "collective": self.collective,
            "copy": self.copy,
        }
        on_gpu = self.device.type == "cuda"
        for size in ("60M", "1.1B"):
            shape = SIZES["clm"][size]
            heads = (shape.num_heads, shape.num_kv_heads) if on_gpu else (2, 1)
            parts[f"attention {size}, {shape.num_heads}:{shape.num_kv_heads} heads"] = lambda h=heads: self.attention(
                *h
            )
        for size in ("60M", "200M", "1.1B") if on_gpu else ("debug",):
            shape = SIZES["clm"][size]
            pairs = {
                "q or o": (shape.dim, shape.dim),
                "up": (shape.dim, shape.ffn_dim),
                "down": (shape.ffn_dim, shape.dim),
            }
            for name, pair in ({**pairs, "head": (shape.dim, shape.padded_vocab_size)}).items():
                parts[f"matmul {size} {name}, {pair[0]} to {pair[1]}"] = lambda p=pair: self.matmul(*p)
        return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    mesh = meshes.start(options.device)
    sizes = (48 * 2048, 16, 2048, 4 << 30) if options.device == "cuda" else (64, 1, 64, 1 << 20)
    smoke, failed = Smoke(mesh.device, *sizes), False
    result: dict[str, Any] = common.origin(
        describe(mesh.device)["device"], ("torch", "triton", "transformers", "torchao")
    )
    result |= {"roofline_assumes": vars(Rates()), "parts": {}}
    for name, part in smoke.parts().items():
        try:
            found = part()
        except Exception as error:  # one part that fails keeps no other from being tried
            traceback.print_exc()
            found, failed = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}, True
        result["parts"][name] = found
        common.write_json(result, options.out)
        print(f"{name}: {found}", flush=True)
        if smoke.device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
