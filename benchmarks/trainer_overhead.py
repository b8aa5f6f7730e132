"""What the trainer costs over the bare work: tokens/s of loops that train the same model on the same rows.

    python benchmarks/trainer_overhead.py [--size 60M --rounds 8 ...] [--training.global_batch_size 4 ...]

- `trainer`: `Trainer.run` as a job runs it, on one process: FSDP2, rows read ahead by a thread, gradient clipping, the
  check for non-finite steps, a metrics row every `metrics.log_interval` steps, its own garbage collection.
- `bare`: the least that makes the same update: the plain model with every block compiled, the compiled loss, clipping,
  fused AdamW, rows already in memory. No FSDP, no check, no metrics, nothing read back.
- `bare, memory kept`: the same, with glibc told to keep freed memory as a CPU job of the trainer does.
- `transformers`: `transformers.Trainer` with its own compiled LlamaForCausalLM of the same shape, fused AdamW, its data
  loader over rows in memory. No logging, evaluation or saving.

Paired: neighbours, clocks and heat move a machine's speed by more than the difference looked for. So each loop lives in
a process of its own (own garbage, threads, allocator), all stay alive, and blocks of steps take turns in rotating
order while the others wait. A ratio is taken inside a round, between blocks that are seconds apart; its spread over
the rounds says how far to believe its median.

Before anything is timed, the losses of the first steps from equal weights must agree, or the script fails: `bare` with
`trainer` at every warm-up step (so clipping and optimizer agree too), `transformers` at the first (it decays embeddings).
On CUDA all compute in bfloat16 and keep float32 weights: `bare` by a bfloat16 copy, as FSDP, `transformers` by autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
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
from models.loss import inputs_and_targets, next_token_loss_sum  # noqa: E402
from models.sizes import num_parameters  # noqa: E402
from parallel.apply import compute_dtype  # noqa: E402
from parallel.init import init_weights  # noqa: E402
from parallel.mesh import choose_device  # noqa: E402
from train.config import Config, named_shape  # noqa: E402
from train.config_sources import load_config  # noqa: E402
from train.data import RandomRows, RowBatches  # noqa: E402
from train.job import keep_freed_memory, run_job  # noqa: E402
from train.optimizer import build_optimizer  # noqa: E402
from train.trainer import Trainer  # noqa: E402

WARM_STEPS = 4  # compilation and the optimizer's state; their losses are compared
MEMORY_STEPS = 8  # steps after which the rows in memory repeat
SETTLE_STEPS = 1  # untimed, at the start of each block: refills caches and the allocator after the others' turn
# By how much a loss (about 10 nats) may differ from the trainer's, in float32 and in bfloat16.
TOLERANCES = {"bare": (1e-4, 1e-3), "transformers": (1e-4, 1e-2)}


class Turns:
    """Cuts a loop into blocks: it calls `begin_step` before each step and waits there while others have their turn.

    Sends the warm-up losses, then the seconds of each block, from the start of its first timed step to the start of the
    step after its last, so that all that a loop does between steps counts.
    """

    def __init__(self, connection: Connection, device: torch.device, steps: int):
        self.connection, self.device, self.steps, self.step, self.start = connection, device, steps, 0, 0.0
        self.losses: list[Tensor] = []

    def begin_step(self) -> None:
        block, position = divmod(self.step - WARM_STEPS, SETTLE_STEPS + self.steps)
        self.step += 1
        if block >= 0 and position == 0:
            seconds = self._now() - self.start
            self.connection.send([float(loss) for loss in self.losses] if block == 0 else seconds)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # room for the others
            self.connection.recv()
        elif position == SETTLE_STEPS:
            self.start = self._now()

    def note(self, loss: Tensor) -> None:
        if len(self.losses) < WARM_STEPS:
            self.losses.append(loss.detach().clone())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def run_trainer(config: Config, turns: Turns) -> None:
    """The project's own loop, in a whole job."""
    train_step = Trainer.train_step

    def timed(trainer: Trainer, rows: Tensor) -> tuple[Tensor, Tensor]:
        turns.begin_step()
        loss, grad_norm = train_step(trainer, rows)
        turns.note(loss)
        return loss, grad_norm

    Trainer.train_step = timed
    run_job(config)


