"""Check every GPU, the links between them and the run's disk before a run, and name what is bad.

    python -m launch.elastic --standalone --nproc_per_node 8 launch/preflight.py --config configs/llama3_8b.toml

Takes the flags of `train/main.py`; less than a minute. Each process checks its own device first and reports through the
rendezvous store, so that a link which hangs afterwards cannot hide the report. Prints a table; exits 2 when something is bad.
On CPU the same checks run over gloo, but a slow process is only mentioned: CPU cores are shared.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [_ROOT] + [entry for entry in sys.path if entry not in (_ROOT, str(Path(__file__).resolve().parent))]

from train.config import Config  # noqa: E402
from train.config_sources import ConfigError, exit_with, load_config, split_arguments  # noqa: E402
from train.outcome import EXIT_SETUP, tell_launcher  # noqa: E402

PATIENCE = timedelta(seconds=120)
"""Longest wait for another process, and for one exchange."""
SLOW = 0.8
"""A device with less than this share of the median's speed is bad: GPUs of one kind differ by a few percent."""
MAX_SKEW = 5.0
"""Seconds between clocks: times in logs, metrics and checkpoints are compared across nodes."""
MIN_FREE_GIB = 1.0
SPEEDS = {
    "tflops": "TFLOP/s",
    "memory_gbs": "memory GB/s",
    "link_gbs": "link GB/s",
    "all_reduce_gbs": "all-reduce GB/s",
}
NVIDIA_SMI_FIELDS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors",
    "clocks_throttle_reasons.hw_slowdown": "hardware slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown": "thermal slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "power brake",
}

Report = dict[str, Any]
"""One process's findings: "rank", "node", "device" (name), "kind" (cpu or cuda), "problems", the figures of `SPEEDS`, "time"."""


def main() -> None:
    """Check, print the table on rank 0, and end with exit code 0 or 2 on every process."""
    try:
        files, _, flags = split_arguments(sys.argv[1:])
        config = load_config(files, flags, int(os.environ.get("WORLD_SIZE", 1)))
    except ConfigError as error:
        if tell_launcher(EXIT_SETUP, str(error)):
            return
        exit_with(error)
    problems = check(config)
    if problems:
        message = "the pre-flight check failed:\n" + "\n".join(f"      {problem}" for problem in problems)
        message += (
            "\n  Leave these nodes out (sbatch --exclude=NODE) or repair them, then start the same command again."
        )
        if not tell_launcher(EXIT_SETUP, message):
            exit_with(RuntimeError(message), EXIT_SETUP)


