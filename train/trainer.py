"""The training loop.

`Trainer` builds everything a run needs; `Trainer.run` is the loop and `train_step` one step of it. Nothing between two
logging steps waits for the device: losses and norms stay tensors, and whether everything was finite is folded into one
number on the device, read when a step is logged and before a checkpoint is written.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.hf import HFWeights, check_names
from models.llama import Llama
from models.loss import IGNORE
from models.sizes import LlamaShape
from parallel import apply as parallelize
from parallel import gradients
from parallel.context import Batch, Sequences
from parallel.degrees import resolve_degrees, rows_per_micro_batch
from parallel.init import ADAPTERS, init_weights, load_weights
from parallel.mesh import Mesh
from parallel.names import named_parameters
from parallel.pipeline import Pipeline
from train.checkpoint import Checkpoints, Commit, check_model, find_checkpoint
from train.config import Config, total_steps
from train.data import TrainingData, validation_batches
from train.metrics import Recorder, Throughput, bits_per_byte, perplexity
from train.optimizer import build_optimizer, finiteness, learning_rate, materialise_state
from train.run_folder import RunFolder
from train.step_times import StepTimes
from train.tokenizer import Tokenizer
from transforms.context import TRAINING, VALIDATION, places

GC_INTERVAL = 50


class NonFinite(Exception):
    """A loss, gradient or weight became infinite or NaN; the message says when and what to try."""


class Trainer:
    """One run on this process.

    Args:
        config: validated configuration.
        mesh: the started process group.
        shape: architecture, vocabulary included.
        tokenizer: None with random data.
        data: training batches and validation rows.
        hf_weights: folder to take initial weights from, or None for random ones.
        beat: told each phase that begins, and its step (`Watchdog.beat`).
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        shape: LlamaShape,
        tokenizer: Tokenizer | None,
        data: TrainingData,
        hf_weights: Path | None = None,
        beat: Callable[[str, int | None], None] = lambda phase, step: None,
    ):
        self.config, self.mesh, self.shape, self.data = config, mesh, shape, data
        self.held_out, self.beat = data.held_out, beat
        self.tokenizer_fingerprint = tokenizer.fingerprint if tokenizer else ""
        self.adapters = [spec.model_dump() for spec in config.transforms if spec.kind == "lora"]
        self.total_steps = total_steps(config, shape)
        self.last_step = min(self.total_steps, config.training.stop_after or self.total_steps)
        self.micro_batch = rows_per_micro_batch(config, resolve_degrees(config, mesh.world_size))
        self.rows_per_step = config.training.global_batch_size // mesh.data_size
        self.folder = RunFolder.of(config)

        built = build_model(config, mesh, shape)
        self.parts, self.noise = built.parts, built.noise
        init_weights(self.parts, config.run.seed, adapters_only=hf_weights is not None)
        if hf_weights is not None:
            weights = HFWeights(hf_weights)
            expected = {n: p.shape for n, p in named_parameters(*self.parts) if not n.endswith(ADAPTERS)}
            check_names(weights, expected, shape)
            load_weights(self.parts, weights.read)
        self.after_update: Callable[[], None] = lambda: None
        if config.float8.recipe == "tensorwise":
            from parallel.float8 import precompute_scales

            self.after_update = partial(precompute_scales, self.parts, mesh)
        compiled = config.compile.enabled and config.compile.backend == "inductor"
        self.optimizer = build_optimizer(self.parts, config.optimizer, compiled)
        self.checkpoints = Checkpoints(
            self.folder.checkpoints, config.checkpoint.keep, self.parts, self.optimizer, mesh
        )
        self.build_inputs(built.stages, tokenizer)
        self.throughput = Throughput(shape, config, mesh.device, mesh.world_size)
        self.step_times = StepTimes(self.parts, mesh, config.faults.slow_rank)
        # First step at which something was not finite, or -1; lives on the device.
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=mesh.device)
        self.step = 0
        self.gradients_checked = False

    def build_inputs(self, stages: list[int], tokenizer: Tokenizer | None) -> None:
        """What stands between rows and the model: documents, the part of the sequence, the pipeline's schedule."""
        config, mesh = self.config, self.mesh
        bos_id = tokenizer.bos_id if config.training.document_mask and tokenizer is not None else None
        pipelined = mesh.pipeline.size() > 1
        self.sequences = Sequences(mesh, config.training.sequence_length, bos_id, always_positions=pipelined)
        if self.noise is not None and not self.sequences.whole:
            self.noise.columns = self.sequences.columns
        self.pipeline: Pipeline | None = None
        if pipelined:
            dtype = parallelize.compute_dtype(config, mesh.device)
            count = self.rows_per_step // self.micro_batch
            self.pipeline = Pipeline(
                self.parts, stages, config, mesh, self.sequences, self.noise, count, self.micro_batch, dtype
            )

    def resume(self) -> Path | None:
        """Load the checkpoint that `checkpoint.resume` means, if there is one (rank 0 chooses), and open the data there."""
        config = self.config
        found = find_checkpoint(self.folder.checkpoints, config.checkpoint.resume) if self.mesh.is_main else None
        path = self.mesh.broadcast_object(found)
        if path is None:
            self.open_data(None)
            return None
        commit = Commit.read(path)
        check_model(commit, path, self.shape, self.tokenizer_fingerprint, self.adapters, config.optimizer.name)
        self.open_data((path, commit.data))
        self.step = commit.step
        materialise_state(self.optimizer)
        self.checkpoints.load(path)
        return path

    def open_data(self, resumed: tuple[Path, dict[str, Any]] | None) -> None:
        """Begin to read ahead, from the first row or from a checkpoint's folder and data state."""
        pin = self.mesh.device.type == "cuda"
        self.batches = self.data.open(self.config, self.mesh.data_rank, self.mesh.data_size, pin, resumed)

    def run(self, recorder: Recorder) -> None:
        """Train to the last step, validating, logging and saving on the way; `resume` comes first."""
        config, batches = self.config, self.batches
        gc.collect()
        self.after_update()
        gc.disable()  # a collection in the middle of a step stalls every rank for up to half a second
        try:
            self.throughput.restart(self.step, 0.0)
            self.beat("data", self.step + 1)
            for rows in batches:
                if self.step >= self.last_step:
                    break
                self.beat("forward/backward", self.step + 1)
                self.step_times.measure(self._due_to_log(self.step + 1))
                loss, grad_norm = self.train_step(rows)
                self.step += 1

                final = self.step == self.last_step
                if self._due_to_log(self.step):
                    self.beat("log", self.step)
                    self.log(recorder, loss, grad_norm, batches.waited)
                if _due(config.validation.interval, self.step, final):
                    self.validate(recorder)
                    self.throughput.restart(self.step, batches.waited)
                if _due(config.checkpoint.interval, self.step, final):
                    self.save(recorder)
                    self.throughput.restart(self.step, batches.waited)
                if self.step % GC_INTERVAL == 0:
                    gc.collect(1)
                self.beat("data", self.step + 1)
        finally:
            gc.enable()
            batches.close()

    def _due_to_log(self, step: int) -> bool:
        return step == self.last_step or step % self.config.metrics.log_interval == 0

    def train_step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step on this rank's rows (rows, T + 1) of the global batch.

        Returns:
            This rank's part of the loss (nats per token of the global batch; the parts add up over ranks) and the global
            gradient norm before clipping; both on the device, not waited for.
        """
        rate = learning_rate(self.step, self.total_steps, self.config.optimizer.lr, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.sequences.batch(rows.to(self.mesh.device, non_blocking=True))
        tokens = self.count_tokens(batch)

        if self.pipeline is not None:
            loss = self.pipeline.train(batch, self.micro_batch_places(self.step, self.first_row()), tokens)
        else:
            loss = self.accumulate(batch, tokens)

        if not self.gradients_checked:
            self.check_gradients()
        norm = gradients.clip(self.parameters(), self.config.training.max_grad_norm, self.mesh.device)
        self.beat("optimizer", self.step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_update()
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        self.first_bad_step = torch.where(bad & (self.first_bad_step < 0), self.step + 1, self.first_bad_step)
        return loss, norm

    def check_gradients(self) -> None:
        """Once: a layout that lost some would train on without them.

        Raises:
            RuntimeError: a trained parameter has none.
        """
        missing = [n for n, p in named_parameters(*self.parts) if p.requires_grad and p.grad is None]
        if missing:
            raise RuntimeError(
                f"{len(missing)} parameters have no gradient, the first is {missing[0]}: this is a defect"
            )
        self.gradients_checked = True

    def accumulate(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Forward and backward of each micro-batch in turn; this device's part of the loss."""
        (model,) = self.parts
        loss = torch.zeros((), device=self.mesh.device)
        micro_batches = batch.split(self.micro_batch)
        places = self.micro_batch_places(self.step, self.first_row())
        for i, micro_batch in enumerate(micro_batches):
            # Replicas exchange gradients once per step; shards already while accumulating, to keep gradients sharded.
            last = i == len(micro_batches) - 1
            if self.config.compile.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()  # what the last micro-batch left may be overwritten
            model.set_requires_all_reduce(last)
            model.set_requires_gradient_sync(last or self.config.parallel.reduce_each_micro_batch)
            # Weights that stay gathered between forward and backward stay so for the next micro-batch as well.
            model.set_reshard_after_backward(last or self.config.parallel.reshard_after_forward)
            micro_loss = self.loss_sum(micro_batch, places[i]) / tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def loss_sum(self, batch: Batch, place: Tensor) -> Tensor:
        """Sum of the losses of this device's part of a batch, in nats; `place` says where in the run it stands."""
        (model,) = self.parts
        if self.noise is not None:
            self.noise.stand(place, len(batch.tokens))
        return model(
            batch.tokens, batch.targets, *self.sequences.positions_and_mask(batch.documents, len(batch.tokens))
        )

    def count_tokens(self, batch: Batch) -> Tensor:
        """Tokens of the global batch that a loss is computed for; every stage of a pipeline counts the same ones."""
        return self.mesh.sum_over_data((batch.targets != IGNORE).sum()) // self.mesh.pipeline.size()

    def micro_batch_places(self, step: int, first_row: int) -> Tensor:
        """Where the micro-batches of this device's rows stand, (n, 3); `first_row` counts rows of the global batch."""
        group_size = self.config.noise.group_size
        firsts = range(first_row, first_row + self.rows_per_step, self.micro_batch)
        device = self.mesh.device if self.noise is not None else torch.device("cpu")  # without effects nobody looks
        return places([(step, first // group_size if group_size else 0, first) for first in firsts], device)

    def first_row(self) -> int:
        """Number in the global batch of this device's first row."""
        return self.mesh.data_rank * self.rows_per_step

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.parts for parameter in part.parameters()]

    def log(self, recorder: Recorder, loss: Tensor, grad_norm: Tensor, waited: float) -> None:
        """Read the step's figures from the device (the one place where the host waits for it) and record them."""
        figures = torch.stack([self.mesh.sum_over_data(loss.clone()), grad_norm]).tolist()
        self.check_finite()
        row = {
            "step": self.step,
            "loss": figures[0],
            "grad_norm": figures[1],
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens": self.step * self.config.tokens_per_step,
        }
        if self.held_out is not None:
            row["bits_per_byte"] = bits_per_byte(figures[0], self.held_out.tokens_per_byte)
        recorder.record(row | self.throughput.read(self.step, waited) | self.step_times.read(waited))
        if self.step_times.slow:
            recorder.event(self.step, "slow_rank", self.step_times.slow)

    @torch.no_grad()
    def validate(self, recorder: Recorder) -> None:
        """Loss, perplexity and bits per byte over the held-out rows, each token weighing the same.

        Under the hardware effects of the run, in a seed space of their own so that validating changes nothing, or clean,
        or both.
        """
        if self.held_out is None:
            return
        for part in self.parts:
            part.eval()
        row: dict[str, Any] = {"step": self.step}
        which = self.config.validation.transforms if self.noise is not None else "same"
        if which != "clean":
            row |= self._held_out_figures("")
        if which != "same":
            assert self.noise is not None
            with self.noise.off():
                row |= self._held_out_figures("_clean" if which == "both" else "")
        for part in self.parts:
            part.train()
            parallelize.reshard(part)
        recorder.record(row)

    def _held_out_figures(self, suffix: str) -> dict[str, float]:
        assert self.held_out is not None
        if self.noise is not None:
            self.noise.enter(VALIDATION)
        totals = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        size, rank = self.mesh.data_size, self.mesh.data_rank
        rows_each = self.micro_batch
        if self.pipeline is not None:  # filled with as many micro-batches as in training, where there are so many
            needed = math.ceil(self.held_out.count / (size * self.micro_batch)) * self.micro_batch
            rows_each = min(self.rows_per_step, needed)
        for i, rows in enumerate(validation_batches(self.held_out, self.config, rank, size, rows_each)):
            self.beat("validate", self.step)
            batch = self.sequences.batch(rows.to(self.mesh.device, non_blocking=True))
            places = self.micro_batch_places(0, (i * size + rank) * rows_each)
            if self.pipeline is not None:
                totals[0] += self.pipeline.evaluate(batch, places)
            else:
                totals[0] += self.loss_sum(batch, places[0])
            totals[1] += (batch.targets != IGNORE).sum()
        if self.noise is not None:
            self.noise.enter(TRAINING)
        nats, tokens = self.mesh.sum_over_data(totals).tolist()
        loss = nats / (tokens / self.mesh.pipeline.size())
        return {
            f"val_loss{suffix}": loss,
            f"val_bits_per_byte{suffix}": bits_per_byte(loss, self.held_out.tokens_per_byte),
            f"val_perplexity{suffix}": perplexity(loss),
        }

    def save(self, recorder: Recorder) -> None:
        """Write a checkpoint, never one of non-finite state."""
        self.beat("save", self.step)
        self.check_finite()
        self.check_weights_finite()

        def commit_in(folder: Path) -> Commit:
            state = self.data.save(self.batches, folder, self.mesh.data_rank)
            name = self.config.optimizer.name
            return Commit(self.step, state, asdict(self.shape), self.tokenizer_fingerprint, self.adapters, name)

        path = self.checkpoints.save(self.step, commit_in)
        recorder.say(f"saved {path}")

    def check_finite(self) -> None:
        """
        Raises:
            NonFinite: on every rank, when a loss or gradient of any rank was not finite since the start.
        """
        # -1 as an unsigned number is the largest, so the minimum over ranks is the earliest bad step.
        first = int(self._agree_minimum(self.first_bad_step))
        if first >= 0:
            raise NonFinite(self._advice(f"the loss or gradient of step {first} is not finite"))

    def check_weights_finite(self) -> None:
        """
        Raises:
            NonFinite: on every rank, when a weight or optimizer moment is not finite.
        """
        tensors = [p.detach() for p in self.parameters()] + finiteness(self.optimizer)
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        largest = torch._foreach_norm([t for t in local if t.numel()], ord=float("inf"))
        finite = torch.isfinite(torch.stack([value.to(self.mesh.device) for value in largest])).all()
        bad_step = torch.where(finite, -1, self.step)
        if int(self._agree_minimum(bad_step)) >= 0:
            raise NonFinite(self._advice(f"a weight or optimizer moment after step {self.step} is not finite"))

    def _agree_minimum(self, step: Tensor) -> Tensor:
        """The smallest non-negative value over ranks, or -1 where all have -1."""
        big = torch.iinfo(torch.int64).max
        value = torch.where(step < 0, big, step)
        if self.mesh.world_size > 1:
            torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MIN)
        return torch.where(value == big, -1, value)

    def _advice(self, problem: str) -> str:
        from train.checkpoint import committed_steps

        steps = committed_steps(self.folder.checkpoints)
        last = f"step {max(steps)} in {self.folder.checkpoints}" if steps else "none"
        flips = any(getattr(spec, "kind", "") == "bitflip" for spec in self.config.transforms)
        cause = (
            "  Exponent bits that flip make infinities: a zero_above on weights and inputs clears them.\n"
            if flips
            else ""
        )
        return (
            f"{problem}. Last good checkpoint: {last}; no checkpoint was written from non-finite state.\n{cause}"
            "  Under another run.name (with checkpoint.resume = that checkpoint's path to go on from there), try a lower "
            "optimizer.lr, more schedule.warmup_steps or a smaller training.max_grad_norm; to look at the "
            "text of that step, its rows follow from run.seed and the step."
        )


def build_model(config: Config, mesh: Mesh, shape: LlamaShape) -> parallelize.Parallel:
    """A parallelised model on its device; weights allocated, not yet set."""
    with torch.device("meta"):
        model = Llama(shape, context=config.training.sequence_length)
    built = parallelize.apply(model, config, mesh)
    for part in built.parts:
        part.to_empty(device="cpu" if config.parallel.cpu_offload else mesh.device)
        part.reset_after_to_empty()
        for buffer_owner in part.modules() if config.parallel.cpu_offload else ():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                buffer_owner._buffers[name] = buffer.to(mesh.device)
    if built.noise is not None:
        built.noise.fill()
    return built


def _due(interval: int, step: int, final: bool) -> bool:
    return interval > 0 and (final or step % interval == 0)
