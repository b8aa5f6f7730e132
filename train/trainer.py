"""The training loop.

`Trainer` builds everything a run needs; `Trainer.run` is the loop and `train_step` one step of it. Nothing between two
logging steps waits for the device: losses and norms stay tensors, and whether everything was finite is folded into one
number on the device, read when a step is logged and, with the state itself, by the thread that saves a checkpoint.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.hf import HFWeights, check_names
from models.loss import IGNORE
from models.sizes import LlamaShape
from parallel import apply as parallelize
from parallel import gradients
from parallel.context import Batch, Sequences
from parallel.degrees import resolve_degrees, rows_per_micro_batch
from parallel.init import init_weights, load_weights, of_model
from parallel.mesh import Mesh
from parallel.names import named_parameters
from parallel.pipeline import Pipeline
from train.checkpoint import CheckpointError, Commit, Damaged, check_model, find_checkpoint
from train.config import Config, total_steps
from train.data import Resumed, TrainingData, validation_batches
from train.metrics import Recorder, Throughput, bits_per_byte, perplexity
from train.model import build_model
from train.optimizer import build_optimizer, learning_rate, materialise_state, second_stage
from train.preemption import Agreement, Signals
from train.profiling import StepProfiler
from train.run_folder import RunFolder
from train.saving import Checkpoints
from train.spikes import Spikes
from train.step_times import StepTimes
from train.tokenizer import Tokenizer
from train.watchdog import group_timeout
from train.weight_clipping import WeightClipping
from transforms.context import TRAINING, VALIDATION, places

if TYPE_CHECKING:
    from train.distillation import Teacher

GC_INTERVAL = 50
PAUSES = (0.0, 1.0, 5.0)
"""Seconds before each try of the save that a run ends with."""


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
        signals: what the scheduler asks for.
        beat: told each phase that begins, and its step (`Watchdog.beat`).
        teacher: what the model learns beside the text, or None.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        shape: LlamaShape,
        tokenizer: Tokenizer | None,
        data: TrainingData,
        hf_weights: Path | None = None,
        signals: Signals | None = None,
        beat: Callable[[str, int | None], None] = lambda phase, step: None,
        teacher: Teacher | None = None,
    ):
        self.config, self.mesh, self.shape, self.data, self.teacher = config, mesh, shape, data, teacher
        self.held_out, self.beat = data.held_out, beat
        self.tokenizer_fingerprint = tokenizer.fingerprint if tokenizer else ""
        self.adapters = [spec.model_dump() for spec in config.transforms if spec.kind == "lora"]
        self.set_length(trained=(0, 0))
        self.micro_batch = rows_per_micro_batch(config, resolve_degrees(config, mesh.world_size))
        self.rows_per_step = config.training.global_batch_size // mesh.data_size
        self.folder = RunFolder.of(config)

        built = build_model(config, mesh, shape)
        self.parts, self.noise = built.parts, built.noise
        init_weights(self.parts, config.run.seed, adapters_only=hf_weights is not None)
        if hf_weights is not None:
            weights = HFWeights(hf_weights)
            expected = {n: p.shape for n, p in named_parameters(*self.parts) if of_model(n)}
            check_names(weights, expected, shape)
            load_weights(self.parts, weights.read)
        self.after_update: Callable[[], None] = lambda: None
        if config.float8.recipe == "tensorwise":
            from parallel.float8 import precompute_scales

            self.after_update = partial(precompute_scales, self.parts, mesh)
        self.clip_weights = WeightClipping(self.parts, self.noise, config.robust, mesh.device)
        compiled = config.compile.enabled and config.compile.backend == "inductor"
        self.optimizer = build_optimizer(self.parts, config.optimizer, compiled)
        self.weight_decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        timeout, folder = group_timeout(config.faults.start_timeout), self.folder.checkpoints
        ranges = self.noise.state() if self.noise is not None else {}
        self.checkpoints = Checkpoints(folder, config.checkpoint, self.parts, self.optimizer, mesh, timeout, ranges)
        self.signals, self.agreement = signals or Signals(), Agreement(mesh.world_size, timeout)
        self.spikes = Spikes(config.faults.spike)
        self.left_out = 0
        """Updates in a row that were left out, for a gradient that was not finite."""
        self.build_inputs(built.stages, tokenizer)
        self.throughput = Throughput(shape, config, mesh.device, mesh.world_size)
        self.step_times = StepTimes(self.parts, mesh, config.faults.slow_rank)
        # First step at which something was not finite, or -1; lives on the device.
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=mesh.device)
        self.step = 0
        self.gradients_checked = self.goes_on = False

    def build_inputs(self, stages: list[int], tokenizer: Tokenizer | None) -> None:
        """What stands between rows and the model: documents, the part of the sequence, the pipeline's schedule."""
        config, mesh = self.config, self.mesh
        bos_id = tokenizer.bos_id if config.training.document_mask and tokenizer is not None else None
        pipelined = mesh.pipeline.size() > 1
        in_products = self.noise is not None and self.noise.in_attention
        self.sequences = Sequences(mesh, config.training.sequence_length, bos_id, pipelined, dense_masks=in_products)
        if self.noise is not None and not self.sequences.whole:
            self.noise.columns, self.noise.keys = self.sequences.columns, self.sequences.key_columns
        self.pipeline: Pipeline | None = None
        if pipelined:
            dtype = parallelize.compute_dtype(config, mesh.device)
            count = self.rows_per_step // self.micro_batch
            self.pipeline = Pipeline(
                self.parts, stages, config, mesh, self.sequences, self.noise, count, self.micro_batch, dtype
            )

    def resume(self) -> Path | None:
        """Load the checkpoint that `checkpoint.resume` means, if there is one (rank 0 chooses), and open the data there.

        With "auto" a damaged one is set aside, and the one before it taken.

        Raises:
            CheckpointError: it cannot be loaded, or all of them are damaged.
            ValueError: it is another run's, and beyond this run's warm-up of hardware effects.
        """
        config, damaged = self.config, ""
        while True:
            path, commit = self.mesh.broadcast_object(self.find_commit())
            if path is None:
                if damaged:
                    raise CheckpointError(
                        f"{damaged}\n  No other checkpoint is complete: choose another run.name to start anew."
                    )
                self.open_data(None)
                return None
            try:
                if isinstance(commit, Damaged):
                    raise commit
                check_model(commit, path, self.shape, self.tokenizer_fingerprint, self.adapters, config.optimizer.name)
                materialise_state(self.optimizer)
                self.checkpoints.load(path)
            except Damaged as error:
                damaged = self.checkpoints.without_damaged(path, error, config.checkpoint.resume == "auto")
                continue
            self.step = self.checkpoints.last_saved = commit.step
            self.goes_on = path.parent == self.folder.checkpoints
            if not self.goes_on and 0 < config.noise.warmup_steps <= commit.step:
                raise ValueError(
                    f"noise.warmup_steps = {config.noise.warmup_steps} has no effect: {path} is of step {commit.step}, and steps "
                    "go on from there. Leave it out, or export that run and begin from it with model.init_from, at step 0"
                )
            self.open_data(Resumed(path, commit.step, commit.data))
            return path

    def find_commit(self) -> tuple[Path | None, Any]:
        """The checkpoint to go on from, and its marker or what is wrong with it (main process)."""
        path = find_checkpoint(self.folder.checkpoints, self.config.checkpoint.resume) if self.mesh.is_main else None
        try:
            return path, Commit.read(path) if path is not None else None
        except Damaged as error:
            return path, error

    def open_data(self, resumed: Resumed | None) -> None:
        """Begin to read ahead, from the first row or from a checkpoint's data state; what is left of the run's length."""
        pin = self.mesh.device.type == "cuda"
        self.batches = self.data.open(self.config, self.mesh.data_rank, self.mesh.data_size, pin, resumed)
        self.set_length(self.batches.counts.unchanged_since)

    def set_length(self, trained: tuple[int, int]) -> None:
        """Where the schedule and this run end; `trained` are steps and tokens that came before with other batches."""
        self.total_steps = total_steps(self.config, self.shape, trained)
        self.last_step = min(self.total_steps, self.config.training.stop_after or self.total_steps)

    def run(self, recorder: Recorder) -> bool:
        """Train to the last step, logging, saving and validating on the way; `resume` comes first.

        Returns:
            Whether it got there; False when the job was asked to stop: what it had is saved.
        """
        config, batches = self.config, self.batches
        gc.collect()
        self.after_update()
        profiler = StepProfiler(
            config.profiling, self.folder.profiles, self.mesh, recorder.say, self.step, self.last_step
        )
        gc.disable()  # a collection in the middle of a step stalls every rank for up to half a second
        try:
            if self.agreement.ask(**self.requests())["stop"]:
                return False
            self.signals.can_save, stop = True, False
            if self.mesh.broadcast_object(self.validation_is_missing()):
                stop = not self.validate(recorder)
            self.throughput.restart(self.step, 0.0)
            first, compiles = self.step + 1, config.compile.enabled and self.step < self.last_step
            if compiles:
                recorder.say("compiling: the first step takes as long as that does, and is outside the rates below")
            profiler.start()
            self.beat("data", self.step + 1)
            for rows in batches:
                if stop or self.step >= self.last_step:
                    break
                self.beat("forward/backward", self.step + 1)
                self.step_times.measure(self._due_to_log(self.step + 1))
                loss, grad_norm = self.train_step(rows)
                self.step += 1
                if self.step == first and config.checkpoint.interval:
                    self.checkpoints.make_host_copy()
                if self.step == first and compiles:
                    self.begin_rates(recorder)
                agreed = self.agreement.finish()
                stop, final = agreed["stop"], self.step == self.last_step

                self.beat("log", self.step)
                if self.left_out:
                    self.report_left_out(recorder)
                if self._due_to_log(self.step):
                    self.log(recorder, loss, grad_norm, batches.waited)
                self.save(recorder, agreed["saving"], now=final or stop)
                if not stop and _due(config.validation.interval, self.step, final):
                    stop = not self.validate(recorder)
                    if stop:
                        self.save(recorder, saving=True, now=True)
                    self.throughput.restart(self.step, batches.waited)
                if self.step % GC_INTERVAL == 0:
                    gc.collect(1)
                if profiler.end_step(self.step):
                    self.throughput.restart(self.step, batches.waited)
                self.beat("data", self.step + 1)
        finally:
            profiler.close()
            gc.enable()
            self.checkpoints.close()
            batches.close()
        return not stop

    def begin_rates(self, recorder: Recorder) -> None:
        """After the step that compiled: wait for the device this once, and count time from here."""
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        recorder.say(f"compiled: the first step took {self.throughput.seconds():.0f} s")
        self.throughput.restart(self.step, self.batches.waited)

    def requests(self) -> dict[str, bool]:
        """What this process was asked for, as flags of an agreement."""
        return {"stop": self.signals.received is not None, "interrupted": self.signals.interrupted}

    def _due_to_log(self, step: int) -> bool:
        return step == self.last_step or step % self.config.metrics.log_interval == 0

    def train_step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step on this rank's rows (rows, T + 1) of the global batch.

        Returns:
            This rank's part of the loss (nats per token of the global batch; the parts add up over ranks), with that of the
            distillation loss behind it where there is a teacher, and the global gradient norm before clipping; both on the
            device, not waited for.
        """
        rate = learning_rate(self.step, self.total_steps, self.config.optimizer.lr, self.config.schedule)
        decays = self.step < second_stage(self.total_steps, self.config.schedule)
        for group, weight_decay in zip(self.optimizer.param_groups, self.weight_decays):
            group["lr"], group["weight_decay"] = rate, weight_decay if decays else 0.0
        if self.noise is not None:
            self.noise.begin_step(self.step)
        batch = self.sequences.batch(rows.to(self.mesh.device, non_blocking=True))
        tokens = self.count_tokens(batch)

        if self.pipeline is not None:
            loss = self.pipeline.train(batch, self.micro_batch_places(self.step, self.first_row()), tokens)
        else:
            loss = self.accumulate(batch, tokens)

        if not self.gradients_checked:
            self.check_gradients()
        self.agreement.begin(**self.requests(), saving=self.checkpoints.busy)
        norm = gradients.clip(self.parameters(), self.config.training.max_grad_norm, self.mesh.device)
        self.beat("optimizer", self.step + 1)
        self.checkpoints.wait_copied()
        # The norm is the same on all ranks; to look at it here is what "skip" costs.
        if self.config.faults.non_finite == "skip" and not torch.isfinite(norm):
            self.left_out += 1
            if self.noise is not None:
                self.noise.drop_step()
        else:
            self.left_out = 0
            if self.noise is not None:
                self.noise.end_step(self.mesh.largest_of_stage)
            self.optimizer.step()
            self.clip_weights()
            self.after_update()
            bad = ~(torch.isfinite(norm) & torch.isfinite(loss).all())
            self.first_bad_step = torch.where(bad & (self.first_bad_step < 0), self.step + 1, self.first_bad_step)
        self.optimizer.zero_grad(set_to_none=True)
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
            objective, seen = self.objective(micro_batch, places[i])
            (objective / tokens).backward()
            loss = loss + seen / tokens
        return loss

    def objective(self, batch: Batch, place: Tensor) -> tuple[Tensor, Tensor]:
        """What is differentiated, and the loss, or the losses, to log: sums over this device's part of a batch, in nats."""
        if self.teacher is None:
            loss = self.loss_sum(batch, place)
            return loss, loss.detach()
        taught = self.teacher.logits(batch.tokens, *self._positions_and_mask(batch))
        return self.teacher.objective(self.loss_sum(batch, place, logits=True), taught, batch.targets)

    def loss_sum(self, batch: Batch, place: Tensor, logits: bool = False) -> Tensor:
        """Sum of the losses of this device's part of a batch, in nats; `place` says where in the run it stands.

        With `logits` those (B, T, V) instead.
        """
        (model,) = self.parts
        if self.noise is not None:
            self.noise.stand(place, len(batch.tokens))
        return model(batch.tokens, None if logits else batch.targets, *self._positions_and_mask(batch))

    def _positions_and_mask(self, batch: Batch) -> tuple[Any, Any]:
        return self.sequences.positions_and_mask(batch.documents, len(batch.tokens))

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
        odd = torch.zeros(1) if self.noise is None else self.noise.take_non_finite().view(1)
        summed = self.mesh.sum_over_data(torch.cat([odd.to(loss), loss.view(-1)]))
        norm, non_finite, loss_per_token, *of_teacher = torch.cat([grad_norm.view(1), summed]).tolist()
        self.check_finite()
        row = {
            "step": self.step,
            "loss": loss_per_token,
            "grad_norm": norm,
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens": self.batches.counts.tokens(self.step),
        }
        if of_teacher:
            row["distillation_loss"] = of_teacher[0]
        if non_finite:
            row["non_finite_inputs"] = int(non_finite)
        if self.held_out is not None:
            row["bits_per_byte"] = bits_per_byte(loss_per_token, self.held_out.tokens_per_byte)
        recorder.record(row | self.throughput.read(self.step, waited) | self.step_times.read(waited))
        if self.step_times.slow:
            recorder.event(self.step, "slow_rank", self.step_times.slow)
        if non_finite:
            recorder.event(
                self.step,
                "non_finite_inputs",
                f"{int(non_finite):,} rows with infinity or NaN entered the hardware effects since the last log: infinities "
                "saturate there, so neither the loss nor a gradient need show them",
            )
        spike = self.spikes.seen(loss_per_token)
        if spike:
            recorder.event(self.step, "spike", f"{spike}; {self.where_the_rows_are()}")

    def report_left_out(self, recorder: Recorder) -> None:
        """
        Raises:
            NonFinite: too many updates in a row.
        """
        limit = self.config.faults.max_skipped
        message = f"update left out, the gradient is not finite ({self.left_out} in a row); {self.where_the_rows_are()}"
        recorder.event(self.step, "skipped", message)
        if self.left_out > limit:
            problem = f"the gradients of {self.left_out} steps in a row are not finite (faults.max_skipped is {limit})"
            raise NonFinite(self._advice(problem))

    def where_the_rows_are(self) -> str:
        """How to look at the text of the current step."""
        rows = self.batches.counts.rows_of(self.step)
        which = f"its rows are {rows[0]:,} to {rows[-1]:,} of the training order"
        return f"{which} (newcompute rows --run {self.folder.path} --step {self.step} prints them)"

    @torch.no_grad()
    def validate(self, recorder: Recorder) -> bool:
        """Loss, perplexity and bits per byte over the held-out rows, each token weighing the same.

        Under the hardware effects of the run, in a seed space of their own so that validating changes nothing, or clean,
        or both.

        Returns:
            Whether it got to the end; not, when the job was asked to stop: the next start does it again.
        """
        if self.held_out is None:
            return True
        for part in self.parts:
            part.eval()
        figures = []
        which = self.config.validation.transforms if self.noise is not None else "same"
        if which != "clean":
            figures.append(self._held_out_figures(""))
        if which != "same" and None not in figures:
            assert self.noise is not None
            with self.noise.off():
                figures.append(self._held_out_figures("_clean" if which == "both" else ""))
        for part in self.parts:
            part.train()
            parallelize.reshard(part)
        row: dict[str, Any] = {"step": self.step}
        for found in figures:
            if found is None:
                return False
            row |= found
        recorder.record(row)
        return True

    def validation_is_missing(self) -> bool:
        """Whether this run was stopped between a save and the validation of that step (main process)."""
        final = self.step == self.last_step
        if not self.mesh.is_main or not self.goes_on or not _due(self.config.validation.interval, self.step, final):
            return False
        return not any("val_loss" in row and row["step"] == self.step for row in self.folder.metrics())

    def _held_out_figures(self, suffix: str) -> dict[str, float] | None:
        """None when the job was asked to stop meanwhile."""
        assert self.held_out is not None
        if self.noise is not None:
            self.noise.enter(VALIDATION)
        totals, stop = torch.zeros(2, dtype=torch.float64, device=self.mesh.device), False
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
            stop = self.agreement.ask(**self.requests())["stop"]
            if stop:
                break
        if self.noise is not None:
            self.noise.enter(TRAINING)
        if stop:
            return None
        nats, tokens = self.mesh.sum_over_data(totals).tolist()
        loss = nats / (tokens / self.mesh.pipeline.size())
        return {
            f"val_loss{suffix}": loss,
            f"val_bits_per_byte{suffix}": bits_per_byte(loss, self.held_out.tokens_per_byte),
            f"val_perplexity{suffix}": perplexity(loss),
        }

    def save(self, recorder: Recorder, saving: bool, now: bool) -> None:
        """Begin a checkpoint where one is due; with `now`, go on only when the current state is saved.

        Args:
            saving: whether any process is still writing the last one. If the next one is due, training waits for it.

        Raises:
            CheckpointError: more would be lost than the configuration allows, or, with `now`, anything; NonFinite: there is
                nothing worth saving.
        """
        checkpoints, settings = self.checkpoints, self.config.checkpoint
        due = checkpoints.due(self.step)
        problem = self.settle(recorder) if due or now or not saving or checkpoints.crashed else ""
        if now and settings.interval:
            for pause in PAUSES:
                if checkpoints.last_saved == self.step:
                    return
                time.sleep(pause)
                self.begin_save()
                problem = self.settle(recorder)
            if checkpoints.last_saved != self.step:
                raise CheckpointError(checkpoints.advice(problem))
        elif due:
            self.begin_save()
            if settings.mode == "sync":
                problem = self.settle(recorder)
                self.throughput.restart(self.step, self.batches.waited)
        if checkpoints.too_far(self.step):
            problem = self.settle(recorder) or problem
            checkpoints.check_unsaved(self.step, problem)

    def begin_save(self) -> None:
        if not self.optimizer.state:  # every update so far was left out
            materialise_state(self.optimizer)
            for state in self.optimizer.state.values():
                if "step" in state:
                    state["step"].zero_()
        data, files = self.data.state(self.batches, self.mesh.data_rank)
        optimizer = self.config.optimizer.name
        commit = Commit(self.step, data, asdict(self.shape), self.tokenizer_fingerprint, self.adapters, optimizer)
        self.checkpoints.begin(commit, files, self.first_bad_step)

    def settle(self, recorder: Recorder) -> str:
        """Wait for the last save, if there is one, and report it; why it failed, or nothing.

        Raises:
            NonFinite: on every rank, when it would have saved something that is not finite.
        """
        self.beat("save", self.step)
        saved = self.checkpoints.settle(self.step)
        if saved is None:
            return ""
        if saved.non_finite:
            raise NonFinite(self._advice(saved.non_finite))
        if saved.problem:
            recorder.event(
                self.step, "save_failed", self.checkpoints.advice(saved.problem) if self.mesh.is_main else ""
            )
        else:
            recorder.say(f"saved {saved.path}")
            if self.mesh.is_main:
                self.folder.note_saved()
            if saved.warning:
                recorder.event(self.step, "save_warning", saved.warning)
        return saved.problem

    def check_finite(self) -> None:
        """
        Raises:
            NonFinite: on every rank, when a loss or gradient of any rank was not finite since the start.
        """
        # -1 as an unsigned number is the largest, so the minimum over ranks is the earliest bad step.
        first = int(self._agree_minimum(self.first_bad_step))
        if first >= 0:
            raise NonFinite(self._advice(f"the loss or gradient of step {first} is not finite"))

    def _agree_minimum(self, step: Tensor) -> Tensor:
        """The smallest non-negative value over ranks, or -1 where all have -1."""
        big = torch.iinfo(torch.int64).max
        value = torch.where(step < 0, big, step)
        if self.mesh.world_size > 1:
            torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MIN)
        return torch.where(value == big, -1, value)

    def _advice(self, problem: str) -> str:
        last = self.checkpoints.newest()
        flips = any(getattr(spec, "kind", "") == "bitflip" for spec in self.config.transforms)
        cause = (
            "  Exponent bits that flip make infinities: a zero_above on weights and inputs clears them.\n"
            if flips
            else ""
        )
        return (
            f"{problem}. Last good checkpoint: {last}; no checkpoint was written from non-finite state.\n{cause}"
            "  Under another run.name (with checkpoint.resume = that checkpoint's path to go on from there), try a lower "
            'optimizer.lr, more schedule.warmup_steps or a smaller training.max_grad_norm, or faults.non_finite = "skip"; '
            f"newcompute rows --run {self.folder.path} --step STEP prints the text of a step."
        )


def _due(interval: int, step: int, final: bool) -> bool:
    return interval > 0 and (final or step % interval == 0)
