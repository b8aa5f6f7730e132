"""The training loop.

`Trainer` builds everything a run needs; `Trainer.run` is the loop and `train_step` one step of it. Nothing between two
logging steps waits for the device: losses and norms stay tensors, and whether everything was finite is folded into one
number on the device, read when a step is logged and before a checkpoint is written.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.hf import HFWeights, check_names
from models.llama import Llama
from models.sizes import LlamaShape
from parallel import apply as parallelize
from parallel.init import ADAPTERS, init_weights, load_weights
from parallel.mesh import Mesh
from parallel.names import named_parameters
from train.checkpoint import Checkpoints, Commit, check_model, find_checkpoint
from train.config import Config, total_steps
from train.data import IGNORE, TrainingData, validation_batches
from train.loss import inputs_and_targets, next_token_loss_sum
from train.metrics import Recorder, Throughput, bits_per_byte, perplexity
from train.optimizer import build_optimizer, learning_rate, materialise_state
from train.run_folder import RunFolder
from train.tokenizer import Tokenizer
from transforms.context import TRAINING, VALIDATION, Noise

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
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        shape: LlamaShape,
        tokenizer: Tokenizer | None,
        data: TrainingData,
        hf_weights: Path | None = None,
    ):
        self.config, self.mesh, self.shape, self.data = config, mesh, shape, data
        self.held_out = data.held_out
        self.tokenizer_fingerprint = tokenizer.fingerprint if tokenizer else ""
        self.adapters = [spec.model_dump() for spec in config.transforms if spec.kind == "lora"]
        self.total_steps = total_steps(config, shape)
        self.last_step = min(self.total_steps, config.training.stop_after or self.total_steps)
        self.micro_batch = config.training.micro_batch_size or config.training.global_batch_size // mesh.data_size
        self.folder = RunFolder.of(config)

        self.model, self.noise = build_model(config, mesh, shape)
        init_weights(self.model, config.run.seed, adapters_only=hf_weights is not None)
        if hf_weights is not None:
            weights = HFWeights(hf_weights)
            expected = {n: p.shape for n, p in named_parameters(self.model) if not n.endswith(ADAPTERS)}
            check_names(weights, expected, shape)
            load_weights(self.model, weights.read)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.loss_sum: Callable[[Tensor, Tensor], Tensor] = next_token_loss_sum
        if config.compile.enabled:
            self.loss_sum = torch.compile(next_token_loss_sum, fullgraph=True, backend=config.compile.backend)
        self.checkpoints = Checkpoints(
            self.folder.checkpoints, config.checkpoint.keep, self.model, self.optimizer, mesh
        )
        self.throughput = Throughput(shape, config, mesh.device, mesh.world_size)
        # First step at which something was not finite, or -1; lives on the device.
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=mesh.device)
        self.step = 0

    def resume(self) -> Path | None:
        """Load the checkpoint that `checkpoint.resume` means, if there is one (rank 0 chooses), and open the data there."""
        config = self.config
        found = find_checkpoint(self.folder.checkpoints, config.checkpoint.resume) if self.mesh.is_main else None
        path = self.mesh.broadcast_object(found)
        if path is None:
            self.open_data(None)
            return None
        commit = Commit.read(path)
        check_model(commit, path, self.shape, self.tokenizer_fingerprint, self.adapters)
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
        gc.disable()  # a collection in the middle of a step stalls every rank for up to half a second
        try:
            self.throughput.restart(self.step, 0.0)
            for rows in batches:
                if self.step >= self.last_step:
                    break
                loss, grad_norm = self.train_step(rows)
                self.step += 1

                final = self.step == self.last_step
                if final or self.step % config.metrics.log_interval == 0:
                    self.log(recorder, loss, grad_norm, batches.waited)
                if _due(config.validation.interval, self.step, final):
                    self.validate(recorder)
                    self.throughput.restart(self.step, batches.waited)
                if _due(config.checkpoint.interval, self.step, final):
                    self.save(recorder)
                    self.throughput.restart(self.step, batches.waited)
                if self.step % GC_INTERVAL == 0:
                    gc.collect(1)
        finally:
            gc.enable()
            batches.close()

    def train_step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step on this rank's rows (rows, T + 1) of the global batch.

        Returns:
            This rank's part of the loss (nats per token of the global batch; the parts add up over ranks) and the global
            gradient norm before clipping; both on the device, not waited for.
        """
        rate = learning_rate(self.step, self.total_steps, self.config.optimizer.lr, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = rows.to(self.mesh.device, non_blocking=True)
        global_tokens = self.mesh.sum_over_data((rows[:, 1:] != IGNORE).sum())

        loss = torch.zeros((), device=self.mesh.device)
        micro_batches = rows.split(self.micro_batch)
        for i, micro_rows in enumerate(micro_batches):
            # Replicas exchange gradients once per step; shards already while accumulating, to keep gradients sharded.
            self.model.set_requires_all_reduce(i == len(micro_batches) - 1)
            inputs, targets = inputs_and_targets(micro_rows)
            self.begin_noise(self.step, self.mesh.data_rank * len(rows) + i * self.micro_batch)
            micro_loss = self.loss_sum(self.model(inputs), targets) / global_tokens
            micro_loss.backward()
            loss += micro_loss.detach()

        grad_norm = self.clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        bad = ~(torch.isfinite(grad_norm) & torch.isfinite(loss))
        self.first_bad_step = torch.where(bad & (self.first_bad_step < 0), self.step + 1, self.first_bad_step)
        return loss, grad_norm

    def begin_noise(self, step: int, first_sample: int) -> None:
        """Say where the next forward stands, for hardware effects; `first_sample` counts rows of the global batch."""
        if self.noise is not None:
            group_size = self.config.noise.group_size
            group = first_sample // group_size if group_size else 0
            self.noise.begin(step, first_sample, self.mesh.device, group)

    def clip_gradients(self) -> Tensor:
        """Scale all gradients so that their global norm is at most `max_grad_norm`; the norm before that, a scalar."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.config.training.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.config.training.max_grad_norm, norm, foreach=True)
        return norm

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
        recorder.record(row | self.throughput.read(self.step, waited))

    @torch.no_grad()
    def validate(self, recorder: Recorder) -> None:
        """Loss, perplexity and bits per byte over the held-out rows, each token weighing the same.

        Under the hardware effects of the run, in a seed space of their own so that validating changes nothing, or clean,
        or both.
        """
        if self.held_out is None:
            return
        self.model.eval()
        row: dict[str, Any] = {"step": self.step}
        which = self.config.validation.transforms if self.noise is not None else "same"
        if which != "clean":
            row |= self._held_out_figures("")
        if which != "same":
            assert self.noise is not None
            with self.noise.off():
                row |= self._held_out_figures("_clean" if which == "both" else "")
        self.model.train()
        parallelize.reshard(self.model)
        recorder.record(row)

    def _held_out_figures(self, suffix: str) -> dict[str, float]:
        assert self.held_out is not None
        if self.noise is not None:
            self.noise.enter(VALIDATION)
        totals = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for i, rows in enumerate(self._validation_rows()):
            inputs, targets = inputs_and_targets(rows.to(self.mesh.device, non_blocking=True))
            self.begin_noise(0, (i * self.mesh.data_size + self.mesh.data_rank) * self.micro_batch)
            totals[0] += self.loss_sum(self.model(inputs), targets)
            totals[1] += (targets != IGNORE).sum()
        if self.noise is not None:
            self.noise.enter(TRAINING)
        nats, tokens = self.mesh.sum_over_data(totals).tolist()
        loss = nats / tokens
        return {
            f"val_loss{suffix}": loss,
            f"val_bits_per_byte{suffix}": bits_per_byte(loss, self.held_out.tokens_per_byte),
            f"val_perplexity{suffix}": perplexity(loss),
        }

    def _validation_rows(self) -> Iterator[Tensor]:
        assert self.held_out is not None
        return validation_batches(
            self.held_out, self.config, self.mesh.data_rank, self.mesh.data_size, self.micro_batch
        )

    def save(self, recorder: Recorder) -> None:
        """Write a checkpoint, never one of non-finite state."""
        self.check_finite()
        self.check_weights_finite()

        def commit_in(folder: Path) -> Commit:
            state = self.data.save(self.batches, folder, self.mesh.data_rank)
            return Commit(self.step, state, asdict(self.shape), self.tokenizer_fingerprint, self.adapters)

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
        tensors = [p.detach() for p in self.model.parameters()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
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


def build_model(config: Config, mesh: Mesh, shape: LlamaShape) -> tuple[Llama, Noise | None]:
    """A parallelised model on its device; weights allocated, not yet set. With what its transformed layers share."""
    with torch.device("meta"):
        model = Llama(shape, context=config.training.sequence_length)
    noise = parallelize.apply(model, config, mesh)
    model.to_empty(device=mesh.device)
    model.reset_after_to_empty()
    if noise is not None:
        noise.fill()
    return model, noise


def _due(interval: int, step: int, final: bool) -> bool:
    return interval > 0 and (final or step % interval == 0)
