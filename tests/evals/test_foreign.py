"""Models of somebody else: effects that are listed act, and whatever would pass them by is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import COMMON, LLAMA, save_tokenizer
from torch import Tensor, nn

from evals.models import load_model
from evals.noise import NoisyModel
from transforms.apply import TransformError, apply, table
from transforms.specs import BitflipSpec, CellFaults, OpticalSpec, Quantised, QuantiseSpec

INT4 = Quantised(format="int4")
WEIGHTS = QuantiseSpec(kind="quantise", weight=INT4)
INPUTS = QuantiseSpec(kind="quantise", input=INT4)
BOTH = QuantiseSpec(kind="quantise", weight=INT4, input=INT4)
FLIPS = CellFaults(mantissa=0.02)
IDS = torch.arange(5, 37).view(2, -1)


def small(config) -> nn.Module:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def mixtral(**changes) -> nn.Module:
    return small(hf.MixtralConfig(**LLAMA, **COMMON, num_local_experts=4, num_experts_per_tok=2, **changes))


def gpt_oss() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = hf.GptOssConfig(
        **LLAMA,
        **COMMON,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
        rope_parameters=rope,
    )
    return small(config)


def llama() -> nn.Module:
    return small(hf.LlamaConfig(**LLAMA, **COMMON))


def mamba() -> nn.Module:
    return small(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **COMMON))


@torch.no_grad()
def logits(model, ids=IDS, **options) -> Tensor:
    return model(input_ids=ids, **options).logits


@torch.no_grad()
def token_by_token(model) -> Tensor:
    """(T, V) logits of the first text behind a KV cache."""
    past, found = None, []
    for i in range(IDS.shape[1]):
        out = model(input_ids=IDS[:1, i : i + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits[0, 0])
    return torch.stack(found)


def int4_rows(weight: Tensor) -> Tensor:
    """Seven levels on each side of 0 for every row, by hand."""
    scale = weight.abs().amax(-1, keepdim=True) / 7
    return (weight / scale).round().clamp(-7, 7) * scale


@pytest.mark.parametrize(("make", "transposed"), [(mixtral, False), (gpt_oss, True)])
def test_experts_multiply_the_weights_that_the_hardware_has(make, transposed):
    """A copy of the model whose stored weights were rounded by hand gives the logits of the model under the transform."""
    model, by_hand = make(), make()
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if ".layers." not in name or name.endswith("bias"):
                continue
            if parameter.dim() == 3 and transposed:
                parameter.copy_(int4_rows(parameter.transpose(1, 2)).transpose(1, 2))
            elif parameter.dim() == 3 or (parameter.dim() == 2 and "gate.weight" not in name and "router" not in name):
                parameter.copy_(int4_rows(parameter))
    noisy = NoisyModel(model, [WEIGHTS], 1)
    noisy.chip(1)
    assert torch.allclose(logits(model), logits(by_hand), atol=1e-4)
    noisy.detach()
    assert torch.equal(logits(model), logits(make()))


def test_experts_are_chosen_by_their_parameter_or_by_number():
    model = mixtral()
    clean = logits(model)
    for pattern, count in (("*.experts*", 16), ("*.experts.down_proj", 8), ("*.0.mlp.experts.gate_up_proj.3", 1)):
        noisy = NoisyModel(model, [QuantiseSpec(kind="quantise", modules=[pattern], weight=INT4)], 1)
        assert len(noisy.noise.applied[0].layers) == count
        noisy.chip(1)
        assert not torch.equal(logits(model), clean)
        noisy.detach()


@pytest.mark.parametrize("role", ["weight", "input", "output"])
def test_noise_of_experts_does_not_depend_on_the_batch_or_on_a_cache(role):
    """A token keeps its noise whichever other tokens its expert meets."""
    model = mixtral()
    noisy = NoisyModel(
        model, [BitflipSpec(kind="bitflip", storage="float32", modules=["*.experts*"], **{role: FLIPS})], 1
    )
    noisy.chip(1)
    alone, together = logits(model, IDS[:1]), logits(model)
    assert torch.allclose(alone[0], together[0], atol=2e-3)
    with noisy.clean():
        assert (logits(model) - together).abs().max() > 0.05
    assert torch.allclose(token_by_token(model), alone[0], atol=5e-3)


def test_each_expert_has_noise_of_its_own():
    model = mixtral()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.experts.down_proj.copy_(block.mlp.experts.down_proj[:1].expand_as(block.mlp.experts.down_proj))
    spec = BitflipSpec(kind="bitflip", storage="float32", modules=["*.experts.down_proj"], weight=FLIPS)
    noise = apply(model, [spec], 1)
    noise.begin(0, 0, torch.device("cpu"))
    experts = model.model.layers[0].mlp.experts.transformed_experts["down_proj"]
    weights = [experts[str(i)].weight_effects[0](experts[str(i)].weight) for i in range(4)]
    assert all(not torch.equal(weights[0], other) for other in weights[1:])


def test_optical_experts_have_tiles_ranges_and_photons():
    model = mixtral()
    spec = OpticalSpec(kind="optical", attention=False, levels=16, tile=16, photons=50.0)
    noisy = NoisyModel(model, [spec], 1)
    noisy.calibrating()
    logits(model)
    noisy.noise.end_step()
    ranges = {name: value.clone() for name, value in noisy.ranges().items() if "0.mlp.experts.down_proj.0" in name}
    noisy.chip(1)
    assert len(ranges) == 2
    assert all(value > 0 for value in ranges.values())
    first = logits(model)
    assert torch.equal(first, logits(model))
    noisy.chip(2)
    assert not torch.equal(first, logits(model))


def test_an_expert_without_a_token_takes_the_range_of_its_neighbours():
    from evals.calibrate import fit
    from evals.models import EvalModel
    from evals.text import Protocol

    model = mixtral()
    noisy = NoisyModel(model, [OpticalSpec(kind="optical", attention=False)], 1)
    ranges = fit(
        EvalModel(model, None, 24, "mixtral"), noisy, [IDS[0, :1].repeat(2)], Protocol(16, 16)
    )  # one token, two experts
    of_block = {n: v for n, v in ranges.items() if "0.mlp.experts.down_proj" in n and n.endswith(".x.range")}
    assert len(of_block) == 4
    assert min(of_block.values()) > 0
    assert [float(value) for value in of_block.values()].count(float(max(of_block.values()))) >= 3


def test_a_mixture_lists_what_no_transform_reaches():
    noisy = NoisyModel(mixtral(), [WEIGHTS], 1)
    listed = "\n".join(table(noisy.noise))
    assert "8 x model.layers.*.mlp.experts.gate_up_proj.*" in listed
    assert "2 x model.layers.*.mlp.gate.weight" in listed


class Gated(nn.Module):
    """A feed-forward with a hidden parameter of three dimensions."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp, self.hidden = mlp, nn.Parameter(torch.randn(4, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + torch.einsum("btd,ehd->bte", x, self.hidden).sum(-1, keepdim=True)


