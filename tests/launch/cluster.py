"""Launchers as nodes of their own, and a stand-in SLURM, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support import ROOT, fork_script

STANDIN = Path(__file__).parent / "slurm" / "standin.py"
WORKER = str(Path(__file__).parent / "worker.py")
DEADLINE = 240.0


def wait_until(condition: Callable[[], object], what: str, deadline: float = DEADLINE) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {deadline} s"
        time.sleep(0.05)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


class Node:
    """One launcher and its processes, marked so that all can be found and killed together."""

    def __init__(self, folder: Path, name: str, *arguments: str):
        self.mark, self.err = f"{folder}/{name}.", folder / f"{name}.err"
        # In a process that has torch imported already: the import is most of a launcher's time.
        self.process = fork_script(
            folder / name, "launch/elastic.py", *arguments, STANDIN_NODE=self.mark, GLOO_SOCKET_IFNAME="lo"
        )

    def wait(self) -> int:
        self.process.join(DEADLINE)
        assert self.process.exitcode is not None, f"the launcher does not end:\n{self.err.read_text()}"
        return self.process.exitcode

    def said(self) -> str:
        """What the launcher itself printed, torch's log left out."""
        return "".join(
            line + "\n" for line in lines(self.err) if not line.startswith(("W1", "E1", "I1", "W0", "E0", "I0"))
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        slurm_standin().kill_all(self.mark)

    def signal(self, number: int) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)


def rendezvous(nodes: int, restarts: int = 0, processes: int = 2) -> list[str]:
    """Options of each launcher of a job on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        f"--nnodes={nodes}",
        f"--nproc_per_node={processes}",
        f"--max-restarts={restarts}",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        f"--rdzv_id={port}",
        "--local_addr=127.0.0.1",
    ]


def slurm_standin():
    import importlib.util

    os.environ.setdefault("STANDIN_SLURM", "/nonexistent")
    spec = importlib.util.spec_from_file_location("standin", STANDIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Slurm:
    """A cluster whose commands are on PATH in `environment`."""

    def __init__(self, folder: Path):
        self.folder = folder / "slurm"
        commands = self.folder / "bin"
        commands.mkdir(parents=True)
        for name in ("sbatch", "srun", "scontrol", "squeue"):
            (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STANDIN}" {name} "$@"\n')
            (commands / name).chmod(0o755)
        python = Path(sys.executable).parent
        self.environment = os.environ | {
            "STANDIN_SLURM": str(self.folder),
            "PATH": f"{commands}:{python}:{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        os.environ["STANDIN_SLURM"] = str(self.folder)
        self.standin = slurm_standin()
        self.jobs: list[str] = []

    def sbatch(self, *arguments: str, cwd: Path = ROOT, **environment: str) -> str:
        done = subprocess.run(
            [self.folder / "bin" / "sbatch", *arguments],
            cwd=cwd, env=self.environment | environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        self.jobs.append(done.stdout.split()[-1])
        return self.jobs[-1]

    def read(self, job: str) -> dict:
        return self.standin.Job(job).read()

    def log(self, job: str) -> str:
        return (self.folder / job / "log").read_text(errors="replace")

    def wait(self, job: str) -> dict:
        """The job's record once it has ended for good."""
        try:
            wait_until(lambda: self.read(job)["state"] in ("COMPLETED", "FAILED"), f"job {job}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log(job)}") from None
        return self.read(job)

    def signal(self, job: str) -> None:
        """What `--signal` does, now."""
        (self.folder / job / "signal").touch()

    def end(self) -> None:
        for job in self.jobs:
            for pid in self.standin.processes(f"{job}/"):
                os.kill(pid, signal.SIGKILL)
