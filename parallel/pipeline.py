"""Pipeline parallelism: stages of the model on different devices, micro-batches following each other through them.

The schedules are those of torch.distributed.pipelining. The last stage holds the head and returns the loss; all stages
are told about every micro-batch (its targets, documents and place in the run) by keyword, so that only hidden states
travel between devices.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from models.sizes import LlamaShape, layer_parameters
from parallel.context import Batch, Sequences
from parallel.mesh import Mesh

if TYPE_CHECKING:
    from models.llama import Llama
    from train.config import Config
    from transforms.context import Noise

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
EMBEDDING_COST_PER_FEATURE = 3000
"""An embedding multiplies nothing, but moves about 10 bytes per feature: as FLOPs, at an H100's 300 FLOPs per byte."""


def split_layers(shape: LlamaShape, length: int, num_stages: int) -> list[range]:
    """Layers of each stage, so that the costliest stage costs least: blocks, the embedding of the first, the head of the last.

    Cost is forward FLOPs per token. Of equally good splits, the one whose stages hold the evenest parts.
    """
    attention = 4 * shape.num_heads * shape.head_dim * length
    block = 2 * layer_parameters(shape) + attention
    extra = [0] * num_stages
    extra[0] += EMBEDDING_COST_PER_FEATURE * shape.dim
    extra[-1] += 2 * shape.dim * shape.padded_vocab_size

    # best[n] = (largest cost, sum of squares, layers of each stage) of the stages so far with n layers in all
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for stage in range(num_stages):
        following: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for n, (largest, squares, counts) in best.items():
            for count in range(1, shape.num_layers - n - (num_stages - stage - 1) + 1):
                cost = count * block + extra[stage]
                candidate = (max(largest, cost), squares + cost * cost, (*counts, count))
                if n + count not in following or candidate < following[n + count]:
                    following[n + count] = candidate
        best = following
    bounds = [0]
    for count in best[shape.num_layers][2]:
        bounds.append(bounds[-1] + count)
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def stages_of_rank(rank: int, pipeline: int, per_device: int, schedule: str) -> list[int]:
    """Stages that a device holds: every `pipeline`-th, or for zbv down one arm of a V and up the other."""
    if schedule == "zbv":
        return [rank, 2 * pipeline - 1 - rank]
    return [rank + i * pipeline for i in range(per_device)]


def cut(model: Llama, layers: range, is_first: bool, is_last: bool) -> Llama:
    """A stage of a model: the model's own modules, under their own names, without those of other stages."""
    stage, decoder = _shell(model), _shell(model.model)
    stage.model = decoder
    decoder.layers = nn.ModuleDict({str(i): model.model.layers[str(i)] for i in layers})
    if not is_first:
        decoder.embed_tokens = None
    if not is_last:
        decoder.norm = stage.lm_head = None
    return stage


def _shell(module: Any) -> Any:
    """A copy of a module that holds the same children and buffers, in tables of its own (hooks are in tables as well)."""
    shell = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            setattr(shell, name, value.copy())
    return shell


class Stage(PipelineStage):
    """A stage of torch.distributed.pipelining, with two repairs for torch 2.11 that change nothing in later versions."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Messages that open the connections to the neighbouring stages, without those to a stage on the same device.

        zbv has two neighbouring stages on the last device, and gloo cannot send from a process to itself ("Pair is not
        connected").
        """
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """The backward of one micro-batch, or its part for the inputs or for the weights.

        The first part leaves nodes of the autograd graph at which the second begins, and detaches the outputs. On torch 2.11
        a node of an `autograd.Function`, as a compiled block or a transformed layer is one, does not keep its graph alive
        ("Attribute '_input_metadata' is invalid"): the edges of the outputs do, beside those nodes until the second part.
        """
        edges = []
        if backward_type == "input":
            edges = [get_gradient_edge(out) for out in bwd_kwargs["stage_output"] if out.requires_grad]
        grads, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        for group in groups or ():
            if any(isinstance(node, torch._C._FunctionBase) for node in group["intermediates"]):
                group["edges"] = edges
        return grads, groups


