"""A real SLURM of two nodes on one machine, in a folder of its own: its daemons, and what tests ask and do.

Nodes are addresses of the loopback interface with two GPUs each, which are plain files here. Nothing outside the folder is
written, and all daemons run as the current user. Needs Debian's packages slurm-wlm and munge, or their like.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from cluster import wait_until
from support import ROOT

NODES = ("127.0.0.2", "127.0.0.3")
DAEMONS = ("munged", "slurmctld", "slurmd")
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
CONFIGURATION = """
ClusterName=newcompute
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
# Records of requeues are named by the job: not as one that an earlier cluster has left behind.
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# Processes are found by their parents; control groups need rights that a container may lack.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=5
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
NodeName={nodes[0]} NodeAddr={nodes[0]} NodeHostname={host} Port={ports[1]} CPUs=8 Gres=gpu:2
NodeName={nodes[1]} NodeAddr={nodes[1]} NodeHostname={host} Port={ports[2]} CPUs=8 Gres=gpu:2
# A machine with fewer cores than its nodes claim; what is timed here is not the work.
SlurmdParameters=config_overrides
PartitionName=main Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE
"""


def executable(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class RealSlurm:
    """The cluster; its commands find it by SLURM_CONF in `environment`."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "state").mkdir(parents=True)
        values: dict[str, object] = {
            "host": socket.gethostname(),
            "user": getpass.getuser(),
            "folder": folder,
            "nodes": NODES,
        }
        values |= {"ports": free_ports(3), "first_job": int(time.time()) % 10**7 + 1}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        for number in range(2):
            (folder / f"gpu{number}").touch()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        # Files of jobs lie in folders that pytest makes for its user alone; munge asks for one that all may enter.
        folder.chmod(0o755)
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        self.jobs: list[str] = []
        try:
            self.begin()
        except BaseException:
            self.end()
            raise

    def begin(self) -> None:
        files = {name: f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        self.daemon("munged", "--force", f"--socket={self.folder}/munge.socket", *files.values())
        self.daemon("slurmctld", "-f", str(self.folder / "slurm.conf"))
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def daemon(self, name: str, *arguments: str) -> None:
        command = executable(name)
        assert command is not None, f"{name} is not installed"
        done = subprocess.run([command, *arguments], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"

    def start_node(self, node: str) -> None:
        self.daemon("slurmd", "-f", str(self.folder / "slurm.conf"), "-N", node)

    def wait_for_nodes(self) -> None:
        wait_until(lambda: self.command("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2, "two idle nodes", 60)

    def command(self, *words: str, cwd: Path = ROOT, **environment: str) -> str:
        done = subprocess.run(words, cwd=cwd, env=self.environment | environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path = ROOT, **environment: str) -> str:
        """Submit a script; the job's number."""
        words = ("sbatch", "--parsable", f"--output={self.folder}/%j.log", *arguments)
        self.jobs.append(self.command(*words, cwd=cwd, **environment).strip())
        return self.jobs[-1]

    def read(self, job: str) -> dict[str, str]:
        """What the scheduler says of a job."""
        words = self.command("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self, job: str) -> str:
        file = self.folder / f"{job}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def wait(self, job: str) -> tuple[str, int, int]:
        """State, exit code and number of requeues of a job that has ended for good."""
        try:
            wait_until(lambda: self.read(job)["JobState"] in FINAL, f"job {job}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.read(job)}\n{self.log(job)}") from None
        record = self.read(job)
        return record["JobState"], int(record["ExitCode"].split(":")[0]), int(record["Restarts"])

    def release(self, job: str, restarts: int) -> None:
        """Once a job has been put back into the queue so often, start it without the two minutes that SLURM waits.

        Not at once: within the same second the credential of the new start counts as revoked with that of the old one.
        """

        def waits() -> bool:
            record = self.read(job)
            assert record["JobState"] not in FINAL, f"{record}\n{self.log(job)}"
            return record["JobState"] == "PENDING" and int(record["Restarts"]) == restarts

        wait_until(waits, f"requeue {restarts} of job {job}")
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now+5")

    def signal(self, job: str, *options: str) -> None:
        self.command("scancel", "--signal=USR1", *options, job)

    def cancel(self, job: str) -> None:
        self.command("scancel", job)

    def processes(self, job: str, node: str, text: str) -> list[int]:
        """Ids of a job's live processes on a node whose command line holds a text, the oldest first."""
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURMD_NODENAME={node}".encode()}
        found = []
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                if process.name.isdigit() and wanted <= set((process / "environ").read_bytes().split(b"\0")):
                    words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if text in words:
                        found.append(int(process.name))
        return sorted(found)

    def lose_node(self, node: str) -> None:
        """All processes of a node are gone at once, its daemon too, and the controller notices."""
        (self.folder / f"slurmd.{node}.pid").unlink()
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                name = (process / "comm").read_text().strip() if process.name.isdigit() else ""
                words = (process / "cmdline").read_bytes() if name else b""
                of_node = b"SLURMD_NODENAME=" + node.encode() in (process / "environ").read_bytes() if name else False
                if of_node or (name.startswith("slurm") and f"{node}".encode() in words):
                    os.kill(int(process.name), signal.SIGKILL)
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def return_node(self, node: str) -> None:
        self.start_node(node)  # ReturnToService=2: it counts again as soon as it registers
        wait_until(
            lambda: "down" not in self.command("sinfo", "-h", "-n", node, "-o", "%T"), f"node {node} is back", 60
        )

    def end(self) -> None:
        """Take it all down."""
        for job in self.jobs:
            subprocess.run(["scancel", "--full", "--signal=KILL", job], env=self.environment, capture_output=True)
            subprocess.run(["scancel", job], env=self.environment, capture_output=True)
        for file in [*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid", self.folder / "munge.pid"]:
            with suppress(OSError, ValueError):
                stop(int(file.read_text()))


def stop(pid: int) -> None:
    """End a daemon, and wait until it has ended."""
    os.kill(pid, signal.SIGTERM)
    for _ in range(200):
        time.sleep(0.05)
        os.kill(pid, 0)  # raises once it is gone
    os.kill(pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
