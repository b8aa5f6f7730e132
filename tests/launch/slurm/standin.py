"""A stand-in for SLURM on one machine: `standin.py sbatch|srun|scontrol|squeue ...`, as `launch/slurm.sh` calls them.

It is for tests that must be fast and run where SLURM is not installed; `real.py` is the real one. Nodes are addresses of the
loopback interface (127.0.0.2, 127.0.0.3, ...). A node's processes are those whose environment holds its mark, in whatever
session they are. Jobs live in $STANDIN_SLURM/JOB/. What it copies from SLURM: environment variables, `#SBATCH` lines, signals
to every process of the steps and not to the script, a requeue that ends the script and counts in SLURM_RESTART_COUNT,
`--kill-on-bad-exit`, srun passing signals on and returning the highest exit code, states of squeue.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

KILL_WAIT = 5.0
"""Seconds from SIGTERM to SIGKILL; 30 in SLURM."""
ROOT = Path(os.environ["STANDIN_SLURM"])


def processes(mark: str) -> list[int]:
    """Ids of the live processes whose STANDIN_NODE starts with a mark, such as "7/" (job) or "7/train"."""
    found = []
    wanted = f"STANDIN_NODE={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(variable.startswith(wanted) for variable in variables):
            found.append(int(folder.name))
    return found


def send(mark: str, number: int) -> None:
    for pid in processes(mark):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill_all(mark: str) -> None:
    """Until none is left: a process may just be starting another."""
    while processes(mark):
        send(mark, signal.SIGKILL)
        time.sleep(0.05)


class Job:
    def __init__(self, number: str):
        self.number, self.folder = number, ROOT / number

    def read(self) -> dict:
        return json.loads((self.folder / "job.json").read_text())

    def write(self, **changes: object) -> None:
        record = (self.read() if (self.folder / "job.json").exists() else {}) | changes
        unfinished = self.folder / "job.json.tmp"
        unfinished.write_text(json.dumps(record))
        os.replace(unfinished, self.folder / "job.json")

    def take(self, flag: str) -> bool:
        """Whether a request was left for the job; it is taken away."""
        try:
            (self.folder / flag).unlink()
        except FileNotFoundError:
            return False
        return True


def options_of(words: list[str]) -> tuple[dict[str, str], list[str]]:
    options = {}
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0)[2:].partition("=")
        options[name] = value
    return options, words


def sbatch(words: list[str]) -> None:
    given, (script, *arguments) = options_of(words)
    lines = [line[7:] for line in Path(script).read_text().splitlines() if line.startswith("#SBATCH")]
    stated = options_of([word for line in lines for word in shlex.split(line)])[0]
    job = Job(str(os.getpid()))
    job.folder.mkdir(parents=True)
    job.write(state="PENDING", options=stated | given, script=script, arguments=arguments, starts=0)
    subprocess.Popen(
        [sys.executable, __file__, "controller", job.number],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=open(job.folder / "controller.err", "w"),  # noqa: SIM115
    )
    print(f"Submitted batch job {job.number}")


def controller(words: list[str]) -> None:
    """Run a job's script, again after each requeue."""
    job = Job(words[0])
    record = job.read()
    options = record["options"]
    nodes = [f"127.0.0.{2 + i}" for i in range(int(options.get("nodes", 1)))]
    environment = os.environ | {
        "SLURM_JOB_ID": job.number,
        "SLURM_JOB_NUM_NODES": str(len(nodes)),
        "SLURM_NNODES": str(len(nodes)),
        "SLURM_JOB_NODELIST": ",".join(nodes),
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURM_GPUS_ON_NODE": options.get("gpus-per-node", "1"),
        "SLURM_CPUS_PER_TASK": options.get("cpus-per-task", "1"),
        "STANDIN_NODE": f"{job.number}/batch",
    }
    restarts = 0
    while True:
        if restarts:
            environment["SLURM_RESTART_COUNT"] = str(restarts)
        job.write(state="RUNNING", starts=restarts + 1)
        code = run_script(job, record, environment)
        if code is not None:
            job.write(state="FAILED" if code else "COMPLETED", code=code)
            return
        restarts += 1


def run_script(job: Job, record: dict, environment: dict[str, str]) -> int | None:
    """The script's exit code; None when the job was put back into the queue."""
    name, _, _ = record["options"].get("signal", "").partition("@")
    with open(job.folder / "log", "ab") as log:
        script = subprocess.Popen(
            ["bash", record["script"], *record["arguments"]],
            env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    while script.poll() is None:
        time.sleep(0.05)
        if job.take("signal"):
            send(f"{job.number}/step", getattr(signal, f"SIG{name}"))
        if job.take("requeue"):
            kill_all(f"{job.number}/")
            script.wait()
            job.write(state="PENDING")
            return None
    kill_all(f"{job.number}/")
    return script.returncode if script.returncode >= 0 else 128 - script.returncode


def srun(words: list[str]) -> None:
    options, command = options_of(words)
    job, step = os.environ["SLURM_JOB_ID"], f"step{time.time_ns()}"
    nodes = os.environ["SLURM_JOB_NODELIST"].split(",")
    tasks = [
        subprocess.Popen(
            command,
            env=os.environ
            | {
                "SLURM_NODEID": str(i),
                "SLURM_PROCID": str(i),
                "SLURM_LOCALID": "0",
                "SLURMD_NODENAME": node,
                "STANDIN_NODE": f"{job}/{step}/{i}.",
            },
            start_new_session=True,
        )
        for i, node in enumerate(nodes)
    ]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: send(f"{job}/{step}/", number))
    ending: float | None = None
    while None in [task.poll() for task in tasks]:
        time.sleep(0.05)
        if ending is None and options.get("kill-on-bad-exit") == "1" and any(task.returncode for task in tasks):
            send(f"{job}/{step}/", signal.SIGTERM)
            ending = time.monotonic()
        if ending is not None and time.monotonic() - ending > KILL_WAIT:
            kill_all(f"{job}/{step}/")
    kill_all(f"{job}/{step}/")
    sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))


def scontrol(words: list[str]) -> None:
    if words[:2] == ["show", "hostnames"]:
        print(words[2].replace(",", "\n"))
    elif words[0] == "requeue":
        (ROOT / words[1] / "requeue").touch()
    else:
        sys.exit(f"scontrol: not a command of the stand-in: {words}")


def squeue(words: list[str]) -> None:
    options, _ = options_of(words)
    assert options["format"] == "%T", options
    print(Job(options["jobs"]).read()["state"])


if __name__ == "__main__":
    program, *rest = sys.argv[1:]
    {
        "sbatch": sbatch,
        "controller": controller,
        "srun": srun,
        "scontrol": scontrol,
        "squeue": squeue,
    }[program](rest)
