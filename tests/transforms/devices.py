"""The devices that every test of the suite goes through, and a small model on each."""

from __future__ import annotations

import torch
from support import tiny_flags

from models.llama import Llama
from parallel import apply as parallelize
from parallel.init import init_weights
from train.config import named_shape
from train.config_sources import load_config
from transforms.context import Noise

FAULTS = "{ sign_exponent = 0.001, mantissa = 0.001, zero_above = 8.0 }"
DEVICES = {
    "bitflip": f'{{ kind = "bitflip", weight = {FAULTS}, input = {FAULTS}, output = {FAULTS} }}',
    "bitflip-int8": f'{{ kind = "bitflip", storage = "int8", scale = "tensor", weight = {FAULTS}, input = {FAULTS} }}',
    "int8": '{ kind = "quantise", weight = { format = "int8" }, input = { format = "int8" }, attention = { format = "int8" } }',
    "b158": '{ kind = "quantise", weight = { format = "ternary" }, input = { format = "int8" }, norm = true }',
    "mxfp4": '{ kind = "quantise", weight = { format = "mxfp4" }, input = { format = "mxfp4" } }',
    "nvfp4": '{ kind = "quantise", weight = { format = "nvfp4" }, input = { format = "nvfp4" }, gradients = "clean" }',
    "learned": '{ kind = "quantise", weight = { format = "int4", scale = "learned" }, '
    'input = { format = "int8", scale = "learned", rounding = "stochastic" } }',
    "optical": '{ kind = "optical", levels = 16, lut_floor = 0.02 }',
    "optical-tiled": '{ kind = "optical", levels = 64, tile = 32, photons = 200.0, ranges = "learned" }',
}
SHAPE = {
    "model__shape__dim": 64,
    "model__shape__num_layers": 2,
    "model__shape__ffn_dim": 128,
    "training__sequence_length": 32,
}
"""Of blocks that still divide by 32 where two devices share them."""


def build(mesh, tmp_path, corpus, device: str | None, warm_steps: int = 1, **changes) -> tuple[Llama, Noise | None]:
    """A parallelised tiny model on a device, with ranges that have seen a batch; without one, clean."""
    transforms = "[]" if device is None else f"[{DEVICES[device]}]"
    config = load_config(
        [], tiny_flags(tmp_path, corpus, **{"transforms": transforms, **SHAPE, **changes}), world_size=1
    )
    with torch.device("meta"):
        model = Llama(named_shape(config.model, 60), context=config.training.sequence_length)
    noise = parallelize.apply(model, config, mesh).noise
    model.to_empty(device="cpu")
    model.reset_after_to_empty()
    if noise is not None:
        noise.fill()
    init_weights([model], 5)
    for step in range(warm_steps if noise is not None else 0):
        forward(model, noise, step).backward()
        noise.end_step()
    model.zero_grad()
    return model, noise


TOKENS = torch.arange(2 * 32).view(2, 32) * 7 % 60


def forward(model, noise, step: int, first: int = 0, tokens=TOKENS) -> torch.Tensor:
    if noise is not None:
        noise.begin(step, first, torch.device("cpu"))
    return model(tokens).square().mean()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.to_local().clone() for name, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model, noise) -> int:
    """Bytes that a forward keeps for its backward, each storage once, parameters and buffers left out."""
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    forward(model, noise, 0).backward()  # compilation and the gathering of parameters come first
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, noise, 0)
    # Between forward and backward FSDP shows the gathered parameters, which are what was saved.
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    loss.backward()
    return sum(size for pointer, size in kept.items() if pointer not in own)
