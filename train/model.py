"""A run's model, spread over its processes."""

from __future__ import annotations

import torch

from models.llama import Llama
from models.sizes import LlamaShape
from parallel import apply as parallelize
from parallel.mesh import Mesh
from train.config import Config


def build_model(
    config: Config, mesh: Mesh, shape: LlamaShape, frozen: torch.dtype | None = None
) -> parallelize.Parallel:
    """A parallelised model on its device; weights allocated, not yet set. `frozen`: not trained, and kept in that type."""
    with torch.device("meta"):
        model = Llama(shape, context=config.training.sequence_length)
    for parameter in model.parameters() if frozen is not None else ():
        parameter.requires_grad_(False).data = parameter.data.to(frozen)
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
