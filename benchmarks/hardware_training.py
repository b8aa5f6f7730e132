"""What training on each kind of hardware does to a small model, and what its simulation costs.

    python benchmarks/hardware_training.py debug         # 24 runs of 1,000 steps, about an hour on two cores
    python benchmarks/hardware_training.py quickstart    # the quickstart once for each, two processes
    python benchmarks/hardware_training.py debug --table # the page again, from the result file

`debug`: CLM debug on the embedded corpus, 256 tokens a step, three seeds of weights, data order and noise; a clean run takes
less than a minute. Beside each run, on the other core, one more clean run is always training: the pacer. Both rates are
medians over the steps that both made at the same time, after compilation and warm-up, so that whatever slows the machine slows
both; the cost is the pacer's rate over the run's. Clean runs are measured against the pacer as well, which shows how far
such a ratio can be trusted. Steps whose gradient is not finite are left out and counted; more than ten in a row end a run.

`quickstart`: configs/quickstart.toml, evaluated with the effects and without; no costs, since it takes both cores.

Bits per byte are those of held-out rows under the run's own effects. Finished runs are in the result file and are not
made again. Other flags go to the configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

from benchmarks import common  # noqa: E402
from train.outcome import EXIT_NON_FINITE  # noqa: E402

CLEAN = "clean"
SETTLED = 0.1
"""Share of a run's steps after which its rate counts."""
FEWEST_ROWS = 5
"""Logged rows that a median of rates needs."""


@dataclass(frozen=True)
class Plan:
    """A set of runs."""

    flags: str
    effects: tuple[str, ...]
    seeds: tuple[int, ...]
    processes: int
    paced: bool
    with_effects: str = ""
    """Further flags of runs with hardware effects."""


PLANS = {
    "debug": Plan(
        "--training.steps 1000 --training.global_batch_size 4 --training.sequence_length 64 --optimizer.lr 2e-3 "
        "--validation.steps 200 --metrics.log_interval 10",
        (CLEAN, "int8", "int4_a8", "bitnet_b158", "mxfp8", "mxfp4", "optical_8bit", "bitflip_published"),
        (1, 2, 3), 1, True,
    ),
    "quickstart": Plan(
        "",
        (CLEAN, "int8", "int4_a8", "bitnet_b158", "mxfp8", "mxfp4", "optical_8bit", "bitflip_mantissa", "bitflip_all_bits"),
        (1234,), 2, False, "--validation.transforms both",
    ),
}  # fmt: skip
COMMON = "--run.device cpu --validation.interval 1000000 --checkpoint.interval 0 --faults.non_finite skip"
PACER = ("--training.steps", "100000000", "--validation.interval", "0", "--validation.steps", "0")
"""Flags of a clean run that trains until it is stopped."""


