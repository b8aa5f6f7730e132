"""What the trainer costs over the bare work: tokens/s of three loops that train the same model on the same rows.

    python benchmarks/trainer_overhead.py [--size 60M --rounds 12 ...] [--model.shape.dim 256 ...]

- `trainer`: `Trainer.run` as a job runs it, on one process: FSDP2, rows read ahead by a thread, gradient clipping, the
  check for non-finite steps, a metrics row every `--log-interval` steps, its own garbage collection.
- `bare`: the least that makes the same update: the plain model with every block compiled, the compiled loss, clipping,
  fused AdamW, rows already in memory. No FSDP, no check, no metrics, nothing read back.
- `transformers`: `transformers.Trainer` with its own compiled LlamaForCausalLM of the same shape, fused AdamW, its data
  loader over rows in memory. No logging, evaluation or saving.

Paired: neighbours, clocks and heat move a machine's speed by more than the difference looked for. So each loop lives in
a process of its own (own garbage, threads, allocator), all three stay alive, and blocks of steps take turns in rotating
order while the other two wait. A ratio is taken inside a round, between blocks that are seconds apart; its spread over
the rounds says how far to believe its median.

Before anything is timed, the losses of the first steps from equal weights must agree, or the script fails: `trainer` and
`bare` at every warm-up step (so clipping and optimizer agree too), `transformers` at the first (it decays embeddings too).
On CUDA all compute in bfloat16 and keep float32 weights: `bare` with a bfloat16 copy, as FSDP does, transformers by autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if entry not in (str(ROOT), str(ROOT / "benchmarks"))]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from models.hf import hf_config, strip_padding  # noqa: E402
from models.llama import Llama  # noqa: E402
from models.sizes import num_parameters  # noqa: E402
from parallel import mesh as meshes  # noqa: E402
from parallel.apply import compute_dtype  # noqa: E402
from parallel.init import init_weights  # noqa: E402
from train.config import Config, named_shape  # noqa: E402
from train.config_sources import ConfigError, exit_with, load_config  # noqa: E402
from train.data import RandomRows  # noqa: E402
from train.loss import inputs_and_targets, next_token_loss_sum  # noqa: E402
from train.metrics import Recorder  # noqa: E402
from train.optimizer import build_optimizer  # noqa: E402
from train.trainer import Trainer  # noqa: E402

VARIANTS = ("trainer", "bare", "transformers")
WARM_STEPS = 4  # compilation and the optimizer's state; their losses are compared
SETTLE_STEPS = 1  # untimed, at the start of each block: refills caches and the allocator after the others' turn
# Largest difference from the trainer's loss of about 10 nats; autocast keeps the residual stream in float32, FSDP does not.
TOLERANCE = {"float32": {"bare": 1e-4, "transformers": 1e-4}, "bfloat16": {"bare": 1e-3, "transformers": 1e-2}}


class Turns:
    """Cuts a loop into blocks: the loop calls `begin_step` before each step and waits there while others have their turn.

    Sends the warm-up losses, then the seconds of each block, from the start of its first timed step to the start of the
    step after its last, so that all that a loop does between steps counts.
    """

    def __init__(self, connection: Connection, device: torch.device, steps: int):
        self.connection, self.device, self.steps = connection, device, steps
        self.step, self.start = 0, 0.0
        self.losses: list[Tensor] = []

    def begin_step(self) -> None:
        block, position = divmod(self.step - WARM_STEPS, SETTLE_STEPS + self.steps)
        self.step += 1
        if block < 0:
            return
        if position == 0:
            seconds = self._now() - self.start
            self.connection.send([float(loss) for loss in self.losses] if block == 0 else seconds)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # room for the others
            self.connection.recv()
        if position == SETTLE_STEPS:
            self.start = self._now()

    def note(self, loss: Tensor) -> None:
        if len(self.losses) < WARM_STEPS:
            self.losses.append(loss.detach().clone())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def run_trainer(config: Config, turns: Turns) -> None:
    """The project's own loop, built as `train/job.py` does."""

    class Timed(Trainer):
        def train_step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
            turns.begin_step()
            loss, grad_norm = super().train_step(rows)
            turns.note(loss)
            return loss, grad_norm

    shape = named_shape(config.model)
    rows = RandomRows(shape.vocab_size, config.run.seed)
    trainer = Timed(config, meshes.start(config.run.device, 1, 1), shape, None, rows, None)
    trainer.folder.write_config(config)
    trainer.run(Recorder(config, trainer.folder.path, True, trainer.total_steps, False))


