"""What a run says while it trains: metrics.jsonl always, a progress line, and W&B or TensorBoard when asked."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from models.sizes import FLOPS_FORMULA, LlamaShape, flops_per_token, peak_flops
from train.config import Config
from train.config_sources import to_toml
from train.redaction import redact

LN2 = math.log(2)


def bits_per_byte(nats_per_token: float, tokens_per_byte: float) -> float:
    """Loss in bits per byte of text: the headline number, since it can be compared between tokenizers."""
    return nats_per_token / LN2 * tokens_per_byte


def perplexity(nats_per_token: float) -> float:
    return math.exp(min(nats_per_token, 700.0))


class Throughput:
    """Tokens per second and model FLOPs utilisation (MFU) between two readings."""

    def __init__(self, shape: LlamaShape, config: Config, device: torch.device, world_size: int):
        self.tokens_per_step, self.world_size, self.device = config.tokens_per_step, world_size, device
        self.flops_per_token = flops_per_token(shape, config.training.sequence_length)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.peak = peak_flops(name) if device.type == "cuda" else None
        peak = f"{self.peak / 1e12:,.0f} TFLOP/s (dense bf16)" if self.peak else "unknown, so no MFU is shown"
        self.explanation = f"{self.flops_per_token:,} FLOPs per token = {FLOPS_FORMULA}; peak of {name}: {peak}"
        self._time, self._step, self._waited = time.perf_counter(), 0, 0.0

    def restart(self, step: int, waited: float) -> None:
        """Begin an interval, after work that is no training (validation, saving)."""
        self._time, self._step, self._waited = time.perf_counter(), step, waited

    def seconds(self) -> float:
        """Since the interval began."""
        return time.perf_counter() - self._time

    def read(self, step: int, waited: float) -> dict[str, Any]:
        """Figures of the steps since the last reading; `waited` is the total time spent waiting for data.

        Without a step since then, as after a first step that compiled, there are no rates.
        """
        now = time.perf_counter()
        elapsed, steps = max(now - self._time, 1e-9), step - self._step
        figures: dict[str, Any] = dict.fromkeys(
            ("tokens_per_second", "tokens_per_second_per_device", "mfu", "data_wait")
        )
        figures["memory_gib"] = round(self._memory(), 3)
        if steps > 0:
            rate = steps * self.tokens_per_step / elapsed
            per_device = rate / self.world_size
            figures["tokens_per_second"] = round(rate, 1)
            figures["tokens_per_second_per_device"] = round(per_device, 1)
            figures["mfu"] = round(per_device * self.flops_per_token / self.peak, 4) if self.peak else None
            figures["data_wait"] = round((waited - self._waited) / elapsed, 4)
        self._time, self._step, self._waited = now, step, waited
        return figures

    def _memory(self) -> float:
        """Peak so far in GiB: reserved by the allocator on GPU, resident set of the process on CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Recorder:
    """Writes metrics of the main process; on the others it does nothing."""

    def __init__(self, config: Config, folder: Path, active: bool, total_steps: int, first_step: int):
        self.active = active
        self._sinks: list[Any] = []
        if not active:
            return
        self._file = open(folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._pending, self._warned = b"", False
        self._screen = _Screen(total_steps)
        if config.metrics.wandb:
            self._sinks.append(_WandbSink(config, folder, resumed=first_step > 1))
        if config.metrics.tensorboard:
            self._sinks.append(_TensorboardSink(folder, first_step))

    def say(self, text: str) -> None:
        if self.active:
            self._screen.say(text)

    def record(self, row: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl and show it. Non-finite numbers become null: JSON has none."""
        if not self.active:
            return
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        self._write(clean)
        self._screen.show(row)
        for sink in self._sinks:
            sink.record(clean)

    def event(self, step: int, kind: str, message: str) -> None:
        """Something a reader of the run should know of, beside the curves: shown, and a row of its own."""
        if self.active:
            message = redact(message)
            self._write({"step": step, "event": kind, "message": message})
            self._screen.say(f"step {step}: {message}")

    def _write(self, row: dict[str, Any]) -> None:
        """A disk that takes no more must not end a run: rows wait in memory until it does."""
        self._pending += (json.dumps(row | {"time": round(time.time(), 3)}) + "\n").encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._warned:
                print(f"{self._file.name}: {error}; rows are kept in memory", file=sys.stderr, flush=True)
            self._warned = True

    def close(self) -> None:
        if self.active:
            self._screen.close()
            self._file.close()
            for sink in self._sinks:
                sink.close()


class _Screen:
    """A rich progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int):
        self.total = total_steps
        self._progress: Any = None
        self._start: tuple[float, int] | None = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            # Narrow enough for 80 columns.
            columns = (
                MofNCompleteColumn(),
                BarColumn(bar_width=10),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns)
            self._task = self._progress.add_task("", total=total_steps)
            self._progress.start()

    def say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def show(self, row: dict[str, Any]) -> None:
        if "val_loss" in row:
            self.say(
                f"step {row['step']}/{self.total}  validation: loss {row['val_loss']:.4f}  perplexity "
                f"{row['val_perplexity']:.2f}  bits per byte {row['val_bits_per_byte']:.4f}"
                + (f"  (without hardware effects: {row['val_loss_clean']:.4f})" if "val_loss_clean" in row else "")
            )
            return
        mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.1%}"
        bits = f"  bpb {row['bits_per_byte']:.3f}" if row.get("bits_per_byte") is not None else ""
        rate = row["tokens_per_second_per_device"]
        speed = "compiled" if rate is None else f"{rate:,.0f} tok/s/device{mfu}"
        if self._progress is not None:
            self._progress.update(
                self._task, completed=row["step"], description=f"loss {row['loss']:.3f}{bits}  {speed}"
            )
            return
        text = f"loss {row['loss']:.4f}{bits}  |g| {row['grad_norm']:.3f}  lr {row['lr']:.2e}  {speed}"
        self.say(f"step {row['step']}/{self.total}  {text}  ETA {self._eta(row['step'])}")

    def _eta(self, step: int) -> str:
        now = time.monotonic()
        if self._start is None:
            self._start = (now, step)
            return "-"
        began, first = self._start
        seconds = (now - began) / max(1, step - first) * (self.total - step)
        return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class _WandbSink:
    def __init__(self, config: Config, folder: Path, resumed: bool):
        import wandb

        try:
            self._run = wandb.init(
                project=config.metrics.wandb_project,
                name=config.run.name,
                dir=folder,
                config=config.model_dump(),
                id=_stable_id(folder),
                resume="allow" if resumed else None,
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise ValueError(f"metrics.wandb: {error}; run `wandb login`, or set WANDB_MODE=offline") from error

    def record(self, row: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _stable_id(folder: Path) -> str:
    """One W&B run per run folder, also after a resume."""
    import secrets

    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    return file.read_text().strip()


class _TensorboardSink:
    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote beyond the checkpoint is taken back.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def record(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


def describe_config(config: Config) -> str:
    """The resolved configuration as it is stored, for the log."""
    return to_toml(config)