class Pipeline:
    """This device's stages and the schedule that runs them.

    Args:
        parts: the stages, parallelised, in the order of `indices`.
        num_micro_batches: of one step, each of `micro_batch` rows.
        dtype: of the hidden states that travel.
    """

    def __init__(
        self,
        parts: Sequence[Llama],
        indices: Sequence[int],
        config: Config,
        mesh: Mesh,
        sequences: Sequences,
        noise: Noise | None,
        num_micro_batches: int,
        micro_batch: int,
        dtype: torch.dtype,
    ):
        self.mesh, self.sequences, self.noise, self.micro_batch = mesh, sequences, noise, micro_batch
        self.parts, self.indices = parts, indices
        self.tokens: Tensor | None = None
        self.is_v_shaped = config.parallel.pipeline_schedule == "zbv"
        self.num_stages = num_stages = mesh.pipeline.size() * len(parts)
        self.is_first, self.is_last = 0 in indices, num_stages - 1 in indices
        length = len(sequences.columns)
        size = (micro_batch, length // mesh.tensor.size(), parts[0].shape.dim)
        self.hidden = hidden = torch.empty(size, dtype=dtype, device="meta", requires_grad=True)
        row = torch.empty(micro_batch, length, dtype=torch.int64, device="meta")
        stages = []
        for part, index in zip(parts, indices):
            part.register_forward_pre_hook(self._place, with_kwargs=True)
            last = index == num_stages - 1
            if last:
                part.register_forward_hook(lambda module, args, loss: loss.reshape(1))  # a result that can be merged
            stages.append(
                Stage(
                    part,
                    index,
                    num_stages,
                    mesh.device,
                    input_args=(row if index == 0 else hidden,),
                    output_args=(torch.empty(1, device="meta", requires_grad=True) if last else hidden,),
                    group=mesh.pipeline.get_group(),
                )
            )
        kind = SCHEDULES[config.parallel.pipeline_schedule]
        single = kind in (ScheduleGPipe, Schedule1F1B)
        self.schedule = kind(
            stages[0] if single else stages,
            n_microbatches=num_micro_batches,
            loss_fn=self._loss,
            scale_grads=False,  # the loss is divided by the tokens of the whole batch
        )

    def _place(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before a stage's forward: what the schedule sent along becomes what the model takes."""
        place, targets, documents = kwargs["place"][0], kwargs["targets"], kwargs.get("documents")
        if self.noise is not None:
            self.noise.stand(place, len(targets))
        positions, mask = self.sequences.positions_and_mask(documents, len(targets))
        return args, {"targets_BT": targets, "positions_BT": positions, "mask": mask}

    def _loss(self, loss_sum: Tensor, target: Tensor) -> Tensor:
        assert self.tokens is not None
        return loss_sum.squeeze() / self.tokens

    def train(self, batch: Batch, places: Tensor, tokens: Tensor) -> Tensor:
        """Forward and backward of all micro-batches of a step.

        Args:
            places: (micro-batches, 3) int64, where each stands in the run, as `transforms.context` has it.
            tokens: of the global batch, which the sum of losses is divided by.

        Returns:
            The loss on devices that hold the last stage, 0 on others.
        """
        self.tokens = tokens
        losses: list[Tensor] | None = [] if self.is_last else None
        args = (batch.tokens,) if self.is_first else ()
        target = batch.targets if self.is_last else None
        self.schedule.step(*args, target=target, losses=losses, **self._told(batch, places))
        if losses is None:
            return torch.zeros((), device=self.mesh.device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    @torch.no_grad()
    def evaluate(self, batch: Batch, places: Tensor) -> Tensor:
        """Sum of the losses of a batch on devices that hold the last stage, 0 on others; any number of micro-batches.

        Forward only, stage by stage: torch's `eval` of the zbv schedule fails (torch 2.13.0).
        """
        batches, group = batch.split(self.micro_batch), self.mesh.pipeline.get_group()
        total = torch.zeros((), device=self.mesh.device)
        kept: list[Tensor] = []  # what a stage here hands to the next one here
        sent: list[Any] = []
        for part, index in zip(self.parts, self.indices):
            inputs, kept = kept, []
            coming: list[tuple[Tensor, Any]] = []
            for i, micro_batch in enumerate(batches):
                if index == 0:
                    hidden = micro_batch.tokens
                elif self.owner(index - 1) == self.owner(index):
                    hidden = inputs[i]
                else:
                    # NCCL works off a device's sends and receives in their order. Where stages go round, a send that stood
                    # before a later receive would wait for a device that waits for it: receives come first.
                    ahead = len(batches) if len(self.parts) > 1 else i + 1
                    coming += [self._receive(index, j) for j in range(len(coming), ahead)]
                    hidden, work = coming[i]
                    work.wait()
                out = part(hidden, **self._told(micro_batch, places[i : i + 1]))
                if index == self.num_stages - 1:
                    total += out.squeeze()
                elif self.owner(index + 1) == self.owner(index):
                    kept.append(out)
                else:
                    sent.append((dist.isend(out, group=group, group_dst=self.owner(index + 1), tag=i), out))
        for work, _ in sent:
            work.wait()
        return total

    def _receive(self, index: int, micro_batch: int) -> tuple[Tensor, Any]:
        """Begin to receive the hidden states of a micro-batch for a stage."""
        hidden = torch.empty(self.hidden.shape, dtype=self.hidden.dtype, device=self.mesh.device)
        group, source = self.mesh.pipeline.get_group(), self.owner(index - 1)
        return hidden, dist.irecv(hidden, group=group, group_src=source, tag=micro_batch)

    def owner(self, stage: int) -> int:
        """Rank along the pipeline of the device that holds a stage."""
        size = self.mesh.pipeline.size()
        lap, rank = divmod(stage, size)
        return size - 1 - rank if self.is_v_shaped and lap == 1 else rank

    def _told(self, batch: Batch, places: Tensor) -> dict[str, Any]:
        """What every stage is told about micro-batches."""
        told: dict[str, Any] = {"targets": batch.targets, "place": places}
        return told if batch.documents is None else told | {"documents": batch.documents}
