"""Seeded runs under faults: each has to end at the right step with the losses of an undisturbed run, or say why not.

A seed gives a scenario and, at random, the number of processes, the process that is hit, the phase and the step. The run is
started again after each stop, as a scheduler would do it, until it ends by itself. `benchmarks/fault_campaign.py` makes a
table of many seeds; a few are part of the tests.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import fork_python, losses, quietly, read_metrics, tiny_flags, write_documents

from train.checkpoint import CheckpointError, checkpoint_names, committed_steps, read_tensors
from train.config_sources import load_config
from train.outcome import EXIT_CHECKPOINT, EXIT_HANG, EXIT_PREEMPTED

STEPS = 12
SETTINGS: dict[str, object] = {
    "training__steps": STEPS,
    "checkpoint__interval": 3,
    "checkpoint__keep": 3,
    "validation__interval": 6,
    "schedule__warmup_steps": 2,
    "faults__timeout": 10.0,
    "faults__start_timeout": 30.0,
}
LOOP = ["data", "step", "forward", "clip", "validate"]
SAVE = ["begin save", "copy", "write", "commit", "verify", "delete"]
STARTS = 6
"""More starts than any scenario needs."""
KILLED = -9


@dataclass
class Scenario:
    """What befalls a run.

    Args:
        actions: of `tests/faulty.py`, one of which is taken.
        phases: where, one of which is taken; none: at a random moment.
        codes: with which the disturbed start may end.
        damage: what happens to the newest checkpoint before the next start.
    """

    name: str
    actions: list[str]
    phases: list[str]
    codes: set[int]
    damage: Callable[[Path, random.Random], str] | None = None
    starts: int = 1
    """Starts that are disturbed."""


def truncate(folder: Path, dice: random.Random) -> str:
    file = dice.choice(sorted(path for path in folder.iterdir() if path.name != "verified.json"))
    file.write_bytes(file.read_bytes()[: dice.randrange(max(1, file.stat().st_size))])
    return f"{file.name} truncated"


def rot(folder: Path, dice: random.Random) -> str:
    file = dice.choice(sorted(path for path in folder.iterdir() if path.name != "verified.json"))
    data = bytearray(file.read_bytes())
    position = dice.randrange(len(data))
    data[position] ^= 1 << dice.randrange(8)
    file.write_bytes(data)
    return f"a bit of {file.name} flipped"


def remove(folder: Path, dice: random.Random) -> str:
    file = dice.choice(sorted(folder.glob("*.distcp")))
    file.unlink()
    return f"{file.name} removed"


def stale(folder: Path, dice: random.Random) -> str:
    """What a node leaves that went away in the middle of everything."""
    (folder.parent.parent / ".lock").write_text("a job that is no more")
    (folder.parent / "step-00000099").mkdir()
    (folder.parent / "step-00000099" / "__0_0.distcp").write_bytes(b"torn")
    (folder.parent.parent / "config.toml.tmp").write_text("torn")
    with open(folder.parent.parent / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    return "a stale lock, a torn checkpoint, a torn line of metrics"


SCENARIOS = [
    Scenario("killed at any moment", ["SIGKILL"], [], {KILLED, 1}, starts=2),
    Scenario("killed in the loop", ["SIGKILL"], LOOP, {KILLED, 1}),
    Scenario("killed in a save", ["SIGKILL"], SAVE, {KILLED, 1}, starts=2),
    Scenario("SIGTERM in the loop", ["SIGTERM"], LOOP, {EXIT_PREEMPTED}, starts=2),
    Scenario("SIGUSR1 in a save", ["SIGUSR1"], SAVE, {EXIT_PREEMPTED, 0}),
    Scenario("SIGTERM at the start", ["SIGTERM"], ["start", "build"], {EXIT_PREEMPTED, 1}),
    Scenario("signals at any moment", ["SIGTERM", "SIGUSR1"], [], {EXIT_PREEMPTED, 1, 0, -15, -10}, starts=2),
    Scenario("two signals", ["SIGTERM twice", "SIGUSR1 and SIGTERM"], LOOP + SAVE, {EXIT_PREEMPTED, 0}),
    Scenario("a process hangs", ["hang"], ["data", "step", "forward", "clip"], {EXIT_HANG, KILLED, 1}),
    Scenario("a process is stopped", ["SIGSTOP"], ["step", "forward", "validate"], {EXIT_HANG, KILLED, 1}),
    Scenario("a process throws", ["throw"], LOOP, {1}),
    Scenario("the saver dies", ["throw"], ["copy", "write"], {0, 1}),
    Scenario("truncated checkpoint", ["SIGKILL"], ["clip"], {KILLED, 1}, truncate),
    Scenario("bit rot", ["SIGTERM"], ["step"], {EXIT_PREEMPTED}, rot),
    Scenario("removed file", ["SIGKILL"], ["forward"], {KILLED, 1}, remove),
    Scenario("full disk", ["full disk"], SAVE[:4], {0, EXIT_CHECKPOINT}),
    Scenario("read-only disk", ["read-only disk"], SAVE[:4], {0, EXIT_CHECKPOINT}),
    Scenario("disk is gone", ["disk is gone"], SAVE[:4], {0, EXIT_CHECKPOINT}),
    Scenario("slow disk", ["slow disk"], ["step"], {0}),
    Scenario("stale files", ["SIGKILL"], SAVE, {KILLED, 1}, stale),
    Scenario("clock jump", ["clock back a day", "clock on a day"], ["step", "write"], {0}),
]


@dataclass
class Row:
    """What a seed came to."""

    seed: int
    scenario: str
    processes: int
    happened: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    largest_difference: float = float("nan")
    """Of a training or validation loss to the undisturbed run's of the same layout, in nats."""
    problem: str = ""
    """Empty where everything is as it has to be."""