def run_bare(config: Config, turns: Turns) -> None:
    """The same update with as little as possible around it."""
    half = compute_dtype(config, turns.device) == torch.bfloat16
    model = Llama(named_shape(config.model), context=config.training.sequence_length).to(turns.device)
    init_weights([model], config.run.seed)
    master = copy.deepcopy(model) if half else model  # the float32 weights, which the optimizer holds
    optimizer = build_optimizer([master], config.optimizer)
    weights, copies = list(master.parameters()), list(model.parameters())
    for p in copies:
        p.data = p.data.bfloat16() if half else p.data
    for block in model.model.layers.values():
        block.compile(fullgraph=True)
    loss_sum = torch.compile(next_token_loss_sum, fullgraph=True)
    batches = [rows.to(turns.device) for rows in memory_batches(config)]

    for step in range(config.training.steps or 0):
        turns.begin_step()
        inputs, targets = inputs_and_targets(batches[step % len(batches)])
        loss = loss_sum(model(inputs), targets) / targets.numel()
        loss.backward()
        turns.note(loss)
        if half:
            for weight, p in zip(weights, copies):
                weight.grad, p.grad = p.grad.float(), None
        nn.utils.clip_grad_norm_(weights, config.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if half:
            with torch.no_grad():
                torch._foreach_copy_(copies, weights)


def run_transformers(config: Config, turns: Turns) -> None:
    """What a user of transformers gets, from the same weights and rows."""
    import transformers

    shape, training, optimizer = named_shape(config.model), config.training, config.optimizer
    source = Llama(shape, context=training.sequence_length)
    init_weights([source], config.run.seed)
    hf_values = hf_config(shape, None, [], "float32")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_values))
    model.load_state_dict({name: strip_padding(name, tensor, shape) for name, tensor in source.state_dict().items()})
    examples = [
        {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in torch.cat(memory_batches(config))
    ]
    examples *= (training.steps or 0) // MEMORY_STEPS + 1  # a single epoch

    class Timed(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            turns.begin_step()
            loss = super().training_step(*args, **kwargs)
            turns.note(loss)
            return loss

    cpu = turns.device.type == "cpu"
    arguments = transformers.TrainingArguments(
        output_dir=config.run.dir, max_steps=training.steps, per_device_train_batch_size=training.global_batch_size,
        optim="adamw_torch_fused", learning_rate=optimizer.lr, adam_beta1=optimizer.beta1, adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps, weight_decay=optimizer.weight_decay, max_grad_norm=training.max_grad_norm,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", torch_compile=True,
        bf16=compute_dtype(config, turns.device) == torch.bfloat16, use_cpu=cpu, dataloader_pin_memory=not cpu,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    Timed(model=model, args=arguments, train_dataset=examples).train()


def memory_batches(config: Config) -> list[Tensor]:
    """The trainer's own batches of the first steps."""
    reader = RowBatches(RandomRows(named_shape(config.model).vocab_size, config.run.seed), config, 0, 1, 0, pin=False)
    batches = list(itertools.islice(reader, MEMORY_STEPS))
    reader.close()
    return batches


def run_bare_keeping_memory(config: Config, turns: Turns) -> None:
    """The bare loop with the one thing that a job does for the allocator: what is left is the trainer's own cost."""
    keep_freed_memory()
    run_bare(config, turns)


VARIANTS = {
    "trainer": run_trainer,
    "bare": run_bare,
    "bare, memory kept": run_bare_keeping_memory,
    "transformers": run_transformers,
}


def work(variant: str, config: Config, steps: int, connection: Connection) -> None:
    """A process that runs one variant; it ends when the other end of the connection closes."""
    torch.set_float32_matmul_precision("high" if config.run.device == "cuda" else "highest")  # as a job does
    with contextlib.suppress(EOFError, BrokenPipeError), contextlib.redirect_stdout(io.StringIO()):
        VARIANTS[variant](config, Turns(connection, torch.device(config.run.device), steps))


def measure(config: Config, rounds: int, steps: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(warm-up losses, seconds of the block of each round), by variant."""
    context = multiprocessing.get_context("spawn")
    names, connections = list(VARIANTS), {}
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for name in names:  # one after the other: compilation takes all cores
            print(f"warming up {name}", flush=True)
            connections[name], theirs = context.Pipe()
            context.Process(target=work, args=(name, config, steps, theirs), name=name).start()
            theirs.close()
            losses[name] = connections[name].recv()
        half = compute_dtype(config, torch.device(config.run.device)) == torch.bfloat16
        for name, compared in (("bare", WARM_STEPS), ("bare, memory kept", WARM_STEPS), ("transformers", 1)):
            pairs = zip(losses["trainer"][:compared], losses[name][:compared], strict=True)
            if not max(abs(ours - theirs) for ours, theirs in pairs) <= TOLERANCES[name.partition(",")[0]][half]:
                raise SystemExit(f"{name} does other work than the trainer: losses {losses}")
        for r in range(rounds):
            for name in names[r % len(names) :] + names[: r % len(names)]:
                connections[name].send("go")
                seconds[name].append(connections[name].recv())
            times = "  ".join(f"{name} {blocks[-1] / steps:.4f}" for name, blocks in seconds.items())
            print(f"round {r + 1}/{rounds}, s/step: {times}", flush=True)
    except EOFError:
        raise SystemExit(f"{name} failed, as its traceback above says") from None
    finally:
        for connection in connections.values():
            connection.close()  # which ends the process
    return losses, seconds


def spread(values: list[float], digits: int) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    numbers = zip(("min", "first_quartile", "median", "third_quartile", "max"), (min(values), *quartiles, max(values)))
    return {key: round(value, digits) for key, value in numbers} | {"rounds": [round(v, digits) for v in values]}


def parse() -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description="See the head of this file. Other flags go to the configuration.")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--family", default="clm")
    parser.add_argument("--size", default="60M", help="on CPU in batches of 4 x 256 tokens, on CUDA of 48 x 2048")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps-per-round", type=int, default=10, help="timed steps of each loop in each round")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/trainer_overhead_DEVICE.json")
    options, flags = parser.parse_known_args()
    device = choose_device(options.device).type
    batch, length = (48, 2048) if device == "cuda" else (4, 256)
    # One step more than is timed (a block ends where the next begins); a constant rate, so that the losses can agree.
    steps = WARM_STEPS + options.rounds * (SETTLE_STEPS + options.steps_per_round) + 1
    ours = f"""--run.device {device} --model.name {options.family} --model.size {options.size} --data.source random
        --training.global_batch_size {batch} --training.sequence_length {length} --training.steps {steps}
        --schedule.warmup_steps 0 --schedule.min_lr_ratio 1.0 --validation.interval 0 --checkpoint.interval 0"""
    config = load_config([], ours.split() + flags, world_size=1)
    if options.steps_per_round % config.metrics.log_interval:
        parser.error(f"--steps-per-round must be a multiple of metrics.log_interval {config.metrics.log_interval}")
    return options, config


def main() -> None:
    options, config = parse()
    shape, steps, load_before = named_shape(config.model), options.steps_per_round, os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
        losses, seconds = measure(config, options.rounds, steps)
    tokens = steps * config.tokens_per_step
    rates = {name: [tokens / block for block in blocks] for name, blocks in seconds.items()}
    ratios = {f"trainer/{v}": [a / b for a, b in zip(rates["trainer"], rates[v])] for v in VARIANTS if v != "trainer"}
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    device = torch.cuda.get_device_name() if config.run.device == "cuda" else cpu
    result = {
        "date": datetime.now(UTC).date().isoformat(), "device": device, "threads": torch.get_num_threads(),
        "load_average": [load_before, os.getloadavg()], "versions": {p: version(p) for p in ("torch", "transformers")},
        "model": f"{options.family} {options.size}", "shape": asdict(shape), "parameters": num_parameters(shape),
        "compute_dtype": str(compute_dtype(config, torch.device(config.run.device))).removeprefix("torch."),
        "batch_size": config.training.global_batch_size, "sequence_length": config.training.sequence_length,
        "rounds": options.rounds, "steps_per_round": steps, "log_interval": config.metrics.log_interval,
        "warm_up_losses": losses,
        "tokens_per_second": {variant: spread(values, 1) for variant, values in rates.items()},
        "ratios": {ratio: spread(values, 4) for ratio, values in ratios.items()},
    }  # fmt: skip
    print(f"\n{device}, {torch.get_num_threads()} threads\n{'':28}    median  (quartiles; min - max)")
    for label, row in (result["tokens_per_second"] | result["ratios"]).items():
        low, first, median, third, high = [f"{row[key]:,.{3 if '/' in label else 0}f}" for key in list(row)[:5]]
        print(f"{label:28}{median:>10}  ({first} - {third}; {low} - {high})")
    slug = re.sub(r"\W+", "_", device).lower() if config.run.device == "cuda" else "cpu"
    out = options.out or ROOT / "benchmarks" / "results" / f"trainer_overhead_{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