class ReadsWeight(nn.Module):
    """Multiplies the weight of its layer without calling it."""

    def __init__(self, proj: nn.Module):
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


class KeepsReference(ReadsWeight):
    """Multiplies a second reference to the stored weight of its layer."""

    def __init__(self, proj: nn.Module):
        super().__init__(proj)
        self.kept = [proj.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kept[0])


class ReadsAndCalls(KeepsReference):
    """Calls its layer and also multiplies the stored weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + F.linear(x, self.kept[0].float())


def with_down_proj(make) -> nn.Module:
    model = llama()
    for block in model.model.layers:
        block.mlp.down_proj = make(block.mlp.down_proj)
    return model


def test_a_hidden_parameter_is_refused_by_default_and_listed_with_patterns():
    model = llama()
    for block in model.model.layers:
        block.mlp = Gated(block.mlp)
    with pytest.raises(TransformError, match=r"model\.layers\.\*\.mlp\.hidden.*unmatched") as error:
        NoisyModel(model, [WEIGHTS], 1)
    assert error.value.setting == "transforms.0.unmatched"
    kept = NoisyModel(model, [WEIGHTS.model_copy(update={"unmatched": "keep"})], 1)
    assert any("mlp.hidden" in line for line in table(kept.noise))
    kept.detach()
    patterns = NoisyModel(model, [WEIGHTS.model_copy(update={"modules": ["*.down_proj"]})], 1)
    assert any("mlp.hidden" in line for line in table(patterns.noise))


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (ReadsWeight, INPUTS, "down_proj.proj: the effect on its inputs never acted"),
        (ReadsWeight, BOTH, "down_proj.proj: the effect on its inputs never acted"),
        (KeepsReference, WEIGHTS, "down_proj.proj: the effect on its weights never acted"),
        (ReadsAndCalls, WEIGHTS, "down_proj.proj: the model reads its stored weight around the effects"),
    ],
)
def test_weights_that_are_read_without_a_call_are_refused(make, spec, message):
    model = with_down_proj(make)
    before, classes = logits(model), [type(module) for module in model.modules()]
    with pytest.raises(TransformError, match=message):
        NoisyModel(model, [spec], 1)
    assert torch.equal(logits(model), before)
    assert [type(module) for module in model.modules()] == classes


def test_weights_that_are_read_through_their_effect_act():
    model = with_down_proj(ReadsWeight)
    before = logits(model)
    noisy = NoisyModel(model, [QuantiseSpec(kind="quantise", modules=["*.down_proj.proj"], weight=INT4)], 1)
    noisy.chip(1)
    assert not torch.equal(logits(model), before)
    assert noisy.read_only == [f"model.layers.{i}.mlp.down_proj.proj" for i in range(2)]


def test_a_layer_that_is_never_called_is_refused():
    model = llama()
    model.model.layers[1].mlp.spare = nn.Linear(4, 4)
    with pytest.raises(TransformError, match=r"1\.mlp\.spare: .* never acted.*modules = \["):
        NoisyModel(model, [WEIGHTS], 1)


@pytest.mark.parametrize("spec", [INPUTS, BitflipSpec(kind="bitflip", output=FLIPS)])
def test_mamba_names_the_layer_that_it_multiplies_itself(spec):
    spec = spec.model_copy(update={"modules": ["*.dt_proj"]})
    with pytest.raises(TransformError, match=r"dt_proj: the effect on its (inputs|outputs) never acted"):
        NoisyModel(mamba(), [spec], 1)


def test_an_unknown_attention_argument_is_refused():
    model = llama()
    spec = QuantiseSpec(kind="quantise", attention=Quantised(format="int8"))

    def gives_more(forward):
        return lambda *args, **kwargs: forward(*args, **kwargs, bias_of_mine=torch.ones(1))

    for block in model.model.layers:
        block.self_attn.forward = gives_more(block.self_attn.forward)
    with pytest.raises(ValueError, match="LlamaAttention takes bias_of_mine"):
        NoisyModel(model, [spec], 1)
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_computes_something_else_is_refused():
    """The model's own function, compared with ours on a short text."""

    def doubled(module, query, key, value, attention_mask, scaling=None, **kwargs):
        own = hf.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
        return own(module, query * 2, key, value, attention_mask, scaling=scaling, **kwargs)

    hf.AttentionInterface.register("doubled", doubled)
    hf.masking_utils.AttentionMaskInterface.register("doubled", hf.masking_utils.sdpa_mask)
    model = llama()
    model.set_attn_implementation("doubled")
    before = logits(model)
    with pytest.raises(ValueError, match=r"its own implementation \(doubled\) computes something else"):
        NoisyModel(model, [QuantiseSpec(kind="quantise", attention=Quantised(format="int8"))], 1)
    assert torch.equal(logits(model), before)


