"""The result file of `benchmarks/gpu.py`, and how it is shown: tables, and lines of configuration."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import write_json
from benchmarks.gpu_models import MODELS, Setting
from benchmarks.roofline import H100, TARGET
from models.sizes import peak_flops

GIB = 2**30
RECIPES = ("tensorwise", "rowwise")
COLUMNS = (
    "model",
    "precision",
    "setting",
    "tokens/s/GPU",
    "spread",
    "MFU",
    "of the roofline",
    "peak GiB",
    "planned GiB",
    "",
)


class Results:
    """The result file: the machine, and every measurement in the order in which it was made.

    Args:
        path: read if it exists and `resume` says so, written after each measurement.
        extra: flags of the configuration that all measurements have in common.
        resume: go on with the file.
        sources: fingerprint of the code that measures. What other code has measured is made again, and until then no best.
    """

    def __init__(self, path: Path, extra: list[str], resume: bool, sources: str):
        self.sources = sources
        self.path, self.content = path, {"extra_flags": " ".join(extra), "measurements": []}
        if not path.exists():
            return
        if not resume:
            raise SystemExit(f"{path} exists: --resume goes on with it, --out names another file")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("extra_flags", "") != self.content["extra_flags"]:
            theirs, ours = (c.get("extra_flags") or "no further flags" for c in (content, self.content))
            raise SystemExit(f"{path} was measured with {theirs}, this is {ours}: --out names another file")
        self.content = content

    @property
    def known(self) -> bool:
        """Whether anything was measured, so that the machine is known."""
        return "device" in self.content

    def set_machine(self, machine: dict[str, Any]) -> None:
        """Say on what the next measurement was made.

        Raises:
            SystemExit: on something else than those in the file.
        """
        if not self.known:
            self.content = machine | self.content
        self.check_device(machine["device"])
        old, new = ((c["versions"]["torch"]) for c in (self.content, machine))
        if old != new:
            raise SystemExit(f"{self.path} was measured with torch {old}, this is torch {new}")

    def check_device(self, name: str) -> None:
        """
        Raises:
            SystemExit: the file is of another device.
        """
        if self.known and self.content["device"] != name:
            raise SystemExit(f"{self.path} was measured on {self.content['device']}, this is {name}")

    @property
    def measurements(self) -> list[dict[str, Any]]:
        return self.content["measurements"]

    def find(self, flags: list[str]) -> dict[str, Any] | None:
        """What this code has measured with some flags."""
        wanted = {"flags": " ".join(flags), "sources": self.sources}
        return next((row for row in self.measurements if wanted.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Take in a measurement, mark the best ones anew, and write the file."""
        self.content["measurements"] = [held for held in self.measurements if held["flags"] != row["flags"]] + [row]
        self.content["best"] = self._best()
        write_json(self.content, self.path)

    def best(self, model: str, float8: str = "none") -> dict[str, Any] | None:
        """The fastest measurement of a model, by float8 recipe."""
        rows = [r for r in self.measurements if r["model"] == model and r["setting"]["float8"] == float8]
        rows = [row for row in rows if row["status"] == "measured" and row.get("sources") == self.sources]
        return max(rows, key=lambda row: row["tokens_per_second_per_gpu"], default=None)

    def _best(self) -> list[dict[str, Any]]:
        for row in self.measurements:
            row.pop("best", None)
        found = []
        for name, model in MODELS.items():
            for recipe in ("none", *RECIPES):
                if (row := self.best(name, recipe)) is None:
                    continue
                row["best"] = True
                entry = {key: row[key] for key in ("model", "precision", "flags", "tokens_per_second_per_gpu")}
                if model.target is not None and on_h100(self.content):
                    reached = row["tokens_per_second_per_gpu"] >= model.target
                    entry |= {"target_tokens_per_second": round(model.target)}
                    entry |= {"target_reached": "yes" if reached else "no"}
                found.append(entry)
        return found

    def add_profile(self, model: str, profile: dict[str, Any]) -> None:
        """Keep where the time of a model's step goes."""
        self.content.setdefault("profiles", {})[model] = profile
        write_json(self.content, self.path)


