"""Everything that needs one GPU in one command: an ordered list of stages, correctness first, then the figures.

    python benchmarks/gpu_session.py --out FOLDER [--part 1 --minutes 7.5 --resume --only speed,bitflip --device cpu]

Each stage (`gpu_stages.py`) is a process group of its own with a time limit of its own, and starts only while enough of the
minutes is left for it. `FOLDER/summary.json` is written anew before and after each stage, and what stages print goes to
`FOLDER/log.txt` line by line, so that a kill at any moment leaves all that was known. A stage with `beside` runs on while the
next ones do (tests beside the compilation of what is measured later); figures are taken alone.

`--resume` goes on from the folder: stages that passed on the same sources and device are not run again, stages that were
running when this script was killed are ended first. Exit codes: 0, all stages passed; 1, one did not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

from benchmarks.common import MEASURED, commit, query_gpu, sources, write_json  # noqa: E402
from benchmarks.gpu_stages import Stage, stages  # noqa: E402

GRACE = 6.0
"""Seconds between asking a stage to end and killing it: `gpu.py` takes its measurement along meanwhile."""
TAIL = 25
"""Last lines of a stage that the summary keeps."""
EXIT_UNFINISHED = 75
"""What a stage exits with that has not done all, but may be started again."""
MARK = "NEWCOMPUTE_STAGE"
"""Environment variable by which the processes of a stage are found, also after a kill of this script."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip


@dataclass
class Running:
    """A stage that has begun."""

    stage: Stage
    process: subprocess.Popen
    began: float
    deadline: float
    tail: list[str] = field(default_factory=list)
    unfinished_line: bytes = b""

    def lines(self) -> list[bytes]:
        """What it has printed since the last call, as whole lines."""
        assert self.process.stdout is not None
        data = b""
        with suppress(BlockingIOError):
            while chunk := os.read(self.process.stdout.fileno(), 1 << 16):
                data += chunk
        *lines, self.unfinished_line = (self.unfinished_line + data).split(b"\n")
        return lines

    def rest(self) -> list[bytes]:
        """What it has printed last, a line without an end included."""
        return [line for line in [*self.lines(), self.unfinished_line] if line]


