"""What several benchmarks share: commands of the project, effects by name, and what a result says of its machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PRESETS = ROOT / "configs" / "transforms"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""One thread for each process: times of one and two processes can then be compared."""

_OPTICAL = 'kind = "optical"\nlevels = 256\n'
_ALL_BITS = "{ sign_exponent = 9.765625e-4, mantissa = 9.765625e-4, zero_above = "
INLINE = {
    "optical_linear": _OPTICAL + "attention = false\n",
    "bitflip_all_bits": f'kind = "bitflip"\nweight = {_ALL_BITS}1.25 }}\ninput = {_ALL_BITS}30.0 }}\n',
}
"""Effects that are measured under these names where `configs/transforms/` has no file of that name."""


def effects() -> list[str]:
    """Names that `effect_file` knows."""
    return sorted({file.stem for file in PRESETS.glob("*.toml")} | INLINE.keys())


def effect_file(name: str, folder: Path) -> Path:
    """The TOML file of an effect: the preset of this name, or one written into `folder`."""
    preset = PRESETS / f"{name}.toml"
    if preset.exists():
        return preset
    file = folder / f"{name}.toml"
    file.write_text("[[transforms]]\n" + INLINE[name], encoding="utf-8")
    return file


def tables(file: Path) -> list[dict[str, Any]]:
    """The `[[transforms]]` tables of a file."""
    return tomli.loads(file.read_text(encoding="utf-8"))["transforms"]


def run(*command: str) -> None:
    """Run a command of the project, its output to ours.

    Raises:
        CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | ENVIRONMENT, check=True)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows that a run has recorded so far."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be on its way


def processor() -> str:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("model name\t: ")[2].partition("\n")[0]


def commit() -> str:
    """The checked-out commit, with a "+" where files differ from it; outside a repository what COMMIT says, or ""."""
    described = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "")


MEASURED = ("benchmarks", "configs", "models", "parallel", "train", "transforms")
"""Folders whose files decide what a measurement is."""


def sources(*folders: str) -> str:
    """A fingerprint of all code and configuration in some folders; a copy of a checkout may have no history with it."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".toml", ".sh"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def query_gpu() -> tuple[str, int] | None:
    """Name and bytes of the first GPU by its driver, or None without one; without torch, whose start takes seconds."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, mebibytes = done.stdout.partition("\n")[0].rpartition(", ")
    return name, int(mebibytes) * 2**20


def origin(device: str, packages: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """When, of what and on what something is measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(), "commit": commit(), "sources": sources(*MEASURED), "device": device,
        "versions": {package: version(package) for package in packages},
    }  # fmt: skip


def write_json(result: dict[str, Any], file: Path) -> None:
    """Write a result file; whoever reads it, at whatever moment, finds the old or the new one whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".writing")
    scratch.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    scratch.replace(file)


def wikitext(data: Path) -> str:
    """WikiText-2's validation text, of the data folder."""
    return (data / "text" / "wikitext-2-valid.txt").read_text(encoding="utf-8")
