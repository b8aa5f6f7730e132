"""Helpers of the tests: starting scripts, a tiny run's flags, reading its metrics."""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(
    *arguments: str, check: bool = True, processes: int = 1, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script of the project, under torchrun with several processes; output is captured as text."""
    command = [sys.executable, *arguments]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            *arguments,
        ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


_FORKS = multiprocessing.get_context("forkserver")
# Imports (3 s for each of several processes that share two cores) are paid once.
_FORKS.set_forkserver_preload(["tests.preload"])


def fork_script(logs: Path, *arguments: str, **environment: str) -> BaseProcess:
    """Start a script in a forked process that has torch and the project imported; it prints to `logs`.out and `logs`.err."""
    process = _FORKS.Process(target=_run_script, args=(str(logs), arguments, environment))
    with contextlib.chdir(ROOT):  # where the server, which the first start starts, finds what it imports
        process.start()
    return process


def _run_script(logs: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    for stream, name in ((1, f"{logs}.out"), (2, f"{logs}.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name="__main__")


def fork_python(
    logs: Path, *arguments: str, check: bool = True, processes: int = 1, **environment: str
) -> subprocess.CompletedProcess:
    """`run_python` for tests that are about a run, not about its start: neither torchrun nor imports take their seconds.

    Ranks have the variables that torchrun gives them, and like it the first one to fail ends the others.
    """
    ranks = [{}] if processes == 1 else [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        size = str(processes)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    files = [logs / f"rank-{rank}" for rank in range(processes)]
    started = [fork_script(file, *arguments, **environment, **rank) for file, rank in zip(files, ranks, strict=True)]
    deadline = time.monotonic() + 300
    try:
        while any(process.is_alive() for process in started) and not any(process.exitcode for process in started):
            assert time.monotonic() < deadline, f"{' '.join(arguments)} does not end"
            time.sleep(0.01)
        code = next((process.exitcode for process in started if process.exitcode), 0)
    finally:
        for process in started:
            process.kill()
            process.join()
    out, err = (
        "".join(file.with_suffix(end).read_text(encoding="utf-8") for file in files) for end in (".out", ".err")
    )
    if check and code != 0:
        raise AssertionError(f"{' '.join(arguments)} exited {code}\n{out}\n{err}")
    return subprocess.CompletedProcess(arguments, code, out, err)


def tiny_flags(run_dir: Path, corpus: Path, name: str = "run", **changes: object) -> list[str]:
    """Flags of a run that takes seconds: a two-layer model on bytes.

    `changes` are settings with "__" for the dot; None leaves one at the schema's default.
    """
    settings: dict[str, object] = {
        "run__name": name,
        "run__dir": run_dir,
        "run__device": "cpu",
        "data__dir": run_dir / "data",
        "data__source": "files",
        "data__paths": f'["{corpus / "corpus.txt"}"]',
        "data__validation_fraction": 0.05,
        "tokenizer__kind": "bytes",
        "model__shape__dim": 32,
        "model__shape__num_layers": 2,
        "model__shape__num_heads": 4,
        "model__shape__num_kv_heads": 2,
        "model__shape__ffn_dim": 80,
        "training__steps": 20,
        "training__global_batch_size": 8,
        "training__sequence_length": 64,
        "optimizer__lr": 3e-3,
        "schedule__warmup_steps": 4,
        "compile__enabled": "false",
        "checkpoint__interval": 5,
        "checkpoint__keep": 10,
        "validation__interval": 10,
        "validation__steps": 2,
        "faults__slow_rank": 0,  # processes that share cores take turns at being slow
        "metrics__log_interval": 1,
    }
    if changes.get("checkpoint__interval") == 0:
        del settings["checkpoint__keep"]
    if changes.get("validation__interval") == 0:
        del settings["validation__steps"]
    if changes.get("data__source") == "random":
        del settings["data__paths"], settings["data__validation_fraction"]
    settings |= changes
    return [
        part
        for key, value in settings.items()
        if value is not None
        for part in (f"--{key.replace('__', '.')}", str(value))
    ]


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(rows: list[dict]) -> list[tuple[int, float]]:
    """(step, loss) of training and validation rows."""
    return [(row["step"], row.get("loss", row.get("val_loss"))) for row in rows if "event" not in row]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines, encoding="utf-8")
    return path


def write_documents(folder: Path) -> None:
    """A corpus of many short documents, `document-*.txt`: the paragraphs of some standard modules."""
    import argparse
    import inspect
    import typing

    text = "\n".join(inspect.getsource(module) for module in (argparse, inspect, typing))
    for i, paragraph in enumerate(text.split("\n\n")[:1000]):
        (folder / f"document-{i:04}.txt").write_text(paragraph + "\n", encoding="utf-8")


def quietly(config) -> list[Path]:
    """`prepare` without its messages."""
    from train.prepare import prepare

    return prepare(config, say=lambda text: None)