def test_deepseek_v32_keeps_its_sparse_attention_or_is_refused():
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sparse = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "first_k_dense_replace": 2}
    model = small(hf.DeepseekV32Config(**{**LLAMA, "num_key_value_heads": 4}, **COMMON, **latent, **sparse))
    with pytest.raises(ValueError, match="takes indices"):
        NoisyModel(model, [QuantiseSpec(kind="quantise", attention=Quantised(format="int8"))], 1)


def soft_capped() -> nn.Module:
    config = hf.Gemma2Config(**LLAMA, **COMMON, head_dim=8, sliding_window=6, attn_logit_softcapping=5.0)
    return small(config)


@pytest.mark.parametrize("make", [gpt_oss, soft_capped])
def test_sinks_windows_and_soft_caps_are_computed(make):
    """With hardly any rounding the logits are the model's own, of its eager implementation; coarser, they are not."""
    model = make()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    real = mask.bool()
    want = logits(own, attention_mask=mask)[real]
    for form, apart in (("e7m9", 5e-3), ("int3", None)):
        noisy = NoisyModel(model, [QuantiseSpec(kind="quantise", attention=Quantised(format=form))], 1)
        noisy.chip(1)
        found = float((logits(model, attention_mask=mask)[real] - want).abs().max() / want.abs().max())
        assert found < apart if apart else found > 1e-2
        noisy.detach()