class Runs:
    """Starts training runs that share one prepared corpus."""

    def __init__(self, plan: Plan, flags: list[str], folder: Path):
        self.processes, self.folder, self.with_effects = plan.processes, folder, plan.with_effects.split()
        base = ["--config", "configs/quickstart.toml", "--run.dir", str(folder), "--data.dir", str(folder / "data")]
        self.flags = [*base, *COMMON.split(), *plan.flags.split(), *flags]
        common.run("-m", "launch.cli", "prepare", *self.flags)

    def start(self, name: str, effect: str, *flags: str) -> subprocess.Popen:
        command = [sys.executable]
        if self.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        command += ["train/main.py", *self.flags, "--run.name", name, *flags]
        if effect != CLEAN:
            command += ["--config", str(common.effect_file(effect, self.folder)), *self.with_effects]
        with open(self.folder / f"{name}.log", "w", encoding="utf-8") as log:
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | common.ENVIRONMENT, stdout=log, stderr=log)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return common.read_rows(self.folder / name)

    def said(self, name: str) -> str:
        """The end of what a run has printed."""
        return "\n".join((self.folder / f"{name}.log").read_text(encoding="utf-8").splitlines()[-15:])

    @contextlib.contextmanager
    def pacer(self) -> Iterator[str]:
        """A clean run that trains as long as this context lasts.

        Raises:
            SystemExit: it ended by itself.
        """
        name = "pacer"
        process = self.start(name, CLEAN, *PACER)
        try:
            while not self.rows(name):
                if process.poll() is not None:
                    raise SystemExit(f"the clean run beside the others does not start:\n{self.said(name)}")
                time.sleep(0.2)
            yield name
            if process.poll() is not None:
                raise SystemExit(f"the clean run beside the others has ended:\n{self.said(name)}")
        finally:
            process.kill()
            process.wait()

    def finish(self, name: str, effect: str, seed: int) -> tuple[list[dict[str, Any]], bool]:
        """A run's rows, and whether it got to its end or gradients that were not finite stopped it.

        Raises:
            SystemExit: it failed otherwise.
        """
        process = self.start(name, effect, "--run.seed", str(seed))
        try:
            code = process.wait()
        finally:
            process.terminate()  # an interrupted one; torchrun then ends its processes
            process.wait()
        if code not in (0, EXIT_NON_FINITE):
            raise SystemExit(f"{name} ended with exit code {code}:\n{self.said(name)}")
        return self.rows(name), code == 0


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of one run say.

    The last loss is the mean of the last tenth of the logged ones, since a single step has few tokens. A step that was not
    finite is one that was left out, or whose loss was recorded as such.
    """
    logged = [row for row in rows if "lr" in row]
    losses = [row["loss"] for row in logged if row["loss"] is not None]
    bad = {row["step"] for row in logged if row["loss"] is None or row["grad_norm"] is None}
    bad |= {row["step"] for row in rows if row.get("event") == "skipped"}
    held_out = [row for row in rows if "val_loss" in row]
    found: dict[str, Any] = {"bits_per_byte": held_out[-1]["val_bits_per_byte"] if held_out else None}
    if held_out and "val_bits_per_byte_clean" in held_out[-1]:
        found["bits_per_byte_without_effects"] = held_out[-1]["val_bits_per_byte_clean"]
    return found | {
        "first_loss": losses[0] if losses else None,
        "first_loss_step": logged[0]["step"] if logged else None,
        "last_loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]) if losses else None,
        "non_finite_steps": len(bad),
    }


def cost(rows: list[dict[str, Any]], pacer: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Rates of a run and of the pacer while both trained, and the pacer's over the run's; None where that was too short."""

    def logged(of: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in of if "lr" in row]

    ours, theirs = logged(rows), logged(pacer)
    settled = [row["time"] for row in ours if row["step"] >= SETTLED * steps]
    begin, end = (settled[0], settled[-1]) if settled else (0.0, 0.0)

    def rate(of: list[dict[str, Any]]) -> float | None:
        within = [b["tokens_per_second"] for a, b in pairwise(of) if a["time"] >= begin and b["time"] <= end]
        return statistics.median(within) if len(within) >= FEWEST_ROWS else None

    own, clean = rate(ours), rate(theirs)
    known = own is not None and clean is not None
    return {"tokens_per_second": own, "tokens_per_second_of_pacer": clean, "cost": clean / own if known else None}


def campaign(plan: Plan, options: argparse.Namespace, result: dict[str, Any], work: Path) -> None:
    """Make the runs that `result` does not have yet, seed by seed; it is written after each."""
    done = {(row["effect"], row["seed"]) for row in result["runs"]}
    wanted = [(effect, seed) for seed in options.seeds for effect in options.effects if (effect, seed) not in done]
    if not wanted:
        return
    runs, made = Runs(plan, options.flags, work), common.origin(common.processor())
    with runs.pacer() if plan.paced else contextlib.nullcontext("") as pacer:
        for effect, seed in wanted:
            print(f"{effect}, seed {seed}", flush=True)
            rows, finished = runs.finish(f"{effect}-{seed}", effect, seed)
            row = {"effect": effect, "seed": seed, "finished": finished, **figures(rows)}
            if plan.paced:
                row |= cost(rows, runs.rows(pacer), rows[-1]["step"] if rows else 0)
            result["runs"].append(row | made)
            common.write_json(result, options.out)
            print(f"  {row}", flush=True)


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def line(effect: str, runs: list[dict[str, Any]]) -> dict[str, str]:
    """The cells of one effect; differences to clean are taken seed by seed."""
    of = [row for row in runs if row["effect"] == effect]
    clean = {row["seed"]: row["bits_per_byte"] for row in runs if row["effect"] == CLEAN}
    ended = [row for row in of if row["bits_per_byte"] is not None]
    cells = {"hardware": effect, "runs": f"{len(ended)} of {len(of)}"}
    cells["held-out bits per byte"] = spread([row["bits_per_byte"] for row in ended], 4) if ended else "none"
    pairs = [(row["bits_per_byte"], clean[row["seed"]]) for row in ended if clean.get(row["seed"])]
    differences = [100 * (noisy / base - 1) for noisy, base in pairs]
    cells["against clean"] = f"{statistics.fmean(differences):+.2f}%" if differences and effect != CLEAN else ""
    if any("bits_per_byte_without_effects" in row for row in runs):
        off = [row["bits_per_byte_without_effects"] for row in ended if "bits_per_byte_without_effects" in row]
        cells["with the effects off"] = spread(off, 4) if off else ""
    if any("cost" in row for row in runs):
        costs = [row["cost"] for row in of if row.get("cost") is not None]
        cells["time of a step over clean"] = (
            f"{statistics.median(costs):.2f} ({min(costs):.2f} to {max(costs):.2f})" if costs else "unknown"
        )
    cells["steps not finite"] = str(sum(row["non_finite_steps"] for row in of))
    known = [row for row in of if row["first_loss"] is not None]
    first, last = ([row[key] for row in known] for key in ("first_loss", "last_loss"))
    cells["training loss, first to last"] = (
        f"{statistics.fmean(first):.3f} to {statistics.fmean(last):.3f}" if known else "none"
    )
    return cells


