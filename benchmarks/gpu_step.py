"""One measurement of `benchmarks/gpu.py`, in a process of its own: whole training steps under one setting.

    python benchmarks/gpu_step.py REQUEST.json      (`gpu.py` writes the request and reads the answer beside it)

The steps are `Trainer.train_step` on the rows that a thread reads ahead, as in a run: FSDP2 on one process, compiled
blocks and loss, clipping, fused AdamW, the check for non-finite steps. Left out are the metrics row every ten steps,
validation and checkpoints. Steps run untimed until one compiles nothing and takes about as long as the one before it;
then windows of steps are timed, with the device synchronised only at the ends of a window.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

import torch  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from benchmarks.gpu_models import planned_memory  # noqa: E402
from models.sizes import FLOPS_FORMULA, num_parameters, peak_flops  # noqa: E402
from parallel import mesh as meshes  # noqa: E402
from parallel.apply import compute_dtype  # noqa: E402
from train.config import Config, named_shape  # noqa: E402
from train.config_sources import load_config  # noqa: E402
from train.data import PreparedData, RandomRows  # noqa: E402
from train.optimizer import is_quantised  # noqa: E402
from train.trainer import GC_INTERVAL, Trainer  # noqa: E402

WARM_STEPS = 3, 12  # at least, at most; CUDA graphs run once, record, and replay from the third call on
WINDOWS = 4
LEAST_STEPS, LEAST_SECONDS = 10, 5.0  # timed on a GPU, over all windows
TOP_KERNELS = 15


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, as they belong to a figure."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in ("torch", "triton", "torchao"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    answer: dict[str, Any] = {"versions": versions}
    if device.type == "cpu":
        cpu = Path("/proc/cpuinfo")
        name = cpu.read_text().partition("model name\t: ")[2].partition("\n")[0] if cpu.exists() else ""
        return answer | {"device": name or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    answer |= {"device": properties.name, "device_memory_bytes": properties.total_memory}
    if (peak := peak_flops(properties.name)) is not None:
        answer |= {"peak_flops": peak, "mfu_formula": f"tokens/s x FLOPs per token / peak; the latter {FLOPS_FORMULA}"}
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        answer["driver_power_limit_clock"] = done.stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        pass  # a figure of interest, not a needed one
    return answer


def local_moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """This process's tensors that are finite exactly if all moments are: the moments, or their scales if quantised."""
    values = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    return [value.scale if is_quantised(value) else value for value in local]


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether every number is finite; on each device its own are looked at, since torchao counts steps on the host."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and tensor.is_floating_point():
            by_device.setdefault(tensor.device, []).append(tensor)
    largest = [torch.stack([n.float() for n in torch._foreach_norm(own, ord=math.inf)]) for own in by_device.values()]
    return all(bool(torch.isfinite(norms).all()) for norms in largest)


class Loop:
    """A trainer's steps, a few at a time."""

    def __init__(self, config: Config, mesh: meshes.Mesh):
        shape = named_shape(config.model)
        data = PreparedData(RandomRows(shape.vocab_size, config.run.seed), None)
        self.trainer = Trainer(config, mesh, shape, None, data)
        self.trainer.open_data(None)
        self.trainer.after_update()
        self.rows = iter(self.trainer.batches)
        self.loss = torch.zeros(())
        self.recorded = 0
        torch._dynamo.callback_handler.register_start_callback(self.count_recording)
        gc.collect()
        gc.disable()  # as `Trainer.run` does

    def run(self, steps: int) -> float:
        """Seconds of the next `steps` steps."""
        begin = self.now()
        for _ in range(steps):
            self.loss, _ = self.trainer.train_step(next(self.rows))
            self.trainer.step += 1
            if self.trainer.step % GC_INTERVAL == 0:
                gc.collect(1)
        return self.now() - begin

    def warm_up(self) -> list[float]:
        """Seconds of each step until nothing is compiled any more and the time has settled."""
        seconds: list[float] = []
        least, most = WARM_STEPS
        while len(seconds) < most:
            before = self.compiled
            seconds.append(self.run(1))
            settled = len(seconds) >= least and seconds[-1] <= 1.2 * seconds[-2] and self.compiled == before
            if settled:
                break
        return seconds

    def count_recording(self, event: Any) -> None:
        """Called as anything begins to be compiled or recorded."""
        self.recorded += event.callback_trigger.name == "CUDAGRAPH_RECORDING"

    @property
    def compiled(self) -> tuple[int, int]:
        """Graphs that were compiled, and CUDA graphs that were recorded, so far."""
        return counters["stats"]["unique_graphs"], self.recorded

    def now(self) -> float:
        if self.trainer.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.mesh.device)
        return time.perf_counter()

    def close(self) -> None:
        self.trainer.batches.close()


