"""Tokens/s/GPU, MFU and peak memory of whole training steps on one GPU, and a short search for the best settings.

    python benchmarks/gpu.py [--models 60M,200M,... --minutes 9 --resume --markdown ...] [--training.micro_batch_size 8 ...]
    python benchmarks/gpu.py --profile 60M            where the time of one step goes

Each measurement is a process of its own (`gpu_step.py`), so that running out of memory or a crash ends that one alone,
and is in the result file as soon as it is there: `--resume` goes on from the file. The order is that of importance, for
the minutes may end at any point: 60M, 200M and 1.1B in bfloat16 with the most promising settings, one setting of each
other model, the search, float8 where layers gain from it.

The search climbs along one axis after the other (rows per micro-batch, CUDA graphs, ...), from the best setting so far
through an ordered list of changes, and leaves an axis at the first change that is no faster. It finds no combination
whose parts are each slower; a full grid of one model would take an hour of GPU time.
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
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

from models.sizes import SIZES, num_parameters  # noqa: E402

GIB = 2**30
RECIPES = ("tensorwise", "rowwise")
STATE_BYTES = 16  # per parameter: float32 weight, gradient and AdamW's two moments
LEAST_SECONDS = 20  # of the budget that must be left to begin another measurement


@dataclass(frozen=True)
class Setting:
    """What is searched over; everything else is the configuration's default."""

    micro_batch_size: int
    accumulation: int = 1
    """Micro-batches per step."""
    activation_checkpointing: str = "none"
    loss_chunk_tokens: int = 0
    cuda_graphs: bool = False
    reshard_after_forward: bool = False
    float8: str = "none"

    def flags(self) -> dict[str, Any]:
        """Keys of the configuration."""
        return {
            "training.micro_batch_size": self.micro_batch_size,
            "training.global_batch_size": self.micro_batch_size * self.accumulation,
            "training.loss_chunk_tokens": self.loss_chunk_tokens,
            "activation_checkpointing.mode": self.activation_checkpointing,
            "compile.cuda_graphs": str(self.cuda_graphs).lower(),
            "parallel.reshard_after_forward": str(self.reshard_after_forward).lower(),
            "float8.recipe": self.float8,
        }

    def __str__(self) -> str:
        parts = [f"{self.micro_batch_size} rows x {self.accumulation}"]
        if self.activation_checkpointing != "none":
            parts.append(f"{self.activation_checkpointing} recomputation")
        if self.loss_chunk_tokens:
            parts.append(f"loss by {self.loss_chunk_tokens}")
        parts += ["CUDA graphs"] * self.cuda_graphs + ["reshard"] * self.reshard_after_forward
        return ", ".join(parts)


Changes = tuple[dict[str, Any], ...]
RECOMPUTATION: Changes = tuple({"activation_checkpointing": mode} for mode in ("budget", "selective", "full"))


@dataclass(frozen=True)
class Model:
    """A model, the setting to begin with, and the axes of its search."""

    family: str
    size: str
    sequence_length: int
    first: Setting
    axes: tuple[Changes, ...] = ()
    target: int = 0
    """Tokens/s on one H100 to reach."""


