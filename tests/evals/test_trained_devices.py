"""A model that was trained on a device, exported and evaluated on it by transformers, gives what our own model gives."""

from __future__ import annotations

import pytest
import torch
from support import quietly, tiny_flags

from evals.chips import read_transforms
from evals.models import load_model
from models.llama import Llama
from parallel.names import LEARNED, named_parameters
from train.config_sources import load_config
from train.export import export, open_trained
from train.job import run_job
from transforms.apply import apply

INT4 = '{ format = "int4", scale = "learned" }'
DEVICES = {
    "int8": '{ kind = "quantise", weight = { format = "int8" }, input = { format = "int8" }, attention = { format = "int8" } }',
    "b158": '{ kind = "quantise", weight = { format = "ternary" }, input = { format = "int8" }, norm = true }',
    "learned": f'{{ kind = "quantise", weight = {INT4}, input = {INT4} }}',
    "optical": '{ kind = "optical", rounding = "nearest", levels = 64, ranges = "learned" }',
}
"""Without randomness: a run and an evaluation draw from seed spaces of their own."""


@pytest.mark.parametrize("device", list(DEVICES))
@torch.no_grad()
def test_export_under_its_device_is_the_trained_model(tmp_path, text_corpus, device):
    changes = {"training__steps": 6, "schedule__warmup_steps": 1, "checkpoint__interval": 6, "validation__interval": 6}
    flags = tiny_flags(tmp_path, text_corpus, transforms=f"[{DEVICES[device]}]", **changes)
    config = load_config([], flags, 1)
    quietly(config)
    with torch.enable_grad():
        run_job(config)
    trained = open_trained(tmp_path / "run")
    export(trained, tmp_path / "export")

    model = Llama(trained.shape, context=64)
    weights = trained.state_dict()
    for name, parameter in model.named_parameters():
        parameter.zero_()
        parameter[: len(weights[name])] = weights[name]
    noise, ranges = apply(model, config.transforms, config.noise_seed), trained.ranges()
    for name, tensor in noise.state().items():
        tensor.copy_(ranges[name])
    learned = [(name, p) for name, p in named_parameters(model) if name.startswith(LEARNED)]
    for name, parameter in learned:
        parameter.copy_(ranges[name])
    assert bool(learned) == (device in ("learned", "optical"))
    assert all(parameter.abs().max() > 0 for _, parameter in learned), "nothing was learned"
    tokens = torch.randint(0, trained.shape.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    noise.begin(0, 0, torch.device("cpu"))
    expected = model(tokens)
    with noise.off():
        clean = model(tokens)

    for reference in (tmp_path / "export", tmp_path / "run"):
        loaded = load_model(str(reference))
        noisy = read_transforms(["run"], str(reference)).attach(loaded)
        noisy.chip(1)
        found = loaded.model(tokens).logits
        far = (found - expected).abs() > 1e-4 * expected.abs().max()
        assert far.float().mean() < 0.01, f"{far.float().mean():.3f} of the logits differ"
        assert (expected - clean).abs().mean() > 20 * (found - expected).abs().mean()