def section(name: str, result: dict[str, Any]) -> str:
    """One plan's part of the page."""
    runs = result["runs"]
    lines = [line(effect, runs) for effect in dict.fromkeys(row["effect"] for row in runs)]
    head = list(lines[0])
    table = [head, ["---"] * len(head), *[[cells[key] for key in head] for cells in lines]]
    known = {key: sorted({str(row[key]) for row in runs}) for key in ("date", "commit", "device")}
    seeds = len({row["seed"] for row in runs})
    known["torch"] = sorted({row["versions"]["torch"] for row in runs})
    made = "; ".join(f"{key} {', '.join(values)}" for key, values in known.items())
    return (
        f"## {name}\n\n`python benchmarks/hardware_training.py {name}`, result `{result['file']}`: "
        f"{result['processes']} process{'es' if result['processes'] > 1 else ''} of one thread, {seeds} seed{'s' * (seeds > 1)}; "
        f"settings `{' '.join(result['settings'])}` on top of `configs/quickstart.toml` ({made}).\n\n"
        + "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n"
    )  # fmt: skip


HEAD = """# Training on each kind of hardware

Small models on the embedded corpus under the effects of `configs/transforms/` (the column *hardware* is the file's name
where there is one; the result files have each effect in full). This page is written by `benchmarks/hardware_training.py`.

Bits per byte: held-out rows, evaluated under the run's own effects; mean ± sample standard deviation over seeds of weights, data
order and noise, which are the same seeds in every row; *against clean* is the mean of the differences to the clean run of
the same seed. *Time of a step over clean*: median (smallest to largest) over seeds, against a clean run that trains beside it
on the other core at the same time; that of the clean runs themselves shows how exact this is. *Steps not finite*: over all
seeds. *Training loss*: nats per token at the first logged step, and the mean of the last tenth of the logged ones.

"""


def parse() -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=list(PLANS))
    parser.add_argument("--effects", help="comma-separated: clean, presets of configs/transforms and others by name")
    parser.add_argument("--seeds", help="comma-separated")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/hardware_training_PLAN.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "hardware-training.md")
    parser.add_argument("--table", action="store_true", help="only write the page, from the result files")
    options, options.flags = parser.parse_known_args()
    plan = PLANS[options.plan]
    options.effects = options.effects.split(",") if options.effects else list(plan.effects)
    unknown = [name for name in options.effects if name not in (CLEAN, *common.effects())]
    if unknown:
        parser.error(f"--effects: {unknown[0]!r} is none of {', '.join((CLEAN, *common.effects()))}")
    options.seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else list(plan.seeds)
    options.out = options.out or common.RESULTS / f"hardware_training_{options.plan}.json"
    return options, plan


def opened(options: argparse.Namespace, plan: Plan, work: Path) -> dict[str, Any]:
    """The result so far, or an empty one.

    Raises:
        SystemExit: it is one of other settings or effects.
    """
    settings = [*COMMON.split(), *plan.flags.split(), *plan.with_effects.split(), *options.flags]
    effects = {name: common.tables(common.effect_file(name, work)) for name in options.effects if name != CLEAN}
    new = {"plan": options.plan, "file": options.out.name, "processes": plan.processes, "settings": settings}
    if not options.out.exists():
        return new | {"effects": effects, "runs": []}
    result = json.loads(options.out.read_text(encoding="utf-8"))
    other = [name for name, found in effects.items() if result["effects"].setdefault(name, found) != found]
    if result["settings"] != settings or other:
        raise SystemExit(
            f"{options.out} is of other settings{''.join(f', {name} another effect' for name in other)}: name another --out, "
            "or remove it"
        )
    return result


def write_page(options: argparse.Namespace) -> None:
    """The page of all plans that have results beside this one's."""
    parts = []
    for name in PLANS:
        file = options.out if name == options.plan else options.out.with_name(f"hardware_training_{name}.json")
        if file.exists():
            parts.append(section(name, json.loads(file.read_text(encoding="utf-8"))))
    options.page.write_text(HEAD + "\n".join(parts), encoding="utf-8")
    print(f"wrote {options.page}")


def main() -> None:
    options, plan = parse()
    if not options.table:
        with tempfile.TemporaryDirectory() as folder:
            campaign(plan, options, opened(options, plan, Path(folder)), Path(folder))
    write_page(options)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the runs that were started
    main()