def steps_per_window(step_seconds: float, requested: int | None, on_gpu: bool) -> list[int]:
    """Steps of each window: at least 10 steps and 5 seconds in all on a GPU, 3 steps elsewhere, or what is asked for."""
    steps = requested
    if steps is None:
        steps = max(LEAST_STEPS, math.ceil(LEAST_SECONDS / step_seconds)) if on_gpu else 3
    windows = min(WINDOWS, steps)
    return [steps // windows + (w < steps % windows) for w in range(windows)]


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Speed and memory under one setting."""
    config = load_config([], request["flags"], world_size=1)
    mesh = meshes.start(config.run.device)
    request["machine"] = describe(mesh.device)  # also of a measurement that fails
    on_gpu = mesh.device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # as a job does
        torch.cuda.reset_peak_memory_stats()
    loop = Loop(config, mesh)
    warm = loop.warm_up()
    compiled = loop.compiled
    windows, waited = [], loop.trainer.batches.waited
    for steps in steps_per_window(warm[-1], request["steps"], on_gpu):
        windows.append((steps, loop.run(steps)))
    seconds = sum(seconds for _, seconds in windows)
    waited = loop.trainer.batches.waited - waited
    loop.trainer.check_finite()
    weights = [
        p.to_local() if isinstance(p, DTensor) else p for p in map(torch.Tensor.detach, loop.trainer.parameters())
    ]
    if not all_finite(weights + local_moments(loop.trainer.optimizer)):
        raise RuntimeError("a weight or optimizer moment is not finite")
    answer = speed(config, loop.trainer, windows)
    answer |= {
        "loss": round(float(loop.loss), 4),
        "warm_up_seconds": [round(s, 2) for s in warm],
        "data_wait": round(waited / seconds, 4),
        "compiled_while_timed": loop.compiled[0] - compiled[0],
        "planned_memory": planned_memory(request["flags"]),
    } | memory(loop.trainer)
    if config.compile.cuda_graphs:
        answer["cuda_graphs_recorded"] = loop.recorded
        answer["cuda_graphs_recorded_while_timed"] = loop.recorded - compiled[1]
        answer["cuda_graph_counters"] = {k: n for k, n in counters["inductor"].items() if "cudagraph" in k}
    if request.get("trace"):
        answer["profile"] = profile(loop, Path(request["trace"]))
    loop.close()
    return answer


def speed(config: Config, trainer: Trainer, windows: list[tuple[int, float]]) -> dict[str, Any]:
    """Tokens/s (median and spread of the windows), milliseconds and, where the device's peak is known, MFU."""
    rates = [steps * config.tokens_per_step / seconds for steps, seconds in windows]
    rate, throughput = statistics.median(rates), trainer.throughput
    answer: dict[str, Any] = {
        "tokens_per_second_per_gpu": round(rate, 1),
        "tokens_per_second_per_gpu_windows": [round(value, 1) for value in rates],
        "spread": round((max(rates) - min(rates)) / rate, 4),
        "milliseconds_per_step": round(1e3 * config.tokens_per_step / rate, 2),
        "tokens_per_step": config.tokens_per_step,
        "timed_steps": sum(steps for steps, _ in windows),
        "timed_seconds": round(sum(seconds for _, seconds in windows), 3),
        "compute_dtype": str(compute_dtype(config, trainer.mesh.device)).removeprefix("torch."),
        "parameters": num_parameters(trainer.shape),
        "flops_per_token": throughput.flops_per_token,
    }
    if throughput.peak is not None:
        answer["mfu"] = round(rate * throughput.flops_per_token / throughput.peak, 4)
    return answer


def memory(trainer: Trainer) -> dict[str, Any]:
    """Peaks since the process began, in bytes: of the GPU's allocator, or of the whole process on CPU."""
    device, answer = trainer.mesh.device, {}
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        answer["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        answer["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        answer["allocation_retries"] = stats.get("num_alloc_retries", 0)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        answer["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return answer


def profile(loop: Loop, trace: Path) -> dict[str, Any]:
    """A trace of three steps for chrome://tracing or Perfetto, and where the time goes."""
    on_gpu = loop.trainer.mesh.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        seconds = loop.run(3)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    # Kernels only: an operation on the host carries the device time of its kernels as well, and would count it twice.
    events = [e for e in profiler.key_averages() if not on_gpu or e.device_type == torch.autograd.DeviceType.CUDA]
    events = [e for e in events if not e.is_user_annotation]
    times = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count) for e in events}
    busy = sum(microseconds for microseconds, _ in times.values())
    top = sorted(times.items(), key=lambda item: -item[1][0])[:TOP_KERNELS]
    return {
        "trace": trace.name,
        "milliseconds_per_step": round(1e3 * seconds / 3, 2),
        "busy": round(busy / 1e6 / seconds, 4),  # above 1 where streams overlap
        "kernels": [
            {
                "name": name,
                "milliseconds_per_step": round(us / 3e3, 3),
                "share": round(us / busy, 4),
                "calls": calls // 3,
            }
            for name, (us, calls) in top
        ],
    }


def failure(error: BaseException) -> dict[str, Any]:
    """What a measurement that ended in an error leaves; running out of memory is an outcome like another."""
    text = str(error)
    memory_words = r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
    lacking = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(memory_words, text)
    line = " ".join(text.split())[:300]
    return {"status": "out of memory" if lacking else "failed", "reason": f"{type(error).__name__}: {line}"}


def main() -> None:
    path = Path(sys.argv[1])
    request = json.loads(path.read_text(encoding="utf-8"))
    try:
        with tempfile.TemporaryDirectory() as folder:
            request["flags"] += ["--run.dir", folder]
            answer = {"status": "measured"} | measure(request)
    except Exception as error:
        traceback.print_exc()
        answer = failure(error)
    if "machine" in request:
        answer["machine"] = request["machine"]
    scratch = path.with_suffix(".writing")
    scratch.write_text(json.dumps(answer), encoding="utf-8")
    scratch.replace(path.with_suffix(".answer"))


if __name__ == "__main__":
    main()
