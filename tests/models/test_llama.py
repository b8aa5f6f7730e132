"""The model and its Hugging Face files, against transformers and a published continuation."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models.hf import HFWeights, check_names, hf_config, shape_from_hf, strip_padding, write_json, write_safetensors
from models.llama import Llama, rope_frequencies, rope_table
from models.sizes import SIZES, LlamaShape, RopeScaling
from parallel.init import load_weights
from train.tokenizer import load_tokenizer

PLAIN = LlamaShape(dim=64, num_layers=2, num_heads=4, num_kv_heads=4, ffn_dim=96, vocab_size=256, max_context=128)
SHAPES = {
    "multi-head": PLAIN,
    "grouped-query": replace(PLAIN, num_kv_heads=2),
    "multi-query": replace(PLAIN, num_kv_heads=1, num_layers=3),
    "tied": replace(PLAIN, tied_embeddings=True),
    "odd vocabulary": replace(PLAIN, vocab_size=131),
    "tied odd vocabulary": replace(PLAIN, vocab_size=77, tied_embeddings=True),
    "wide heads": LlamaShape(48, 2, 4, 2, 80, 256, head_dim=32, max_context=128),
    "narrow heads": LlamaShape(64, 2, 4, 2, 80, 256, head_dim=6, max_context=128),
    "another base and epsilon": replace(PLAIN, rope_theta=500_000.0, norm_eps=1e-3),
    # An original context of 32 puts wavelengths of a 16-wide head into all three bands, and 32 < 100 positions.
    "scaled rope": replace(PLAIN, rope_scaling=RopeScaling(8.0, 1.0, 4.0, original_context=32)),
    "scaled rope, all at once": LlamaShape(
        dim=48, num_layers=2, num_heads=6, num_kv_heads=3, ffn_dim=100, vocab_size=199, head_dim=24, max_context=128,
        rope_theta=500_000.0, rope_scaling=RopeScaling(32.0, 1.0, 4.0, original_context=24), tied_embeddings=True,
    ),
}  # fmt: skip


def random_shape(seed: int) -> LlamaShape:
    """Any combination of what a shape can say, small."""
    draw = random.Random(seed)
    kv_heads, head_dim = draw.choice([1, 2, 3]), draw.choice([4, 8, 10, 16])
    heads = kv_heads * draw.choice([1, 2, 4])
    scaling = RopeScaling(draw.choice([4.0, 8.0, 32.0]), 1.0, 4.0, draw.choice([16, 40, 64]))
    return LlamaShape(
        dim=heads * draw.choice([6, 8, 12]), num_layers=draw.randint(1, 3), num_heads=heads, num_kv_heads=kv_heads,
        ffn_dim=draw.randint(20, 90), vocab_size=draw.randint(60, 400), head_dim=head_dim,
        max_context=128, rope_theta=draw.choice([100.0, 10_000.0, 500_000.0]),
        rope_scaling=draw.choice([None, scaling]), tied_embeddings=draw.choice([False, True]),
    )  # fmt: skip


def random_model(shape: LlamaShape, seed: int = 0) -> Llama:
    """Weights large enough that logits differ by far more than the tolerance when anything is wrong."""
    model = Llama(shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.1 * noise)
    return model


def random_tokens(shape: LlamaShape, length: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.randint(shape.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))


def in_transformers(model: Llama) -> LlamaForCausalLM:
    """The same weights in transformers' model, whose configuration is written here by hand."""
    shape = model.shape
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling:
        scaling = shape.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_context,
        }
    reference = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.dim, num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, intermediate_size=shape.ffn_dim,
            vocab_size=shape.vocab_size, max_position_embeddings=shape.max_context, rope_parameters=rope,
            rms_norm_eps=shape.norm_eps, tie_word_embeddings=shape.tied_embeddings, attn_implementation="eager",
        )
    )  # fmt: skip
    weights = {name: tensor[: shape.vocab_size] if "embed" in name or "head" in name else tensor
               for name, tensor in model.state_dict().items()}  # fmt: skip
    reference.load_state_dict(weights)
    return reference.eval()


@torch.no_grad()
def assert_equal_logits(model: Llama, reference: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    logits, expected = model(tokens), reference(tokens).logits
    assert expected.std() > 0.1, "logits this small would agree by chance"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def tensors_of(model: Llama) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# Forward pass


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name):
    model = random_model(SHAPES[name])
    assert_equal_logits(model, in_transformers(model), random_tokens(model.shape))