class Session:
    """Runs stages while there is time, and keeps the summary current.

    Args:
        out: folder of the results.
        minutes: for everything.
        device: "cuda" or "cpu".
        resume: go on from the folder.
    """

    def __init__(self, out: Path, minutes: float, device: str, resume: bool):
        self.began = time.monotonic()
        self.deadline = self.began + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "summary.json"
        held = json.loads(self.file.read_text(encoding="utf-8")) if resume and self.file.exists() else {}
        self.log: BinaryIO = open(out / "log.txt", "ab" if resume else "wb", buffering=0)  # noqa: SIM115 - until the end
        gpu = query_gpu() if device == "cuda" else None
        self.origin = {"sources": sources(*MEASURED, "tests"), "device": gpu[0] if gpu else device}
        self.content: dict[str, Any] = self.origin | {
            "commit": commit(), "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "python": platform.python_version(),
            "minutes": minutes, "earlier": held.get("earlier", []), "stages": held.get("stages", []),
        }  # fmt: skip
        if held:
            kept = ("began", "commit", "sources", "minutes", "seconds")
            self.content["earlier"].append({key: held[key] for key in kept})
        passed = self.origin | {"state": "passed"}
        self.passed = {row["name"] for row in held.get("stages", []) if passed.items() <= row.items()}
        self.running: list[Running] = []
        self.selector = selectors.DefaultSelector()
        kill_marked(f"{self.file}|")  # they would take their share of the GPU from what is timed now
        for row in self.content["stages"]:
            if row["state"] == "running":
                row["state"] = "interrupted"
        self.write()

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self.began, 1)
        write_json(self.content, self.file)

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.began:6.1f}] {text}\n"
        print(line, end="", flush=True)
        self.log.write(line.encode())

    def run(self, wanted: Iterable[Stage]) -> None:
        """Run stages in order, but for those that have passed before; returns when all have ended."""
        for stage in wanted:
            if stage.name in self.passed:
                self.say(f"{stage.name}: passed before")
                continue
            if not stage.beside:
                self.wait_for_all()
            if self.left < stage.least:
                self.record({"name": stage.name, "state": "no time", "left": round(self.left, 1)})
                continue
            self.start(stage)
            if not stage.beside:
                self.wait_for_all()
        self.wait_for_all()

    def start(self, stage: Stage) -> None:
        limit = min(stage.limit, self.left - GRACE)
        # Before it exists, so that a kill at this moment does not lose that it was begun.
        command = " ".join(stage.command)
        self.record({"name": stage.name, "state": "running", "limit": round(limit, 1), "command": command})
        environment = ENVIRONMENT | os.environ | stage.environment | {MARK: f"{self.file}|{stage.name}|"}
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0,
            )  # fmt: skip
        except OSError as error:
            self.record(self.row(stage.name) | {"state": "failed (could not start)", "tail": [str(error)]})
            return
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        now = time.monotonic()
        running = Running(stage, process, now, now + limit)
        self.running.append(running)
        self.selector.register(process.stdout, selectors.EVENT_READ, running)

    def wait_for_all(self) -> None:
        """Until no stage runs: passes on what they print, ends those that are over their limits."""
        while self.running:
            for key, _ in self.selector.select(timeout=0.1):
                self.pass_on(key.data)
            for running in list(self.running):
                if running.process.poll() is not None:
                    self.finish(running, "passed" if running.process.returncode == 0 else self.failure(running))
                elif time.monotonic() > running.deadline:
                    self.end_politely(running)
                    self.finish(running, "out of time")

    @staticmethod
    def failure(running: Running) -> str:
        code = running.process.returncode
        return "out of time" if code == EXIT_UNFINISHED else f"failed ({code})"

    def end_politely(self, running: Running) -> None:
        """Ask a stage to end, and go on reading what it says; `finish` kills what is left."""
        with suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGTERM)
        patience = time.monotonic() + GRACE
        while running.process.poll() is None and time.monotonic() < patience:
            self.pass_on(running)
            time.sleep(0.05)

    def finish(self, running: Running, state: str) -> None:
        if kill_marked(f"{self.file}|{running.stage.name}|"):
            state += ", processes cannot be killed"
        with suppress(subprocess.TimeoutExpired):
            running.process.wait(1.0)
        for scratch in self.file.parent.glob("*.writing"):  # of a result that was just being written
            scratch.unlink(missing_ok=True)
        self.pass_on(running, running.rest())
        assert running.process.stdout is not None
        self.selector.unregister(running.process.stdout)
        running.process.stdout.close()
        self.running.remove(running)
        row = self.row(running.stage.name)
        row |= {"state": state, "seconds": round(time.monotonic() - running.began, 1), "tail": running.tail}
        self.record(row)

    def pass_on(self, running: Running, lines: list[bytes] | None = None) -> None:
        """What a stage has printed goes to the log at once, and its end to the summary."""
        for line in running.lines() if lines is None else lines:
            self.log.write(f"{running.stage.name} | ".encode() + line + b"\n")
            running.tail = [*running.tail, line.decode(errors="replace").rstrip()[:400]][-TAIL:]

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.content["stages"] if row["name"] == name)

    def record(self, row: dict[str, Any]) -> None:
        kept = [held for held in self.content["stages"] if held["name"] != row["name"]]
        self.content["stages"] = [*kept, row | self.origin]
        self.write()
        if row["state"] != "running":
            last = (row.get("tail") or [""])[-1][:200]
            self.say(f"{row['name']}: {row['state']} after {row.get('seconds', 0)} s: {last}")

    def close(self) -> None:
        """End what still runs, also where this script was asked to end."""
        for running in list(self.running):
            self.end_politely(running)
            self.finish(running, "interrupted")
        self.write()
        self.log.close()


def kill_marked(mark: str, patience: float = 10.0) -> list[int]:
    """Kill every process that began under a mark, in whatever group, until none is left: one may just start another.

    Returns:
        Those that are still there after some seconds: a process that waits inside a driver does not end.
    """
    deadline = time.monotonic() + patience
    while (pids := marked(mark)) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return pids


def marked(mark: str) -> list[int]:
    """Ids of the live processes whose environment has a mark that begins so."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            if any(variable.startswith(wanted) for variable in variables):
                found.append(int(folder.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; at most eight files")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything")
    parser.add_argument("--part", type=int, choices=[1, 2], default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: a dry run of every stage")
    parser.add_argument("--resume", action="store_true", help="go on from the folder")
    parser.add_argument("--only", default="", help="names of stages, separated by commas")
    options = parser.parse_args()
    out = options.out.absolute()
    if (out / "summary.json").exists() and not options.resume:
        parser.error(f"{out} has a summary: --resume goes on from it, another --out begins anew")
    planned = stages(options.part, out, options.device)
    only = {name.strip() for name in options.only.split(",") if name.strip()}
    if unknown := only - {stage.name for stage in planned}:
        parser.error(f"--only: {sorted(unknown)[0]!r} is none of {', '.join(stage.name for stage in planned)}")
    session = Session(out, options.minutes, options.device, options.resume)
    wanted = [stage for stage in planned if not only or stage.name in only]
    try:
        session.run(wanted)
    finally:
        session.close()
    states = {stage.name: session.row(stage.name)["state"] for stage in wanted}
    print(json.dumps(states))
    sys.exit(0 if set(states.values()) <= {"passed"} else 1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stages end with this process
    main()