# First settings keep 50 to 70 GiB by the plan's estimate. The batch is the configuration's for 60M to 400M (96 rows);
# the larger models take fewer micro-batches than theirs, so that ten steps take seconds.
MODELS = {
    "60M": Model(
        "clm", "60M", 2048, Setting(48, 2), target=800_000,
        axes=(
            ({"micro_batch_size": 64}, {"micro_batch_size": 96, "accumulation": 1}),
            ({"cuda_graphs": True},),
            ({"accumulation": 4}, {"accumulation": 8}),
            ({"loss_chunk_tokens": 8192},),
            RECOMPUTATION,
            ({"micro_batch_size": 32, "accumulation": 3}, {"micro_batch_size": 24, "accumulation": 4}),
        ),
    ),
    "200M": Model(
        "clm", "200M", 2048, Setting(24, 4), target=300_000,
        axes=(
            ({"micro_batch_size": 32, "accumulation": 3}, {"micro_batch_size": 48, "accumulation": 2}),
            ({"cuda_graphs": True},),
            ({"accumulation": 8},),
            ({"loss_chunk_tokens": 8192},),
            RECOMPUTATION,
            ({"micro_batch_size": 16, "accumulation": 6}, {"micro_batch_size": 12, "accumulation": 8}),
        ),
    ),
    "1.1B": Model(
        "clm", "1.1B", 2048, Setting(8, 4), target=70_000,
        axes=(
            ({"micro_batch_size": 12}, {"micro_batch_size": 16}),
            ({"cuda_graphs": True},),
            ({"accumulation": 8},),
            ({"loss_chunk_tokens": 8192},),
            RECOMPUTATION,
            ({"micro_batch_size": 4, "accumulation": 8},),
        ),
    ),
    "400M": Model("clm", "400M", 2048, Setting(16, 6)),
    "llama3-1B": Model("llama3", "1B", 8192, Setting(2, 4)),
    "llama3-3B": Model("llama3", "3B", 8192, Setting(1, 4, "selective", 2048, reshard_after_forward=True)),
    "llama3-8B": Model("llama3", "8B", 8192, Setting(1, 4, "full", 2048, reshard_after_forward=True)),
    "debug": Model(
        "clm", "debug", 128, Setting(4),
        axes=(({"micro_batch_size": 8},), ({"accumulation": 2},), ({"loss_chunk_tokens": 256},)),
    ),
}  # fmt: skip
DEFAULT_MODELS = [name for name in MODELS if name != "debug"]


class OutOfTime(Exception):
    """The minutes are over."""


class Results:
    """The result file: the machine, and every measurement in the order in which it was made."""

    def __init__(self, path: Path, machine: dict[str, Any], resume: bool):
        self.path, self.content = path, machine | {"measurements": []}
        if not path.exists():
            return
        if not resume:
            raise SystemExit(f"{path} exists: --resume goes on with it, --out names another file")
        held = json.loads(path.read_text(encoding="utf-8"))
        old, new = ((c["device"], c["versions"]["torch"]) for c in (held, machine))
        if old != new:
            raise SystemExit(
                f"{path} was measured on {old[0]} with torch {old[1]}, this is {new[0]} with torch {new[1]}"
            )
        self.content = held

    @property
    def measurements(self) -> list[dict[str, Any]]:
        return self.content["measurements"]

    def find(self, flags: list[str]) -> dict[str, Any] | None:
        return next((row for row in self.measurements if row["flags"] == " ".join(flags)), None)

    def add(self, row: dict[str, Any]) -> None:
        """Take in a measurement, mark the best ones anew, and write the file; half a file is never seen."""
        self.content["measurements"] = [held for held in self.measurements if held["flags"] != row["flags"]] + [row]
        self.content["best"] = self._best()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".writing")
        scratch.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        scratch.replace(self.path)

    def best(self, model: str, float8: str = "none") -> dict[str, Any] | None:
        """The fastest measurement of a model, by float8 recipe."""
        rows = [r for r in self.measurements if r["model"] == model and r["setting"]["float8"] == float8]
        rows = [row for row in rows if row["status"] == "measured"]
        return max(rows, key=lambda row: row["tokens_per_second_per_gpu"], default=None)

    def _best(self) -> list[dict[str, Any]]:
        for row in self.measurements:
            row.pop("best", None)
        found = []
        for name, model in MODELS.items():
            for recipe in ("none", *RECIPES):
                if (row := self.best(name, recipe)) is None:
                    continue
                row["best"] = True
                entry = {key: row[key] for key in ("model", "precision", "flags", "tokens_per_second_per_gpu")}
                # The targets are for one H100 of the SXM kind, the one that peaks at 989 TFLOP/s.
                if model.target and "H100" in self.content["device"] and self.content.get("peak_flops") == 989e12:
                    reached = row["tokens_per_second_per_gpu"] >= model.target
                    entry |= {"target_tokens_per_second": model.target, "target_reached": "yes" if reached else "no"}
                found.append(entry)
        return found