@pytest.mark.parametrize("seed", range(6))
def test_logits_of_random_shapes_equal_transformers(seed):
    model = random_model(random_shape(seed), seed)
    assert_equal_logits(model, in_transformers(model), random_tokens(model.shape, seed=seed))


@pytest.mark.parametrize(("family", "size"), [("clm", "60M"), ("llama3", "1B"), ("llama3", "8B"), ("llama3", "405B")])
def test_rotary_frequencies_of_real_sizes_equal_transformers(family, size, tmp_path):
    """Bit for bit: at position 100,000 a difference in the last place of a frequency would be a visible angle."""
    shape = SIZES[family][size]
    write_json(tmp_path / "config.json", hf_config(shape, 0, [1], "float32"))
    reference = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    assert torch.equal(rope_frequencies(shape), reference.inv_freq)

    positions = torch.tensor([0, 1, 2047, shape.max_context - 1])
    cos, sin = reference(torch.empty(1), positions[None])
    our_cos, our_sin = rope_table(shape, shape.max_context)
    torch.testing.assert_close(our_cos[positions], cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(our_sin[positions], sin[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_padding_is_never_visible(tied):
    """Whatever stands in the padding rows, logits have the vocabulary's width and the same values."""
    model = random_model(replace(PLAIN, vocab_size=131, tied_embeddings=tied))
    tokens = random_tokens(model.shape)
    with torch.no_grad():
        before = model(tokens)
        assert before.shape == (2, 100, 131)
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            assert weight.shape[0] == 256
            weight[131:] = float("nan")
        assert torch.equal(model(tokens), before)


def test_padding_rows_get_no_gradient():
    model = random_model(replace(PLAIN, vocab_size=131))
    model(random_tokens(model.shape)).square().sum().backward()
    assert model.lm_head.weight.grad[:131].abs().amin(dim=1).min() > 0
    assert not model.lm_head.weight.grad[131:].any()


@pytest.mark.parametrize("position", [0, 1, 50, 99])
def test_attention_is_causal(position):
    model = random_model(SHAPES["scaled rope"])
    tokens = random_tokens(model.shape)
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % model.shape.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(dim=-1).all()


@pytest.mark.parametrize("name", ["grouped-query", "tied odd vocabulary", "scaled rope"])
def test_meta_build_gives_the_same_model(name):
    model = random_model(SHAPES[name])
    with torch.device("meta"):
        other = Llama(SHAPES[name])
    assert all(parameter.is_meta for parameter in other.parameters())
    other.to_empty(device="cpu")
    other.reset_after_to_empty()
    weights = tensors_of(model)
    load_weights([other], lambda parameter, row, rows: weights[parameter][row : row + rows])
    assert tensors_of(other).keys() == weights.keys()
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == model.shape.tied_embeddings
    tokens = random_tokens(model.shape)
    with torch.no_grad():
        assert torch.equal(model(tokens), other(tokens))


def test_rotary_table_is_no_checkpoint_state():
    model = Llama(PLAIN)
    assert set(model.state_dict()) == {*tensors_of(model)}


# A pretrained model


@pytest.fixture(scope="module")
def stories(real_inputs) -> tuple[Llama, Path]:
    folder = real_inputs / "stories260K"
    with torch.device("meta"):
        model = Llama(shape_from_hf(folder))
    model.to_empty(device="cpu")
    model.reset_after_to_empty()
    weights = HFWeights(folder)
    check_names(weights, {name: parameter.shape for name, parameter in model.named_parameters()}, model.shape)
    load_weights([model], weights.read)
    return model.eval(), folder


def test_pretrained_logits_equal_transformers(stories):
    model, folder = stories
    tokenizer = load_tokenizer("hf", str(folder))
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    tokens = torch.tensor([[tokenizer.bos_id, *tokenizer.encode_batch([text])[0].tolist()]])
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_equal_logits(model, reference, tokens)
    assert_equal_logits(model, reference, random_tokens(model.shape, model.shape.max_context))


def test_greedy_continuation_is_the_published_one(stories):
    """256 tokens from BOS; llama2.c's document shows them as text."""
    model, folder = stories
    tokenizer = load_tokenizer("hf", str(folder))
    tokens = [tokenizer.bos_id]
    with torch.no_grad():
        for _ in range(256):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    published = (folder / "greedy.txt").read_text(encoding="utf-8").removesuffix("\n")
    assert tokenizer.decode(tokens) == published


# Hugging Face files


@pytest.mark.parametrize(
    "shape",
    [*(shape for family in SIZES.values() for shape in family.values()), *SHAPES.values()],
    ids=[*(f"{family}-{size}" for family in SIZES for size in SIZES[family]), *SHAPES],
)
def test_shape_round_trip(shape, tmp_path):
    write_json(tmp_path / "config.json", hf_config(shape, 0, [1], "float32"))
    assert shape_from_hf(tmp_path) == shape


# config.json as released, in transformers 4's spelling, without what concerns generation.
RELEASED = {
    "1B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
    "8B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
}  # fmt: skip


@pytest.mark.parametrize("size", RELEASED)
def test_released_configurations_are_our_sizes(size, tmp_path):
    write_json(tmp_path / "config.json", RELEASED[size])
    assert shape_from_hf(tmp_path) == SIZES["llama3"][size]


def test_released_configuration_without_optional_keys(tmp_path):
    """Llama 1 folders name neither KV heads nor rotary settings; transformers' defaults then hold."""
    optional = ("num_key_value_heads", "rope_scaling", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "mlp_bias")
    bare = {key: value for key, value in RELEASED["8B"].items() if key not in optional}
    write_json(tmp_path / "config.json", bare)
    shape, defaults = shape_from_hf(tmp_path), LlamaConfig()
    assert (shape.num_kv_heads, shape.rope_theta, shape.rope_scaling) == (32, 10_000.0, None)
    assert shape.norm_eps == defaults.rms_norm_eps
    assert shape.tied_embeddings == defaults.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    ],
)
def test_what_the_model_lacks_is_refused(change, message, tmp_path):
    write_json(tmp_path / "config.json", RELEASED["8B"] | change)
    with pytest.raises(ValueError, match=message) as refusal:
        shape_from_hf(tmp_path)
    assert str(tmp_path / "config.json") in str(refusal.value)


@pytest.mark.parametrize("content", [None, "{", ""])
def test_unreadable_configuration_names_the_file(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        shape_from_hf(tmp_path)


@pytest.mark.parametrize("missing", ["hidden_size", "vocab_size", "num_hidden_layers", "model_type"])
def test_incomplete_configuration_names_the_file_and_the_key(missing, tmp_path):
    write_json(tmp_path / "config.json", {key: value for key, value in RELEASED["8B"].items() if key != missing})
    with pytest.raises(ValueError, match=missing) as refusal:
        shape_from_hf(tmp_path)
    assert "config.json" in str(refusal.value)


@pytest.mark.parametrize("name", ["grouped-query", "tied", "scaled rope", "wide heads"])
def test_transformers_reads_our_config(name, tmp_path):
    shape = SHAPES[name]
    write_json(tmp_path / "config.json", hf_config(shape, bos_id=3, eos_ids=[5, 7], dtype="bfloat16"))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LlamaConfig
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (
        shape.dim, shape.num_layers, shape.ffn_dim,
    )  # fmt: skip
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        shape.num_heads, shape.num_kv_heads, shape.head_dim,
    )  # fmt: skip
    assert (config.vocab_size, config.max_position_embeddings) == (shape.vocab_size, shape.max_context)
    assert (config.bos_token_id, config.eos_token_id, config.dtype) == (3, [5, 7], torch.bfloat16)
    assert (config.tie_word_embeddings, config.rms_norm_eps) == (shape.tied_embeddings, shape.norm_eps)
    rope = dict(config.rope_parameters)
    assert rope["rope_theta"] == shape.rope_theta
    if shape.rope_scaling is None:
        assert rope["rope_type"] == "default"
    else:
        assert rope["rope_type"] == "llama3"
        assert (rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]) == (8.0, 1.0, 4.0)
        assert rope["original_max_position_embeddings"] == 32


