"""Tokens/s/GPU, MFU and peak memory of whole training steps on one GPU, and a short search for the best settings.

    python benchmarks/gpu.py [--models 60M,200M,... --minutes 9 --resume --markdown ...] [--training.micro_batch_size 8 ...]
    python benchmarks/gpu.py --change cuda_graphs=true --models 60M     the best setting so far with a change
    python benchmarks/gpu.py --profile 60M                              where the time of one step goes

Each measurement is a process of its own (`gpu_step.py`), so that running out of memory or a crash ends that one alone,
and is in the result file as soon as it is there: `--resume` goes on from the file. The order is that of importance, for
the minutes may end at any point: 60M, 200M and 1.1B in bfloat16 with the most promising settings, their search, one
setting of each other model, float8 where layers gain from it.

The search climbs along one axis after the other (rows per micro-batch, CUDA graphs, ...), from the best setting so far
through an ordered list of changes, and leaves an axis at the first change that is no faster. It finds no combination
whose parts are each slower; a full grid of one model would take an hour of GPU time.

Exit codes: 0, all is measured; 1, a measurement failed; 75, the minutes are over and `--resume` goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

from benchmarks.common import MEASURED, commit, query_gpu, sources  # noqa: E402
from benchmarks.gpu_models import DEFAULT_MODELS, MODELS, Setting, gains, planned_memory  # noqa: E402
from benchmarks.gpu_results import GIB, RECIPES, Results, config_lines, markdown, outcome, show_table  # noqa: E402
from models.sizes import num_parameters  # noqa: E402

STATE_BYTES = 16  # per parameter: float32 weight, gradient and AdamW's two moments
LEAST_SECONDS = 20  # of the budget that must be left to begin another measurement
EXIT_FAILED, EXIT_UNFINISHED = 1, 75


class OutOfTime(Exception):
    """The minutes are over."""


class Campaign:
    """Measures settings one after the other while there is time."""

    def __init__(self, options: argparse.Namespace, extra: list[str]):
        self.options, self.extra = options, extra
        self.deadline = time.monotonic() + 60 * options.minutes
        gpu = None if options.device == "cpu" else query_gpu()
        self.on_gpu = options.device == "cuda" or gpu is not None
        self.device_memory = gpu[1] if gpu else None
        slug = re.sub(r"\W+", "_", gpu[0]).lower() if gpu else "cpu"
        self.path = options.out or ROOT / "benchmarks" / "results" / f"gpu_{slug}.json"
        named = re.compile("PYTORCH_|TORCH|OMP_|NCCL_|CUDA_")
        self.origin = {
            "date": datetime.now(UTC).date().isoformat(), "commit": commit(), "command": " ".join(sys.argv),
            "environment": {key: value for key, value in self.environment().items() if named.match(key)},
        }  # fmt: skip
        self.sources = sources(*MEASURED)
        self.results = Results(self.path, extra, options.resume or bool(options.profile), self.sources)
        if gpu is not None:
            self.results.check_device(gpu[0])
        self.longest, self.failed = 0.0, False

    def flags(self, name: str, setting: Setting) -> list[str]:
        model = MODELS[name]
        values = {
            "run.device": "cuda" if self.on_gpu else "cpu", "model.name": model.family, "model.size": model.size,
            "training.sequence_length": model.sequence_length, "training.steps": 1_000_000, "data.source": "random",
            "validation.interval": 0, "checkpoint.interval": 0,
        }  # fmt: skip
        return [part for k, v in (values | setting.flags()).items() for part in (f"--{k}", str(v))] + self.extra

    def measure(self, name: str, setting: Setting) -> float | None:
        """Tokens/s of one setting, from the result file where it is there; None if it could not be measured.

        Raises:
            OutOfTime: before or during the measurement.
        """
        flags = self.flags(name, setting)
        row = self.results.find(flags)
        if row is None or row["status"] in ("out of time", "failed"):
            row = {"model": name, "precision": self.precision(setting), "setting": asdict(setting)}
            row |= {
                "flags": " ".join(flags),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": commit(),
                "sources": self.sources,
            }
            row |= self.refused(name, setting) or self.run_measurement(flags, setting)
            if "compute_dtype" in row and setting.float8 == "none":
                row["precision"] = row["compute_dtype"]
            if (machine := row.pop("machine", None)) is not None:
                self.results.set_machine(self.origin | machine)
            self.results.add(row)
            self.failed |= row["status"] == "failed"
            print(f"{name} {row['precision']}, {setting}: {outcome(row)}", flush=True)
            if row["status"] == "out of time":
                raise OutOfTime
        return row.get("tokens_per_second_per_gpu")

    def precision(self, setting: Setting) -> str:
        if setting.float8 != "none":
            return f"float8 {setting.float8}"
        return "bfloat16" if self.on_gpu else "float32"

    def refused(self, name: str, setting: Setting) -> dict[str, Any] | None:
        """Why a setting need not be tried, if so."""
        if setting.float8 != "none" and not gains(name, setting.float8):
            return {"status": "skipped", "reason": "no layer gains from it (parallel/float8_layers.py)"}
        if self.device_memory is None or self.extra:
            return None
        held, there = STATE_BYTES * num_parameters(MODELS[name].shape, padded=True), self.device_memory
        if held > there:
            text = f"weights, gradients and moments alone are {held / GIB:.0f} GiB, the GPU has {there / GIB:.0f}"
            return {"status": "skipped", "reason": text}
        if (needed := planned_memory(self.flags(name, setting))) > there:
            text = f"it needs {needed / GIB:.0f} GiB by the plan's estimate, the GPU has {there / GIB:.0f}"
            return {"status": "skipped", "reason": text}
        return None

    def run_measurement(self, flags: list[str], setting: Setting) -> dict[str, Any]:
        left = self.deadline - time.monotonic()
        if left < max(LEAST_SECONDS, 0.7 * self.longest):
            raise OutOfTime
        limit, begin = min(left, self.options.limit), time.monotonic()
        request = {"flags": flags, "steps": self.options.steps}
        logs = {"TORCH_LOGS": "perf_hints"} if setting.cuda_graphs else {}  # says why a graph was not recorded
        answer, log = self.run_step(request, limit, **logs)
        if answer["status"] == "out of time" and limit == self.options.limit:
            answer = {"status": "failed", "reason": f"took longer than --limit {limit:.0f} s"}
        if answer["status"] == "failed":
            print("\n".join(log.splitlines()[-30:]), file=sys.stderr, flush=True)
        notes = [line[-300:] for line in dict.fromkeys(log.splitlines()) if "cudagraph" in line.lower()]
        if setting.cuda_graphs and notes:
            answer["cuda_graph_notes"] = notes[:5]
        took = time.monotonic() - begin
        self.longest = max(self.longest, took)
        return answer | {"process_seconds": round(took, 1)}

    def environment(self) -> dict[str, str]:
        """As the launchers have it."""
        return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "1"} | os.environ

    def run_step(self, request: dict[str, Any], limit: float, **environment: str) -> tuple[dict[str, Any], str]:
        """The answer of one `gpu_step.py`, or what became of it; and what it printed."""
        with tempfile.TemporaryDirectory() as folder:
            path, log = Path(folder) / "step.json", Path(folder) / "log"
            path.write_text(json.dumps(request), encoding="utf-8")
            command, answer = (
                [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py"), str(path)],
                path.with_suffix(".answer"),
            )
            with open(log, "wb") as out:
                # A group of its own, so that its compiler processes end with it; the session stays this one's.
                process = subprocess.Popen(
                    command, cwd=ROOT, env=self.environment() | environment, stdin=subprocess.DEVNULL,
                    stdout=out, stderr=subprocess.STDOUT, process_group=0,
                )  # fmt: skip
                deadline = time.monotonic() + limit
                try:
                    # The answer is all there is to wait for: taking NCCL and compiler processes down takes seconds more.
                    while process.poll() is None and not answer.exists() and time.monotonic() < deadline:
                        time.sleep(0.05)
                    in_time = process.poll() is not None
                finally:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            text = log.read_text(encoding="utf-8", errors="replace")
            if answer.exists():
                return json.loads(answer.read_text(encoding="utf-8")), text
            if not in_time:
                return {"status": "out of time", "reason": f"ended after {limit:.0f} s"}, text
            return {"status": "failed", "reason": f"the process ended with {process.returncode} and no answer"}, text


def climb(campaign: Campaign, name: str, search: bool) -> Iterator[None]:
    """Measures a model's settings, one per turn: the first (with fewer rows until it fits), then along each axis."""
    best, model = MODELS[name].first, MODELS[name]
    rate = campaign.measure(name, best)
    while rate is None and best.micro_batch_size > 1 and ran_out_of_memory(campaign, name, best):
        yield
        best = replace(best, micro_batch_size=best.micro_batch_size // 2, accumulation=best.accumulation * 2)
        rate = campaign.measure(name, best)
    if rate is None or not search:
        return
    for axis in model.axes:
        for change in axis:
            trial = replace(best, **change)
            if trial == best:
                continue
            yield
            faster = campaign.measure(name, trial)
            if faster is None or faster <= rate:
                break
            best, rate = trial, faster


def ran_out_of_memory(campaign: Campaign, name: str, setting: Setting) -> bool:
    row = campaign.results.find(campaign.flags(name, setting))
    return row is not None and row["status"] == "out of memory"


def measure_all(campaign: Campaign, options: argparse.Namespace) -> None:
    """Everything, in the order of importance."""
    names = [name for name in MODELS if name in options.models]
    searched = [name for name in names if options.search and MODELS[name].axes]
    climbs = [climb(campaign, name, search=True) for name in searched]
    while climbs:  # taking turns: first settings of these models, then a trial of each
        climbs = [one for one in climbs if next(one, "done") != "done"]
    for name in names:
        if name not in searched:
            for _ in climb(campaign, name, search=False):
                pass
    for recipe in RECIPES if options.float8 else ():
        for name in names:
            if (row := campaign.results.best(name)) is not None:
                campaign.measure(name, replace(Setting(**row["setting"]), float8=recipe))


def best_setting(campaign: Campaign, name: str) -> Setting:
    """The best setting known of a model, or its first."""
    row = campaign.results.best(name)
    return Setting(**row["setting"]) if row else MODELS[name].first


def show_profile(campaign: Campaign, name: str) -> None:
    """Trace the best known setting of a model, and print and keep the kernels that take most of the time."""
    setting = best_setting(campaign, name)
    beside = campaign.path.parent if campaign.options.out else ROOT / "outputs"
    trace = campaign.options.trace or beside / f"gpu_profile_{name}.json.gz"
    request = {"flags": campaign.flags(name, setting), "steps": campaign.options.steps, "trace": str(trace.absolute())}
    answer, log = campaign.run_step(request, campaign.deadline - time.monotonic())
    if answer["status"] != "measured":
        print(f"{log}\n{answer['status']}: {answer['reason']}", file=sys.stderr)
        raise SystemExit(EXIT_UNFINISHED if answer["status"] == "out of time" else EXIT_FAILED)
    found = answer["profile"]
    print(
        f"{name}, {setting}: {answer['milliseconds_per_step']} ms per step, {found['milliseconds_per_step']} profiled"
    )
    print(
        f"{'kernels take' if campaign.on_gpu else 'operations take'} {found['busy']:.1%} of it\n ms/step  share  calls"
    )
    for kernel in found["kernels"]:
        numbers = f"{kernel['milliseconds_per_step']:8.3f} {kernel['share']:6.1%} {kernel['calls']:6}"
        print(f"{numbers}  {kernel['name'][:100]}")
    campaign.results.set_machine(campaign.origin | answer["machine"])
    campaign.results.add_profile(name, found | {"setting": asdict(setting)})
    print(f"wrote {trace}")


def parse_change(text: str) -> dict[str, Any]:
    """KEY=VALUE of a `Setting`."""
    key, _, value = text.partition("=")
    kinds = {field.name: type(getattr(Setting(1), field.name)) for field in fields(Setting)}
    if key not in kinds or not value:
        raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(kinds)}, with =VALUE behind it")
    if kinds[key] is bool:
        if value not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{text!r}: true or false")
        return {key: value == "true"}
    try:
        return {key: kinds[key](value)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} needs a whole number") from None


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Other flags go to the configuration of every measurement.",
    )  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--models", default=",".join(DEFAULT_MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; 0 only shows the result file")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one measurement")
    parser.add_argument("--steps", type=int, help="timed steps (default: at least 10 and 5 seconds on a GPU, 3 on CPU)")
    parser.add_argument("--no-search", dest="search", action="store_false", help="only the first setting of each model")
    parser.add_argument("--no-float8", dest="float8", action="store_false", help="without the float8 recipes")
    parser.add_argument(
        "--change", metavar="KEY=VALUE", action="append", type=parse_change, default=[],
        help="measure only the best setting so far of each model, changed so, such as cuda_graphs=true",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the result file")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_DEVICE.json")
    parser.add_argument("--markdown", action="store_true", help="print the table in markdown, too")
    parser.add_argument("--write-configs", action="store_true", help="print the best settings as TOML")
    parser.add_argument("--profile", metavar="MODEL", help="trace one setting of a model instead of measuring")
    parser.add_argument("--trace", type=Path, help="file of --profile (default: beside --out, or in outputs/)")
    options, extra = parser.parse_known_args()
    options.models = [name.strip() for name in options.models.split(",")]
    for name in [*options.models, *([options.profile] if options.profile else [])]:
        if name not in MODELS:
            parser.error(f"{name!r} is none of {', '.join(MODELS)}")
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    if extra and not extra[0].startswith("--"):
        parser.error(f"unexpected {extra[0]!r}")
    return options, extra


def main() -> None:
    options, extra = parse()
    campaign = Campaign(options, extra)
    if options.profile:
        show_profile(campaign, options.profile)
        return
    unfinished = False
    try:
        if options.change:
            changes = {key: value for change in options.change for key, value in change.items()}
            for name in options.models:
                campaign.measure(name, replace(best_setting(campaign, name), **changes))
        else:
            measure_all(campaign, options)
    except OutOfTime:
        unfinished = options.minutes > 0  # 0 only shows
        print("the minutes are over: --resume goes on from here", flush=True)
    except KeyboardInterrupt:
        unfinished = True
        print("interrupted: --resume goes on from here", flush=True)
    content = campaign.results.content
    if campaign.results.known:
        show_table(content)
        if options.markdown:
            print(markdown(content))
        if options.write_configs:
            print(config_lines(campaign.results))
        print(f"results: {campaign.path}")
    if campaign.failed or unfinished:
        raise SystemExit(EXIT_FAILED if campaign.failed else EXIT_UNFINISHED)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a measurement under way ends with this process
    main()