class Campaign:
    """Measures settings one after the other while there is time."""

    def __init__(self, options: argparse.Namespace, extra: list[str]):
        self.options, self.extra = options, extra
        self.deadline = time.monotonic() + 60 * options.minutes
        machine = self.run_step({"kind": "describe", "device": options.device}, 120)[0]
        if "device" not in machine:
            raise SystemExit(machine["reason"])
        self.on_gpu = machine.pop("device_type") == "cuda"
        self.machine = {"date": datetime.now(UTC).date().isoformat(), "command": " ".join(sys.argv)} | machine
        named = re.compile("PYTORCH_|TORCH|OMP_|NCCL_|CUDA_")
        self.machine["environment"] = {key: v for key, v in self.environment().items() if named.match(key)}
        slug = re.sub(r"\W+", "_", self.machine["device"]).lower() if self.on_gpu else "cpu"
        self.path = options.out or ROOT / "benchmarks" / "results" / f"gpu_{slug}.json"
        self.longest = 0.0

    def open(self) -> None:
        self.results = Results(self.path, self.machine, self.options.resume)

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
        if row is None or row["status"] == "out of time":
            row = {"model": name, "precision": self.precision(setting), "setting": asdict(setting)}
            row |= {"flags": " ".join(flags), "date": datetime.now(UTC).isoformat(timespec="seconds")}
            row |= self.refused(name, setting) or self.run_measurement(flags, setting)
            if "compute_dtype" in row and setting.float8 == "none":
                row["precision"] = row["compute_dtype"]
            self.results.add(row)
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
        model = MODELS[name]
        shape = SIZES[model.family][model.size]
        if setting.float8 != "none" and not gains(name, setting.float8):
            return {"status": "skipped", "reason": "no layer gains from it (parallel/float8_layers.py)"}
        held, there = STATE_BYTES * num_parameters(shape, padded=True), self.machine.get("device_memory_bytes")
        if there and not self.extra and held > there:
            text = f"weights, gradients and moments alone are {held / GIB:.0f} GiB, the GPU has {there / GIB:.0f}"
            return {"status": "skipped", "reason": text}
        return None

    def run_measurement(self, flags: list[str], setting: Setting) -> dict[str, Any]:
        left = self.deadline - time.monotonic()
        if left < max(LEAST_SECONDS, 0.7 * self.longest):
            raise OutOfTime
        limit, begin = min(left, self.options.limit), time.monotonic()
        request = {"kind": "measure", "flags": flags, "steps": self.options.steps}
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
            command = [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py"), str(path)]
            with open(log, "wb") as out:
                # A group of its own, so that its compiler processes end with it; the session stays this one's.
                process = subprocess.Popen(
                    command, cwd=ROOT, env=self.environment() | environment, stdin=subprocess.DEVNULL,
                    stdout=out, stderr=subprocess.STDOUT, process_group=0,
                )  # fmt: skip
                in_time = True
                try:
                    process.wait(limit)
                except subprocess.TimeoutExpired:
                    in_time = False
                finally:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            text = log.read_text(encoding="utf-8", errors="replace")
            answer = path.with_suffix(".answer")
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
    names.sort(key=lambda name: not MODELS[name].axes)  # those that are searched come first
    climbs = [climb(campaign, name, options.search) for name in names]
    while climbs:  # taking turns: first settings of all models, then a trial of each
        climbs = [one for one in climbs if next(one, "done") != "done"]
    for recipe in RECIPES if options.float8 else ():
        for name in names:
            if (row := campaign.results.best(name)) is not None:
                campaign.measure(name, replace(Setting(**row["setting"]), float8=recipe))


def gains(name: str, recipe: str) -> bool:
    """Whether any layer of a model becomes float8."""
    from parallel.float8_layers import choices
    from train.config import Float8Config

    shape = SIZES[MODELS[name].family][MODELS[name].size]
    return any(not choice.reason for choice in choices(shape, Float8Config.model_validate({"recipe": recipe})))


def outcome(row: dict[str, Any]) -> str:
    """One measurement in words."""
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    mfu = f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
    speed = f"{row['tokens_per_second_per_gpu']:,.0f} tokens/s (spread {row['spread']:.1%}){mfu}"
    return f"{speed}, {gib(peak_bytes(row))} GiB, {row['process_seconds']:.0f} s"


def peak_bytes(row: dict[str, Any]) -> int | None:
    return row.get("peak_reserved_bytes", row.get("peak_resident_bytes"))


def gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.1f}"


COLUMNS = ("model", "precision", "setting", "tokens/s/GPU", "spread", "MFU", "peak GiB", "planned GiB", "")


