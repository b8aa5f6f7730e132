"""Weights that pass hardware effects by in ways that no list of parameters shows are noticed and refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import COMMON, LLAMA
from test_foreign import BOTH, FLIPS, INPUTS, WEIGHTS, int4_rows, llama, logits, small, with_down_proj
from torch import Tensor, nn

from evals.noise import NoisyModel
from transforms.apply import TransformError, table
from transforms.specs import BitflipSpec, Quantised, QuantiseSpec


class Keeps(nn.Module):
    """Multiplies a weight that it keeps in its own way, instead of its layer."""

    def __init__(self, proj: nn.Module, how: str):
        super().__init__()
        weight = proj.weight.detach().clone()
        if how == "buffer":
            self.register_buffer("kept", weight)
        elif how == "temporary buffer":
            self.register_buffer("kept", weight.bfloat16(), persistent=False)
        elif how == "vector":
            self.kept = nn.Parameter(weight.flatten())
        elif how == "tensor":
            self.kept = weight
        else:
            self.unseen = [proj]
        self.shape = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "unseen"):
            return self.unseen[0](x)
        return F.linear(x, self.kept.view(self.shape).to(x.dtype))


@pytest.mark.parametrize("how", ["buffer", "temporary buffer", "vector", "tensor", "unseen layer"])
def test_a_constant_that_is_multiplied_counts_as_a_weight(how):
    model = with_down_proj(lambda proj: Keeps(proj, how))
    with pytest.raises(TransformError, match=r"20\.\d% of the weights.*(down_proj\.kept|neither a parameter)"):
        NoisyModel(model, [WEIGHTS], 1)
    listed = NoisyModel(model, [WEIGHTS.model_copy(update={"modules": ["*.up_proj"]})], 1)
    assert any("down_proj.kept" in line or "neither a parameter" in line for line in table(listed.noise))


class AsksForDtype(nn.Module):
    """Never multiplies its layer's weight, but asks for its dtype as T5 does."""

    def __init__(self, proj: nn.Module):
        super().__init__()
        self.proj, self.fused = proj, nn.Parameter(proj.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.proj.weight.dtype), self.fused)


class SecondHolder(nn.Module):
    """Registers its layer's weight once more and multiplies that, too."""

    def __init__(self, proj: nn.Module):
        super().__init__()
        self.proj, self.again = proj, nn.ParameterList([proj.weight])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + F.linear(x, self.again[0])


class CallsAndReads(nn.Module):
    """Calls its layer, and multiplies its weight a second time, where effects on inputs do not act."""

    def __init__(self, proj: nn.Module):
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + F.linear(x, self.proj.weight)


class ReadsBehindACache(CallsAndReads):
    """Calls its layer for a prompt, and multiplies its weight by itself for a single token."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) if x.shape[1] > 1 else F.linear(x, self.proj.weight)


@pytest.mark.parametrize("make", [AsksForDtype, SecondHolder, CallsAndReads, ReadsBehindACache])
@pytest.mark.parametrize("spec", [WEIGHTS, INPUTS, BOTH])
def test_effects_of_a_layer_that_only_some_products_meet_are_refused(make, spec):
    model = with_down_proj(make)
    before = logits(model)
    if spec is WEIGHTS and make in (CallsAndReads, ReadsBehindACache):
        NoisyModel(model, [spec], 1).detach()  # the weight has its effects wherever it is read
    else:
        spec = spec.model_copy(update={"modules": ["*.down_proj.proj"]})
        with pytest.raises(TransformError, match=r"down_proj\.proj: .*(never acted|around the effects)"):
            NoisyModel(model, [spec], 1)
    assert torch.equal(logits(model), before)


def test_a_tied_head_may_be_transformed():
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    before = logits(model)
    for spec in (WEIGHTS, INPUTS):
        noisy = NoisyModel(model, [spec.model_copy(update={"modules": ["lm_head"]})], 1)
        noisy.chip(1)
        assert not torch.equal(logits(model), before)
        noisy.detach()


class Conv1D(nn.Module):
    """Has the name of GPT-2's layer and computes something else."""

    def __init__(self, proj: nn.Module):
        super().__init__()
        self.weight, self.bias = nn.Parameter(proj.weight.detach().t().clone()), None

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x @ self.weight


class FalconLinear(nn.Linear):
    """Has the name of Falcon's layer and computes something else."""

    def __init__(self, proj: nn.Linear):
        super().__init__(proj.in_features, proj.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize("make", [Conv1D, FalconLinear])
def test_a_layer_is_not_known_by_its_name_alone(make):
    model = with_down_proj(make)
    with pytest.raises(TransformError, match=r"down_proj\.weight"):
        NoisyModel(model, [WEIGHTS], 1)
    with pytest.raises(TransformError, match="down_proj"):
        NoisyModel(model, [QuantiseSpec(kind="quantise", modules=["*.down_proj"], weight=WEIGHTS.weight)], 1)


class Flattens(nn.Module):
    """Gives its layer the rows of all texts as one."""

    def __init__(self, proj: nn.Module):
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.reshape(1, -1, x.shape[-1])).view(*x.shape[:-1], -1)


def test_rows_of_several_texts_as_one_have_no_noise_of_their_own():
    model = with_down_proj(Flattens)
    with pytest.raises(ValueError, match="mixes rows"):
        NoisyModel(model, [BitflipSpec(kind="bitflip", storage="float32", input=FLIPS)], 1)
    NoisyModel(model, [BOTH], 1).detach()


def test_a_layer_that_cannot_be_transformed_leaves_the_model_as_it_was():
    model = llama()
    torch.nn.utils.weight_norm(model.model.layers[1].mlp.down_proj)
    before = logits(model)
    with pytest.raises(ValueError, match="weight"):
        NoisyModel(model, [WEIGHTS], 1)
    assert torch.equal(logits(model), before)


def test_weights_that_a_model_rescales_at_its_first_forward_keep_their_effects():
    """RWKV halves the output weights of later blocks when it is first called: effects act on what it computes with."""

    def rwkv() -> nn.Module:
        return small(hf.RwkvConfig(hidden_size=32, num_hidden_layers=4, context_length=64, rescale_every=1, **COMMON))

    model, by_hand = rwkv(), rwkv()
    before = logits(by_hand)  # rescales
    noisy = NoisyModel(model, [QuantiseSpec(kind="quantise", weight=Quantised(format="int4"), unmatched="keep")], 1)
    noisy.chip(1)
    with torch.no_grad():
        for layer in (m for name, m in by_hand.named_modules() if isinstance(m, nn.Linear) and ".blocks." in name):
            layer.weight.copy_(int4_rows(layer.weight))
    assert torch.allclose(logits(model), logits(by_hand), atol=1e-4)
    noisy.detach()
    assert torch.equal(logits(model), before)


def test_the_context_of_a_model_of_text_and_images_is_that_of_its_text():
    from evals.models import _context

    text = {**LLAMA, **COMMON, "head_dim": 8, "max_position_embeddings": 48}
    with torch.device("meta"):
        model = nn.Module()
        model.config = hf.Gemma3Config(text_config=text)
    assert _context(model) == 48