def run_bare(config: Config, turns: Turns) -> None:
    """The same update with as little as possible around it."""
    half = compute_dtype(config, turns.device) == torch.bfloat16
    model = Llama(named_shape(config.model), context=config.training.sequence_length).to(turns.device)
    init_weights(model, config.run.seed)
    optimizer = build_optimizer(model, config.optimizer)
    weights = list(model.parameters())
    copies = [nn.Parameter(p.detach().bfloat16()) for p in weights] if half else weights
    copy_of = dict(zip(weights, copies))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, copy_of[p])
    for block in model.model.layers.values():
        block.compile(fullgraph=True)
    loss_sum = torch.compile(next_token_loss_sum, fullgraph=True)
    batches = memory_rows(config).to(turns.device).split(config.training.global_batch_size)

    for step in range(config.training.steps or 0):
        turns.begin_step()
        inputs, targets = inputs_and_targets(batches[step % len(batches)])
        loss = loss_sum(model(inputs), targets) / targets.numel()
        loss.backward()
        turns.note(loss)
        if half:
            for p, copy in zip(weights, copies):
                p.grad, copy.grad = copy.grad.float(), None
        nn.utils.clip_grad_norm_(weights, config.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if half:
            with torch.no_grad():
                torch._foreach_copy_(copies, weights)


def run_transformers(config: Config, turns: Turns, eager: bool) -> None:
    """What a user of transformers gets, from the same weights and rows."""
    import transformers

    transformers.logging.set_verbosity_error()
    shape, training, optimizer = named_shape(config.model), config.training, config.optimizer
    source = Llama(shape, context=training.sequence_length)
    init_weights(source, config.run.seed)
    hf_shape = transformers.LlamaConfig(**hf_config(shape, training.sequence_length, None, [], "float32"))
    model = transformers.LlamaForCausalLM(hf_shape)
    model.load_state_dict({name: strip_padding(name, tensor, shape) for name, tensor in source.state_dict().items()})
    rows = memory_rows(config)

    class Examples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return (training.steps or 0) * training.global_batch_size

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            row = rows[i % len(rows)]
            return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}  # these are not shifted again

    class Timed(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            turns.begin_step()
            loss = super().training_step(*args, **kwargs)
            turns.note(loss)
            return loss

    on_cpu = turns.device.type == "cpu"
    arguments = transformers.TrainingArguments(
        output_dir=config.run.dir, max_steps=training.steps, per_device_train_batch_size=training.global_batch_size,
        optim="adamw_torch_fused", learning_rate=optimizer.lr, adam_beta1=optimizer.beta1, adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps, weight_decay=optimizer.weight_decay, max_grad_norm=training.max_grad_norm,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", torch_compile=not eager,
        bf16=compute_dtype(config, turns.device) == torch.bfloat16, use_cpu=on_cpu, dataloader_pin_memory=not on_cpu,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    Timed(model=model, args=arguments, train_dataset=Examples()).train()


def memory_rows(config: Config) -> Tensor:
    """The trainer's own rows (N, T + 1) of the first 8 steps."""
    training = config.training
    rows = torch.empty(8 * training.global_batch_size, training.sequence_length + 1, dtype=torch.int64)
    for i, out in enumerate(rows.numpy()):
        RandomRows(named_shape(config.model).vocab_size, config.run.seed).read(i, out)
    return rows


def work(variant: str, config: Config, options: argparse.Namespace, connection: Connection) -> None:
    """A process that runs one variant; it ends when the other end of the connection closes."""
    torch.set_num_threads(options.threads)
    device = meshes.choose_device(config.run.device, 0)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as a job does
    turns = Turns(connection, device, options.steps_per_round)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            if variant == "transformers":
                run_transformers(config, turns, options.eager_transformers)
            else:
                {"trainer": run_trainer, "bare": run_bare}[variant](config, turns)
    except EOFError:
        return
    except Exception:
        connection.send(traceback.format_exc())


def receive(connection: Connection) -> Any:
    message = connection.recv()
    if isinstance(message, str):
        raise SystemExit(message)
    return message


def measure(config: Config, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(warm-up losses, seconds of the block of each round), by variant."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    try:
        for variant in VARIANTS:  # one after the other: compilation takes all cores
            print(f"warming up {variant}", flush=True)
            connections[variant], theirs = context.Pipe()
            context.Process(target=work, args=(variant, config, options, theirs)).start()
            theirs.close()
            losses[variant] = receive(connections[variant])
        check_losses(losses, config)
        for r in range(options.rounds):
            for variant in VARIANTS[r % 3 :] + VARIANTS[: r % 3]:
                connections[variant].send("go")
                seconds[variant].append(receive(connections[variant]))
            times = "  ".join(f"{variant} {values[-1] / options.steps_per_round:.4f}" for variant, values in seconds.items())
            print(f"round {r + 1}/{options.rounds}, s/step: {times}", flush=True)
    finally:
        for connection in connections.values():
            connection.close()
    return losses, seconds


def check_losses(losses: dict[str, list[float]], config: Config) -> None:
    """
    Raises:
        SystemExit: a loop does other work than the trainer.
    """
    dtype = str(compute_dtype(config, torch.device(config.run.device))).removeprefix("torch.")
    for variant, steps in (("bare", WARM_STEPS), ("transformers", 1)):
        pairs = zip(losses["trainer"][:steps], losses[variant][:steps], strict=True)
        if not max(abs(ours - theirs) for ours, theirs in pairs) <= TOLERANCE[dtype][variant]:
            raise SystemExit(f"{variant} does other work than the trainer: losses {losses}")


def spread(values: list[float], digits: int) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    numbers = zip(("min", "first_quartile", "median", "third_quartile", "max"), (min(values), *quartiles, max(values)))
    return {key: round(value, digits) for key, value in numbers} | {"rounds": [round(v, digits) for v in values]}


def show(rows: dict[str, dict[str, Any]], form: str) -> None:
    for name, row in rows.items():
        quartiles = f"{row['first_quartile']:{form}} - {row['third_quartile']:{form}}"
        print(f"{name:24}{row['median']:>10{form}}{quartiles:>20}{f'{row["min"]:{form}} - {row["max"]:{form}}':>20}")