def table_rows(content: dict[str, Any]) -> list[list[str]]:
    """The measurements as text, by model; the best are marked and say whether a target is reached."""
    reached = {entry["flags"]: entry for entry in content.get("best", []) if "target_reached" in entry}
    rows = []
    for row in sorted(content["measurements"], key=lambda row: list(MODELS).index(row["model"])):
        line = [row["model"], row["precision"], str(Setting(**row["setting"]))]
        if row["status"] != "measured":
            reason = f": {row['reason']}" if row["status"] == "skipped" else ""
            rows.append([*line, "", "", "", "", "", row["status"] + reason])
            continue
        note = "best" if row.get("best") else ""
        if (target := reached.get(row["flags"])) is not None:
            note += f"; target {target['target_tokens_per_second']:,}: {target['target_reached']}"
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
        line += [f"{row['tokens_per_second_per_gpu']:,.0f}", f"{row['spread']:.1%}", mfu]
        rows.append([*line, gib(peak_bytes(row)), gib(row.get("planned_memory")), note])
    return rows


def show_table(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{content['device']}, torch {content['versions']['torch']}, {content['date']}")
    for column in COLUMNS:
        table.add_column(column, justify="right" if "/s" in column or "GiB" in column else "left")
    for line in table_rows(content):
        table.add_row(*line, style="bold" if line[-1].startswith("best") else None)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if "mfu_formula" in content:
        print(f"MFU = {content['mfu_formula']}; peak {content['peak_flops'] / 1e12:,.0f} TFLOP/s (dense bf16)")


def markdown(content: dict[str, Any]) -> str:
    lines = [list(COLUMNS), ["---"] * 3 + ["---:"] * 5 + ["---"], *table_rows(content)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def config_lines(results: Results) -> str:
    """TOML of the best setting of each model, without float8, for its configuration."""
    parts = []
    for name, model in MODELS.items():
        if (row := results.best(name)) is None:
            continue
        s = Setting(**row["setting"])
        file = f"{model.family}_{model.size}".lower().replace(".", "_")
        parts.append(
            f"# configs/{file}.toml: {row['tokens_per_second_per_gpu']:,.0f} tokens/s on one {results.content['device']}\n"
            f"[training]\nmicro_batch_size = {s.micro_batch_size}  # x GPUs must divide global_batch_size\n"
            f"loss_chunk_tokens = {s.loss_chunk_tokens}\n[parallel]\n"
            f"reshard_after_forward = {str(s.reshard_after_forward).lower()}\n[compile]\n"
            f'cuda_graphs = {str(s.cuda_graphs).lower()}\n[activation_checkpointing]\nmode = "{s.activation_checkpointing}"\n'
        )
    return "\n".join(parts)


def show_profile(campaign: Campaign, name: str) -> None:
    """Trace the best known setting of a model, or its first, and print the kernels that take most of the time."""
    setting = MODELS[name].first
    if campaign.path.exists():
        row = Results(campaign.path, campaign.machine, resume=True).best(name)
        setting = Setting(**row["setting"]) if row else setting
    trace = campaign.options.trace or ROOT / "outputs" / f"gpu_profile_{name}.json.gz"
    flags = campaign.flags(name, setting)
    request = {"kind": "measure", "flags": flags, "steps": campaign.options.steps, "trace": str(trace)}
    answer, log = campaign.run_step(request, 60 * campaign.options.minutes)
    if answer["status"] != "measured":
        raise SystemExit(f"{log}\n{answer['status']}: {answer['reason']}")
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
    print(f"wrote {found['trace']}")


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
    parser.add_argument("--resume", action="store_true", help="go on with the result file")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_DEVICE.json")
    parser.add_argument("--markdown", action="store_true", help="print the table in markdown, too")
    parser.add_argument("--write-configs", action="store_true", help="print the best settings as TOML")
    parser.add_argument("--profile", metavar="MODEL", help="trace one setting of a model instead of measuring")
    parser.add_argument("--trace", type=Path, help="file of --profile (default: outputs/gpu_profile_MODEL.json.gz)")
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a measurement under way ends with this process
    campaign = Campaign(options, extra)
    if options.profile:
        show_profile(campaign, options.profile)
        return
    campaign.open()
    try:
        measure_all(campaign, options)
    except OutOfTime:
        print("the minutes are over: --resume goes on from here", flush=True)
    except KeyboardInterrupt:
        print("interrupted: --resume goes on from here", flush=True)
    content = campaign.results.content
    show_table(content)
    if options.markdown:
        print(markdown(content))
    if options.write_configs:
        print(config_lines(campaign.results))
    if content["measurements"]:
        print(f"results: {campaign.path}")


if __name__ == "__main__":
    main()