def write_folder(folder: Path, model: Llama, parts: int, dtype: torch.dtype = torch.float32) -> int:
    """config.json and the weights in `parts` files; returns what `write_safetensors` does."""
    shape = model.shape
    write_json(folder / "config.json", hf_config(shape, 0, [1], str(dtype).removeprefix("torch.")))
    tensors = list(tensors_of(model).items())
    groups = (dict(tensors[part::parts]) for part in range(parts))
    return write_safetensors(folder, groups, shape, dtype)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", ["grouped-query", "odd vocabulary", "tied odd vocabulary", "scaled rope"])
def test_transformers_loads_our_weights(name, parts, tmp_path):
    model = random_model(SHAPES[name])
    total = write_folder(tmp_path, model, parts)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal_logits(model, loaded.eval(), random_tokens(model.shape))

    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    stored = {key: tensor for file in files for key, tensor in load_file(tmp_path / file).items()}
    assert total == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    index = tmp_path / "model.safetensors.index.json"
    if parts == 1:
        assert files == ["model.safetensors"]
        assert not index.exists()
    else:
        assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == total
        assert content["weight_map"].keys() == stored.keys()


def test_weights_are_written_in_the_asked_type_without_padding(tmp_path):
    model = random_model(SHAPES["odd vocabulary"])
    write_folder(tmp_path, model, 1, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in tensors_of(model).items():
        expected = tensor[:131] if name in ("model.embed_tokens.weight", "lm_head.weight") else tensor
        assert torch.equal(stored[name], expected.bfloat16())
        assert torch.equal(strip_padding(name, tensor, model.shape), expected)


def test_import_after_export_gives_identical_weights(tmp_path):
    model = random_model(SHAPES["odd vocabulary"])
    write_folder(tmp_path, model, 3)
    other = Llama(shape_from_hf(tmp_path))
    load_weights([other], HFWeights(tmp_path).read)
    padding_rows = {"model.embed_tokens.weight", "lm_head.weight"}
    for (name, mine), theirs in zip(tensors_of(model).items(), other.parameters(), strict=True):
        if name in padding_rows:
            assert torch.equal(mine[:131], theirs[:131])
            assert not theirs[131:].any()
        else:
            assert torch.equal(mine, theirs)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def test_rows_are_read_in_parts_and_padded_with_zeros(tmp_path):
    matrix, vector = torch.randn(7, 3), torch.randn(5)
    save_file({"a": matrix}, tmp_path / "model-1.safetensors")
    save_file({"b": vector}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    weights = HFWeights(tmp_path)
    assert weights.names == {"a", "b"}
    assert weights.shape("a") == [7, 3]
    padded = torch.cat([matrix, torch.zeros(9, 3)])
    for first, rows in [(0, 7), (2, 3), (5, 6), (7, 4), (9, 2), (3, 0), (7, 0)]:
        assert torch.equal(weights.read("a", first, rows), padded[first : first + rows])
    assert torch.equal(weights.read("a"), matrix)
    assert torch.equal(weights.read("b", 1, 2), vector[1:3])


STRAY = {
    "a second file": (["model", "model_ema"], None, "model.safetensors and model_ema.safetensors both hold a"),
    "shards beside a whole file": (["model", "model-1"], {"a": "model-1"}, "and model-1.safetensors both hold a"),
    "a shard that the index lacks": (["model-1", "model-2"], {"a": "model-1"}, "model-1.* and model-2.* both hold a"),
    "two shards of the index": (["model-1", "model-2"], {"a": "model-1", "b": "model-2"}, "both hold a"),
    "no file that is named": (["weights"], None, r"has weights\.safetensors, but neither model\.safetensors nor"),
    "a shard that is missing": (["model-1"], {"a": "model-1", "b": "model-2"}, "model-2.* is missing"),
}


@pytest.mark.parametrize("name", STRAY)
def test_weights_are_those_that_transformers_reads_or_refused(name, tmp_path):
    files, weight_map, message = STRAY[name]
    for i, file in enumerate(files):
        save_file({"a": torch.full((2, 2), float(i))}, tmp_path / f"{file}.safetensors")
    if weight_map is not None:
        write_index(tmp_path, {key: f"{file}.safetensors" for key, file in weight_map.items()})
    with pytest.raises(ValueError, match=message):
        HFWeights(tmp_path)


def test_files_that_transformers_ignores_are_ignored(tmp_path):
    """Mistral's folders hold the weights once more, under other names."""
    model = random_model(PLAIN)
    write_folder(tmp_path, model, 3)
    for part in range(2):
        save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / f"consolidated.{part:02}.safetensors")
    assert HFWeights(tmp_path).names == set(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())


def test_an_adapter_beside_a_model_is_refused(tmp_path):
    write_folder(tmp_path, random_model(PLAIN), 1)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        HFWeights(tmp_path)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        HFWeights(tmp_path)
    model = random_model(PLAIN)
    write_folder(tmp_path, model, 1)
    weights = HFWeights(tmp_path)
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    check_names(weights, names, PLAIN)
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*model\.extra"):
        check_names(weights, names | {"model.extra": torch.Size([1])}, PLAIN)
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight has shape \[64\] in the folder, this model needs \[65\]"
    ):
        check_names(weights, names | {"model.norm.weight": torch.Size([65])}, PLAIN)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \[256, 64\].*needs \[200, 64\]"):
        check_names(weights, names, replace(PLAIN, vocab_size=200))
