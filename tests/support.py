"""Helpers of the tests: starting scripts, a tiny run's flags, reading its metrics."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
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
        "metrics__log_interval": 1,
    } | changes
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
    return [(row["step"], row.get("loss", row.get("val_loss"))) for row in rows]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines, encoding="utf-8")
    return path


def quietly(config) -> list[Path]:
    """`prepare` without its messages."""
    from train.prepare import prepare

    return prepare(config, say=lambda text: None)