def on_h100(content: dict[str, Any]) -> bool:
    """Whether a file is of one H100 of the SXM kind, the device of the roofline and so of the targets."""
    return "H100" in content["device"] and content.get("peak_flops") == peak_flops(H100)


def part_of_roofline(content: dict[str, Any], row: dict[str, Any]) -> str:
    """What a measurement in bfloat16 reaches of an H100's roofline; empty on other devices."""
    if not on_h100(content) or row["precision"] != "bfloat16":
        return ""
    return f"{row['tokens_per_second_per_gpu'] / MODELS[row['model']].roofline:.0%}"


def outcome(row: dict[str, Any]) -> str:
    """One measurement in words."""
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    mfu = f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
    speed = f"{row['tokens_per_second_per_gpu']:,.0f} tokens/s (spread {row['spread']:.1%}){mfu}"
    return f"{speed}, {gib(peak_bytes(row))} GiB, {row['process_seconds']:.0f} s"


def peak_bytes(row: dict[str, Any]) -> int | None:
    return row.get("peak_reserved_bytes", row.get("peak_resident_bytes"))


def gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.1f}"


def table_rows(content: dict[str, Any]) -> list[list[str]]:
    """The measurements as text, by model; the best are marked and say whether a target is reached."""
    reached = {entry["flags"]: entry for entry in content.get("best", []) if "target_reached" in entry}
    rows = []
    for row in sorted(content["measurements"], key=lambda row: list(MODELS).index(row["model"])):
        line = [row["model"], row["precision"], str(Setting(**row["setting"]))]
        if row["status"] != "measured":
            reason = f": {row['reason']}" if row["status"] == "skipped" else ""
            rows.append([*line, "", "", "", "", "", "", row["status"] + reason])
            continue
        note = "best" if row.get("best") else ""
        if (target := reached.get(row["flags"])) is not None:
            note += f"; target {target['target_tokens_per_second']:,}: {target['target_reached']}"
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
        line += [
            f"{row['tokens_per_second_per_gpu']:,.0f}",
            f"{row['spread']:.1%}",
            mfu,
            part_of_roofline(content, row),
        ]
        rows.append([*line, gib(peak_bytes(row)), gib(row.get("planned_memory")), note])
    return rows


def show_table(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{content['device']}, torch {content['versions']['torch']}, {content['date']}")
    for column in COLUMNS:
        table.add_column(column, justify="right" if "/s" in column or "GiB" in column else "left")
    for line in table_rows(content):
        table.add_row(*line, style="bold" if line[-1].startswith("best") else None)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if "mfu_formula" in content:
        print(f"MFU = {content['mfu_formula']}; peak {content['peak_flops'] / 1e12:,.0f} TFLOP/s (dense bf16)")
    if any("target_reached" in entry for entry in content.get("best", [])):
        print(f"Targets are {TARGET:.0%} of the roofline (benchmarks/roofline.py)")


def markdown(content: dict[str, Any]) -> str:
    lines = [list(COLUMNS), ["---"] * 3 + ["---:"] * 6 + ["---"], *table_rows(content)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def config_lines(results: Results) -> str:
    """TOML of the best setting of each model, without float8, for its configuration."""
    parts = []
    for row in results.measurements:
        s, model = Setting(**row["setting"]), MODELS[row["model"]]
        if not row.get("best") or s.float8 != "none":
            continue
        file = f"{model.family}_{model.size}".lower().replace(".", "_")
        parts.append(
            f"# configs/{file}.toml: {row['tokens_per_second_per_gpu']:,.0f} tokens/s on one {results.content['device']}\n"
            f"[training]\nmicro_batch_size = {s.micro_batch_size}  # x GPUs must divide global_batch_size\n"
            f"loss_chunk_tokens = {s.loss_chunk_tokens}\n[parallel]\n"
            f"reshard_after_forward = {str(s.reshard_after_forward).lower()}\n[compile]\n"
            f'cuda_graphs = {str(s.cuda_graphs).lower()}\n[activation_checkpointing]\nmode = "{s.activation_checkpointing}"\n'
        )
    return "\n".join(parts)