class Campaign:
    """Runs seeds in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_documents(folder)
        self._straight: dict[int, list] = {}

    def straight(self, processes: int) -> list[tuple[int, float]]:
        """The losses of a run that nobody disturbs."""
        if processes not in self._straight:
            flags = self._flags(f"straight-{processes}", processes)
            quietly(load_config([], flags, processes))
            fork_python(self.folder, "train/main.py", *flags, processes=processes)
            self._straight[processes] = losses(read_metrics(self.folder / f"straight-{processes}"))
        return self._straight[processes]

    def run(self, seed: int) -> Row:
        """One seed, from its first start to its end."""
        dice = random.Random(seed)
        scenario = SCENARIOS[seed % len(SCENARIOS)]
        processes = dice.choice([2, 2, 4])
        row = Row(seed, scenario.name, processes)
        straight = self.straight(processes)
        name = f"seed-{seed}"
        run, checkpoints = self.folder / name, self.folder / name / "checkpoints"
        newest, codes = 0, {0}
        for start in range(STARTS):
            faults = [self._fault(scenario, processes, dice, newest)] if start < scenario.starts else []
            row.happened += [_describe(fault) for fault in faults]
            flags = self._flags(name, processes)
            arguments = ["tests/faulty.py", json.dumps(faults), *flags] if faults else ["train/main.py", *flags]
            done = fork_python(self.folder, *arguments, processes=processes, check=False)
            row.codes.append(done.returncode)
            steps = committed_steps(checkpoints)
            if max(steps, default=0) < newest:
                row.problem = f"step {newest} was committed and is lost"
                return row
            newest = max(steps, default=0)
            codes = scenario.codes | {0} if faults else {0}
            if scenario.damage and start == scenario.starts and done.returncode == EXIT_CHECKPOINT:
                codes |= {EXIT_CHECKPOINT}
            if done.returncode not in codes:
                row.problem = f"start {start + 1} ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
                return row
            if done.returncode == EXIT_CHECKPOINT and scenario.damage and not faults:
                if "set aside" not in done.stdout and "No other checkpoint is complete" not in done.stderr:
                    row.problem = f"no clear error: {done.stderr[-1500:]}"
                row.happened.append("no other checkpoint: a clear error")
                return row
            if done.returncode == 0 and start >= scenario.starts - 1:
                break
            if scenario.damage and start == scenario.starts - 1 and steps:
                row.happened.append(f"{scenario.damage(steps[newest], dice)} at step {newest}")
                newest = min(steps) if len(steps) > 1 else 0
        return self._judge(row, run, straight)

    def _judge(self, row: Row, run: Path, straight: list[tuple[int, float]]) -> Row:
        if row.codes[-1] != 0:
            row.problem = f"did not end in {STARTS} starts"
            return row
        found = losses(read_metrics(run))
        if [step for step, _ in found] != [step for step, _ in straight]:
            row.problem = f"steps {[step for step, _ in found]}"
            return row
        row.largest_difference = max(abs(a - b) for (_, a), (_, b) in zip(found, straight))
        if row.largest_difference != 0.0:
            row.problem = "other losses than the undisturbed run's"
        steps = committed_steps(run / "checkpoints")
        if max(steps, default=0) != STEPS:
            row.problem = f"the last checkpoint is of step {max(steps, default=0)}"
        for path in steps.values():
            try:
                read_tensors(path, checkpoint_names(path))
            except CheckpointError as error:
                row.problem = f"a complete checkpoint cannot be read: {error}"
        shutil.rmtree(run)
        return row

    def _fault(self, scenario: Scenario, processes: int, dice: random.Random, newest: int) -> dict[str, Any]:
        fault: dict[str, Any] = {"rank": dice.randrange(processes), "action": dice.choice(scenario.actions)}
        if not scenario.phases:
            return fault | {"after": round(dice.uniform(0.2, 4.0), 2)}
        fault["phase"] = dice.choice(scenario.phases)
        if fault["phase"] in ("commit", "verify", "delete"):
            fault["rank"] = 0  # the others have no part in it
        late = scenario.damage is not None  # two checkpoints are there by then
        if fault["phase"] in ("start", "build"):
            return fault
        return fault | {"step": min(STEPS - 1, newest + dice.randint(6 if late else 0, 8))}

    def _flags(self, name: str, processes: int) -> list[str]:
        layout = {"parallel__shard": 2, "parallel__replicate": processes // 2}
        paths = f'["{self.folder}/document-*.txt"]'
        return tiny_flags(self.folder, self.folder, name, data__paths=paths, **SETTINGS, **layout)


def _describe(fault: dict[str, Any]) -> str:
    where = f"after {fault['after']} s" if "after" in fault else f"in {fault['phase']} from step {fault.get('step', 0)}"
    return f"{fault['action']} of process {fault['rank']} {where}"