def test_a_clean_figure_under_attention_effects_is_that_of_the_model():
    model = gpt_oss()
    before = logits(model)
    noisy = NoisyModel(model, [QuantiseSpec(kind="quantise", attention=Quantised(format="int8"))], 1)
    with noisy.clean():
        assert torch.equal(logits(model), before)
    noisy.chip(1)
    assert not torch.equal(logits(model), before)


def test_gradients_through_soft_caps_and_sinks():
    """Against autograd through the same formula in plain torch."""
    from transforms.attention import AttentionPlan, TransformedAttention

    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator, dtype=torch.float64)
    given = [t.float().requires_grad_() for t in (q, k, v, sinks)]
    plain = [t.clone().requires_grad_() for t in (q, k, v, sinks)]

    def reference(q, k, v, sinks):
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = 3 * torch.tanh(q @ k.transpose(-1, -2) * 0.4 / 3)
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        scores = torch.cat([scores, sinks[:, None, None].expand(2, 4, 9, 1)], -1)
        return torch.softmax(scores, -1)[..., :-1] @ v

    exact = AttentionPlan(None, None, None, None, None, None, (0,) * 6, softcap=3.0)
    found = TransformedAttention.apply(exact, False, 0.4, *given[:3], None, None, None, None, None, given[3])
    want = reference(*plain)
    weight = torch.randn(want.shape, generator=generator)
    (found * weight).sum().backward()
    (want * weight).sum().backward()
    assert torch.allclose(found.double(), want, atol=1e-5)
    for ours, theirs in zip(given, plain):
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-4), (ours.grad, theirs.grad)


def test_inputs_of_latent_attention_have_noise_of_their_tokens():
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = hf.DeepseekV3Config(**{**LLAMA, "num_key_value_heads": 4}, **COMMON, **latent, first_k_dense_replace=2)
    model = small(config)
    spec = BitflipSpec(kind="bitflip", storage="float32", modules=["*.kv_b_proj"], input=FLIPS, output=FLIPS)
    noisy = NoisyModel(model, [spec], 1)
    noisy.chip(1)
    alone, together = logits(model, IDS[:1]), logits(model)
    assert torch.allclose(alone[0], together[0], atol=1e-3)
    assert torch.allclose(token_by_token(model), alone[0], atol=5e-3)


def test_unmatched_with_patterns_has_no_effect_and_is_refused():
    with pytest.raises(ValueError, match="unmatched is for the default choice"):
        QuantiseSpec(kind="quantise", modules=["*.q_proj"], weight=INT4, unmatched="keep")


def test_a_pattern_that_matches_nothing_names_one_that_would():
    with pytest.raises(TransformError, match=r'as in modules = \["model\.layers\.\*\.mlp\.down_proj"\]'):
        apply(llama(), [QuantiseSpec(kind="quantise", modules=["*.mlp.dwn_proj"], weight=INT4)], 1)


def test_blocks_that_the_configuration_leaves_out_are_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"weights that its config\.json leaves out: model\.layers\.1\."):
        load_model(str(tmp_path), "cpu")
