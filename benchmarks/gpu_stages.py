"""The stages of `gpu_session.py`, in order, with the seconds that each may take. Torch-free.

Part 1 takes about eight minutes on one H100 with 16 cores, part 2 three and a half or more. On a CPU each stage runs in
miniature: the same scripts and tests with the debug model, uncompiled, so that a dry run finds what a GPU need not.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

EFFECTS = ("int8", "optical_linear", "fp8_e4m3", "bitnet_b158", "mxfp4")


@dataclass(frozen=True)
class Stage:
    """One command with its time."""

    name: str
    command: tuple[str, ...]
    limit: float
    """Seconds at most."""
    least: float = 0.0
    """Seconds that must be left to begin it."""
    beside: bool = False
    """Runs on while the next stages do; the first one that is not so waits for it."""
    environment: dict[str, str] = field(default_factory=dict)


class Commands:
    """Command lines of the scripts, on a GPU or in miniature.

    Args:
        out: folder of the results.
        device: "cuda" or "cpu".
    """

    def __init__(self, out: Path, device: str):
        self.out, self.small = out, device == "cpu"
        self.device = ("--device", device)

    def python(self, script: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, script, *self.device, *arguments)

    def gpu(self, models: str, minutes: float, *arguments: str, out: str = "gpu.json") -> tuple[str, ...]:
        """`gpu.py` of some models; one setting each unless the arguments say otherwise."""
        which = "--profile" if "--trace" in arguments else "--models"
        models = "debug" if self.small else models
        few = ("--steps", "1", "--compile.enabled", "false") if self.small else ()
        common = (which, models, "--minutes", str(minutes), "--out", str(self.out / out), "--resume")
        return self.python("benchmarks/gpu.py", *common, *arguments, *few)

    def cost(self, model: str, effects: tuple[str, ...], minutes: float) -> tuple[str, ...]:
        """`transform_cost.py` of one model."""
        few = ("--rounds", "1", "--seconds", "0", "--compile.enabled", "false")
        few += ("--training.global_batch_size", "2", "--training.sequence_length", "32")
        which = ("--models", "quickstart" if self.small else model, "--effects", ",".join(effects))
        kept = ("--minutes", str(minutes), "--out", str(self.out / "transform_cost.json"), "--resume")
        return self.python("benchmarks/transform_cost.py", *which, *kept, *(few if self.small else ()))

    def tests(self, workers: int, *arguments: str) -> tuple[str, ...]:
        """Tests for a GPU; each failure is printed as soon as it is known."""
        plain = ("-q", "-p", "no:cacheprovider", "--failures-at-once", "--tb=short", "--durations=8", "--timeout=100")
        mark = () if self.small else ("-m", "gpu")
        return (sys.executable, "-m", "pytest", *plain, *mark, "-n", str(workers), "--dist", "worksteal", *arguments)

    def runs(self) -> tuple[str, ...]:
        """Whole runs in miniature against the CPU."""
        few = ("-k", "test_a_run_agrees_with_the_cpu and int8_weights") if self.small else ()
        return self.tests(1 if self.small else 8, "tests/train/test_on_gpu.py", *few)


def stages(part: int, out: Path, device: str) -> list[Stage]:
    """What a part runs.

    Args:
        out: where results go, all of them.
        device: "cuda", or "cpu" for a dry run.
    """
    commands = Commands(out, device)
    return part_one(commands, out) if part == 1 else part_two(commands, out)


def part_one(commands: Commands, out: Path) -> list[Stage]:
    """What must be known first: whether it works, and how fast."""
    kernels = [f"tests/transforms/test_{name}.py" for name in ("kernels", "convert_kernel", "windows")]
    kernels += [
        "--deselect",
        f"{kernels[0]}::test_a_weight_of_more_than_32_bits_of_elements",
    ]  # 8 GiB: in part 2, alone
    if commands.small:
        kernels = ["tests/models/test_sizes.py", "-k", "peak"]
    caches = Path(os.environ.get("SESSION_CACHE", "/tmp/session_cache"))
    few = ("--no-search", "--no-float8")
    # A block is compiled once, however many there are: one layer brings what the measured models need into the cache.
    shallow = ("--no-search", "--no-float8", "--steps", "1", "--model.shape.num_layers", "1")
    compile_stages = [
        Stage(
            f"compile {model}", commands.gpu(model, 2.5, *shallow, out=str(caches / f"{model}.json")), 160, beside=True
        )
        for model in ("60M", "200M", "1.1B")
    ]
    on_cpu = {"NEWCOMPUTE_TEST_DEVICE": "cpu"} if commands.small else {}
    return [
        Stage("smoke", commands.python("benchmarks/gpu_smoke.py", "--out", str(out / "smoke.json")), 75),
        # Of 16 cores eight run tests; on the others the compiler works for what is timed later.
        Stage("kernels", commands.tests(1 if commands.small else 8, *kernels), 170, beside=True),
        *compile_stages,
        # Inductor has timed variants of its kernels beside all that; what it chose is chosen anew, where it is alone.
        Stage("forget choices", ("bash", "-c", f"find '{caches}' -name '*.best_config' -delete"), 10),
        Stage("speed", commands.gpu("60M,200M,1.1B", 2.4, *few), 155, least=35),
        Stage("bitflip 60M", commands.cost("60M", ("bitflip_published",), 1.5), 100, least=45),
        Stage("keep caches", keep_caches(caches, out), 25),
        Stage("runs", commands.runs(), 150, least=40, environment=on_cpu),
    ]


def part_two(commands: Commands, out: Path) -> list[Stage]:
    """What is worth the minutes that are left, the most important first."""
    few = ("--no-search", "--no-float8")
    on_cpu = {"NEWCOMPUTE_TEST_DEVICE": "cpu"} if commands.small else {}
    change = "accumulation=3" if commands.small else "cuda_graphs=true"  # a CPU has none
    profile = ("--trace", str(out / "profile_60M.json.gz"), "--steps", "5")
    return [
        # This stage is skipped where it has passed in part 1 and nothing was changed since.
        Stage("runs", commands.runs(), 120, least=40, environment=on_cpu),
        Stage("search 60M", commands.gpu("60M", 1.6, "--no-float8"), 105, least=35),
        Stage("profile 60M", commands.gpu("60M", 1, *profile), 65, least=30),
        Stage("effects 60M", commands.cost("60M", EFFECTS, 2.4), 155, least=45),
        Stage("bitflip 200M", commands.cost("200M", ("bitflip_published",), 1.5), 100, least=45),
        Stage("float8 1.1B", commands.gpu("1.1B", 1.5, "--no-search"), 100, least=40),
        Stage("CUDA graphs", commands.gpu("60M,200M", 1.2, "--change", change), 80, least=35),
        Stage("other models", commands.gpu("400M,llama3-1B,llama3-3B", 2, *few), 130, least=35),
        Stage("far weight", commands.tests(1, "tests/transforms/test_kernels.py", "-k", "32_bits"), 60, least=30),
    ]


def keep_caches(caches: Path, out: Path) -> tuple[str, ...]:
    """Compiled code, for the next part on a machine of the same GPU and versions."""
    return (sys.executable, "benchmarks/keep_caches.py", str(caches), str(out / "caches.tar.gz"))