def check(config: Config) -> list[str]:
    """All checks, collective over all processes; the problems found, the same list on every process."""
    import torch.distributed as dist

    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a link that hangs becomes an error here, not the end of the process
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        store = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))[0]
    else:
        store = dist.HashStore()
    store.set_timeout(PATIENCE)
    mine: Report = {"rank": rank, "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "problems": []}
    mine |= check_device(config, mine["problems"])
    mine |= check_disk(Path(config.run.dir), store, rank, mine["problems"])
    store.set(f"device/{rank}", json.dumps(mine))
    if size > 1:
        mine |= check_links(store, rank, size, mine["kind"], mine["problems"])
    store.set(f"links/{rank}", json.dumps(mine))
    if rank == 0:
        deadline = time.monotonic() + PATIENCE.seconds
        reports = [gather(store, other, deadline) for other in range(size)]
        found, remarks = judge(reports)
        print_table(reports, remarks)
        store.set("verdict", json.dumps(found))
    try:
        store.wait(["verdict"], 5 * PATIENCE)  # rank 0 has waited for silent ones in every part
        problems = json.loads(store.get("verdict"))
    except RuntimeError:
        return ["process 0 has given no verdict"]
    store.set(f"read/{rank}", "1")
    if rank == 0:  # which may hold the store itself
        wait_for(store, [f"read/{one['rank']}" for one in reports if "tflops" in one])
    if dist.is_initialized() and not problems:
        dist.destroy_process_group()  # not after a link has failed: that would wait for it
    return problems


def gather(store: Any, rank: int, deadline: float) -> Report:
    """A process's last report, or what is known of one that is silent."""
    try:
        store.wait([f"links/{rank}"], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        return json.loads(store.get(f"links/{rank}"))
    except RuntimeError:
        pass
    if store.check([f"device/{rank}"]):
        report = json.loads(store.get(f"device/{rank}"))
        report["problems"].append("did not come back from the exchange with the other processes")
        return report
    problem = f"has not reported within {PATIENCE.seconds} s"
    return {"rank": rank, "node": "unknown", "device": "unknown", "kind": "unknown", "problems": [problem]}


# One device


def check_device(config: Config, problems: list[str]) -> Report:
    """Name, errors that the driver counts, a matrix product with a known result, memory bandwidth."""
    import torch

    from parallel.mesh import choose_device

    try:
        device = choose_device(config.run.device)
    except ValueError as error:
        problems.append(str(error))
        return {"device": "unknown", "kind": "unknown"}
    if device.type == "cpu" and config.run.device == "auto" and shutil.which("nvidia-smi"):
        problems.append(
            "the node has an NVIDIA driver, but PyTorch sees no GPU (run.device = cpu says that it is meant)"
        )
    report: Report = {"kind": device.type, "device": "cpu"}
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            properties = torch.cuda.get_device_properties(device)
            report["device"] = properties.name
            problems += driver_problems(str(getattr(properties, "uuid", "")))
        report["tflops"] = check_product(device, problems)
        report["memory_gbs"] = check_memory(device)
    except RuntimeError as error:
        problems.append(f"the device fails: {str(error).splitlines()[0]}")
    return report


def driver_problems(uuid: str) -> list[str]:
    """What nvidia-smi reports against a GPU; nothing where there is no nvidia-smi or it does not know a field."""
    import subprocess

    if not shutil.which("nvidia-smi") or not uuid:
        return []
    found: list[str] = []
    query = ["nvidia-smi", "--format=csv,noheader,nounits", f"--id=GPU-{uuid.removeprefix('GPU-')}"]
    for field, name in NVIDIA_SMI_FIELDS.items():
        try:
            done = subprocess.run(
                [*query, f"--query-gpu={field}"], capture_output=True, text=True, timeout=30, check=False
            )
        except subprocess.TimeoutExpired:
            return [*found, "nvidia-smi does not answer"]
        value = done.stdout.strip()
        if done.returncode == 0 and (value == "Active" or (value.isdigit() and int(value) > 0)):
            found.append(f"{name}: {value}")
    return found


def check_product(device: Any, problems: list[str]) -> float:
    """TFLOP/s of a matrix product whose result is known.

    A[i, k] = (i + k) mod 7 - 3 and B[k, j] = (k + j) mod 5 - 2 have zero mean over their periods, 7 and 5, so the sum over
    each 35 values of k is zero (Chinese remainder theorem). What is left of K after whole periods sums to at most
    34 * 6 = 204: exact in bfloat16, and repeating every 7 rows and 5 columns.
    """
    import torch

    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    at = torch.arange(size, device=device)
    a = ((at[:, None] + at) % 7 - 3).to(dtype)
    b = ((at[:, None] + at) % 5 - 2).to(dtype)
    rest = range(size % 35)
    table = [[sum(((i + k) % 7 - 3) * ((k + j) % 5 - 2) for k in rest) for j in range(5)] for i in range(7)]
    expected = torch.tensor(table, device=device, dtype=dtype)[at[:, None] % 7, at % 5]
    product = a @ b
    wrong = int((product != expected).sum())
    if wrong:
        problems.append(f"a matrix product has {wrong:,} wrong numbers of {size * size:,}")
    seconds = timed(lambda: torch.mm(a, b, out=product), device)
    if not torch.equal(product, expected) and not wrong:
        problems.append("a matrix product, repeated, gives another result: the device errs now and then")
    return 2 * size**3 / seconds / 1e12


def check_memory(device: Any) -> float:
    """GB/s read and written by a copy within the device's memory."""
    import torch

    source = torch.ones(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / timed(lambda: target.copy_(source), device) / 1e9


def timed(work: Any, device: Any, seconds: float = 0.3) -> float:
    """Seconds per call, over enough calls to take `seconds`."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        wait()
        calls += 1
    return (time.perf_counter() - start) / calls


# Links, disk, clocks


def check_links(store: Any, rank: int, size: int, kind: str, problems: list[str]) -> Report:
    """Each process sends to the next in a ring, which names the link that is slow or wrong; then all sum a tensor."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    previous, following = (rank - 1) % size, (rank + 1) % size
    length = 2**26 if kind == "cuda" else 2**20  # float32: 256 MiB, 4 MiB
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=dist.PrefixStore("links", store),
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
            device_id=device if kind == "cuda" else None,
        )
        sent, received = torch.full((length,), float(rank), device=device), torch.empty(length, device=device)

        def ring() -> None:
            operations = [dist.P2POp(dist.isend, sent, following), dist.P2POp(dist.irecv, received, previous)]
            for request in dist.batch_isend_irecv(operations):
                request.wait()

        link = exchange_time(ring, device)
        if not bool((received == previous).all()):
            problems.append(f"receives wrong numbers from process {previous}")
        total = torch.full((length,), float(rank + 1), device=device)
        dist.all_reduce(total)
        if not bool((total == size * (size + 1) / 2).all()):
            problems.append("an all-reduce over all processes gives a wrong sum")
        reduce = exchange_time(lambda: dist.all_reduce(total), device)
        dist.barrier()
    except RuntimeError as error:
        problems.append(f"the exchange with the other processes fails: {str(error).splitlines()[0]}")
        return {}
    # All leave the barrier at the same time, to a few milliseconds: what the clocks show then can be compared.
    return {
        "time": time.time(),
        "link_gbs": 4 * length / link / 1e9,
        "all_reduce_gbs": 2 * (size - 1) / size * 4 * length / reduce / 1e9,
    }


def exchange_time(exchange: Any, device: Any, repeats: int = 5) -> float:
    """Seconds of an exchange: a fixed number of them, for all processes must take part in each."""
    import torch

    exchange()  # the first one connects
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        exchange()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def check_disk(folder: Path, store: Any, rank: int, problems: list[str]) -> Report:
    """Write, read back, free space, and whether all nodes see the same folder (rank 0's file)."""
    data = os.urandom(2**20)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if Path(file.name).read_bytes() != data:
                problems.append(f"{folder}: a file reads back differently from what was written")
            if rank == 0:
                store.set("file", Path(file.name).name)
                # Kept until the others have looked for it, or have had time to.
                wait_for(store, [f"looked/{other}" for other in range(1, int(os.environ.get("WORLD_SIZE", 1)))])
            elif not seen(folder / store.get("file").decode()):
                problems.append(f"{folder} is not the folder that process 0 sees: run.dir must be on a shared disk")
    except OSError as error:
        problems.append(f"{error.filename or folder}: {error.strerror or error}")
        store.set("file", "") if rank == 0 else None
    except RuntimeError:
        problems.append("process 0 has not written its file to the run's disk")
    store.set(f"looked/{rank}", "1")
    try:
        free = shutil.disk_usage(folder).free / 2**30
    except OSError:
        return {}
    if free < MIN_FREE_GIB:
        problems.append(f"{folder}: {free:.2f} GiB free")
    return {"free_gib": free}


def seen(file: Path) -> bool:
    """Whether a file is there; network file systems may show it some seconds late."""
    for _ in range(20):
        if file.exists():
            return True
        os.listdir(file.parent)  # makes NFS ask its server again
        time.sleep(0.5)
    return False


def wait_for(store: Any, keys: list[str]) -> None:
    try:
        if keys:
            store.wait(keys)
    except RuntimeError:
        return  # a silent process is named where reports are gathered


# The verdict


def judge(reports: list[Report]) -> tuple[list[str], list[str]]:
    """(problems, remarks) over all processes' reports: what each found, unlike devices, slow ones, clocks apart."""
    problems = [f"{place(one)}: {problem}" for one in reports for problem in one["problems"]]
    remarks: list[str] = []
    devices = [one["device"] for one in reports if one["device"] != "unknown"]
    usual = statistics.mode(devices) if devices else "unknown"
    problems += [
        f"{place(one)}: {one['device']}, where the others have {usual}"
        for one in reports
        if one["device"] not in (usual, "unknown")
    ]
    for key, unit in SPEEDS.items():
        speeds = [one[key] for one in reports if key in one]
        for one in reports if len(speeds) > 1 else ():
            median = statistics.median(speeds)
            if key in one and one[key] < SLOW * median:
                text = f"{place(one)}: {one[key]:.3g} {unit}, where the median is {median:.3g}"
                (problems if one["kind"] == "cuda" else remarks).append(text)
    times = [one["time"] for one in reports if "time" in one]
    for one in reports if times else ():
        skew = one.get("time", times[0]) - statistics.median(times)
        if abs(skew) > MAX_SKEW:
            problems.append(f"{place(one)}: its clock is {skew:+.1f} s off (is NTP or chrony running?)")
    return problems, remarks


def place(report: Report) -> str:
    return f"node {report['node']}, process {report['rank']}"


def print_table(reports: list[Report], remarks: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="pre-flight check", title_justify="left")
    for column in ("node", "process", "device", *SPEEDS.values(), "disk GiB free", "verdict"):
        table.add_column(column, overflow="fold")
    for one in reports:
        figures = [f"{one[key]:.3g}" if key in one else "-" for key in (*SPEEDS, "free_gib")]
        table.add_row(str(one["node"]), str(one["rank"]), one["device"], *figures, "; ".join(one["problems"]) or "good")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for remark in remarks:
        print(f"slow: {remark}", flush=True)


if __name__ == "__main__":
    main()
