"""`newcompute export --packed` against the evaluated model, and every transform that cannot be packed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from pydantic import TypeAdapter
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from evals.chips import read_transforms
from evals.models import load_model
from evals.packed import layout_of
from launch.cli import main
from train.export import PROVENANCE
from train.packed import Layout
from train.read_back import ReadBackError
from train.tokenizer import load_tokenizer
from transforms.apply import TransformError
from transforms.specs import TransformSpec

INT8_INPUT = 'input = { format = "int8", scale = "row" }'
PACKABLE = {
    "int8": 'weight = { format = "int8" }',
    "int8 per tensor": 'weight = { format = "int8", scale = "tensor" }',
    "int4": 'weight = { format = "int4", scale = "group", group_size = 32 }',
    "int3 without some layers": 'weight = { format = "int3" }\nmodules = ["*.0.mlp.*", "*.q_proj"]',
    "two tables": 'weight = { format = "int4" }\nmodules = ["*.mlp.*"]\n'
    '[[transforms]]\nkind = "quantise"\nweight = { format = "int8" }\nmodules = ["*_attn.*", "lm_head"]',
    "ternary": 'weight = { format = "ternary" }',
    "bitnet": f'weight = {{ format = "ternary" }}\n{INT8_INPUT}\nnorm = true',
    "bitnet without norm": f'weight = {{ format = "ternary" }}\n{INT8_INPUT}',
    "bitnet in part": f'weight = {{ format = "ternary" }}\n{INT8_INPUT}\nmodules = ["*.mlp.*"]',
}
REFUSED = {
    "other inputs": f'weight = {{ format = "int8" }}\n{INT8_INPUT}',
    "no integers": 'weight = { format = "fp8_e4m3" }',
    "blocks of floats": 'weight = { format = "mxfp4" }',
    "random": 'weight = { format = "int4", rounding = "stochastic" }',
    "inputs alone": INT8_INPUT,
    "norm alone": 'weight = { format = "ternary" }\nnorm = true',
    "inputs of four bits": 'weight = { format = "ternary" }\ninput = { format = "int4" }',
    "tracked inputs": 'weight = { format = "ternary" }\ninput = { format = "int8", scale = "tracked" }',
    "attention": 'weight = { format = "int8" }\nattention = { format = "int8" }',
}


@pytest.fixture(autouse=True)
def uncompiled():
    """transformers compiles BitLinear: the same numbers, half a minute later."""
    with torch._dynamo.config.patch(disable=True):
        yield


def write_model(folder: Path, **changes: object) -> Path:
    """A random Llama with logits far from uniform, and the byte tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 257, "max_position_embeddings": 64}  # fmt: skip
    return save(LlamaForCausalLM(LlamaConfig(**sizes | changes)), folder)


def save(model: torch.nn.Module, folder: Path) -> Path:
    for parameter in model.parameters():
        parameter.data.mul_(5) if parameter.dim() > 1 else parameter.data.add_(0.1)
    model.save_pretrained(folder)
    load_tokenizer("bytes", "").save_hf(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "hf")


def write_table(path: Path, body: str) -> str:
    path.write_text(f'[[transforms]]\nkind = "quantise"\n{body}\n')
    return str(path)


def evaluated_logits(folder: Path, table: str, tokens: torch.Tensor) -> torch.Tensor:
    loaded = load_model(str(folder), "cpu")
    noisy = read_transforms([table], str(folder)).attach(loaded)
    noisy.chip(1)
    with torch.no_grad():
        return loaded.model(tokens).logits


@pytest.mark.parametrize("name", PACKABLE)
def test_a_packed_export_gives_the_evaluated_logits(name, folder, tmp_path, capsys):
    table = write_table(tmp_path / "table.toml", PACKABLE[name])
    main(["export", "--model", str(folder), "--transforms", table, "--out", str(tmp_path / "out"), "--packed"])
    assert "MB of weights" in capsys.readouterr().out
    tokens = torch.randint(0, 257, (32, 8), generator=torch.Generator().manual_seed(1))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = packed(tokens).logits
    expected = evaluated_logits(folder, table, tokens)
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    # As in tests/train/test_packed.py: an input between two codes may go either way, in a few texts.
    assert error.sort().values[: 28 if "bitnet" in name else 32].max() < 1e-5
    assert error.max() < 0.05
    provenance = json.loads((tmp_path / "out" / PROVENANCE).read_text())
    assert provenance["packed"][0]["kind"] == "quantise"
    assert provenance["transforms"] == []
    before, after = (AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "out"))
    assert after("héllo <|begin_of_text|>")["input_ids"] == before("héllo <|begin_of_text|>")["input_ids"]


@pytest.mark.parametrize("name", ["int8", "int4", "bitnet"])
def test_layers_with_biases_and_tied_heads_are_packed(name, tmp_path):
    torch.manual_seed(0)
    opt = OPTConfig(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=257,
                    max_position_embeddings=64, word_embed_proj_dim=32)  # fmt: skip
    folder = save(OPTForCausalLM(opt), tmp_path / "opt")
    table = write_table(tmp_path / "table.toml", PACKABLE[name])
    main(["export", "--model", str(folder), "--transforms", table, "--out", str(tmp_path / "out"), "--packed"])
    tokens = torch.randint(0, 257, (8, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    expected = evaluated_logits(folder, table, tokens)
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.sort().values[:6].max() < 1e-5
    assert error.max() < (0.05 if name == "bitnet" else 1e-5)


def test_packed_folders_are_evaluated_like_the_transformed_model(folder, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 3)
    table = write_table(tmp_path / "table.toml", PACKABLE["int4"])
    common = ["--text", str(text), "--out", str(tmp_path / "result.json")]
    main(["eval", "--model", str(folder), "--transforms", table, "--chips", "1", *common])
    expected = next(iter(json.loads((tmp_path / "result.json").read_text())["text"].values()))["perplexity"]
    for layout in ("torchao", "metal"):
        out = str(tmp_path / layout)
        main(["export", "--model", str(folder), "--transforms", table, "--out", out, "--packed", layout])
        main(["eval", "--model", out, *common])
        found = next(iter(json.loads((tmp_path / "result.json").read_text())["text"].values()))["perplexity"]
        assert found == pytest.approx(expected, rel=1e-5)
    sizes = [os.path.getsize(tmp_path / layout / "model.safetensors") for layout in ("torchao", "metal")]
    stored = load_file(tmp_path / "torchao" / "model.safetensors")
    codes = sum(tensor.numel() for name, tensor in stored.items() if name.endswith("qdata"))
    assert sizes[0] - sizes[1] > 0.4 * codes  # half of them, less what the second scale of each group takes
    with pytest.raises(SystemExit):
        main(["eval", "--model", str(tmp_path / "torchao"), "--transforms", table, *common])


@pytest.mark.parametrize(("layout", "name"), [("torchao", "int4"), ("metal", "int4"), ("bitnet", "bitnet")])
def test_a_packed_folder_that_transformers_reads_otherwise_is_refused(layout, name, folder, tmp_path, monkeypatch):
    import evals.packed as module

    usual = module.write_packed

    def swapped(folder, tensors, layers, others, layout):
        damaged = {name: replace(packed, codes=packed.codes.flip(0)) for name, packed in layers.items()}
        return usual(folder, tensors, damaged, others, layout)

    monkeypatch.setattr(module, "write_packed", swapped)
    table = write_table(tmp_path / "table.toml", PACKABLE[name])
    with pytest.raises(ReadBackError, match="computes other logits"):
        module.export_packed(str(folder), read_transforms([table], str(folder)), tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_a_packed_folder_with_another_tokenizer_is_refused(folder, tmp_path, monkeypatch):
    import evals.packed as module

    usual = module.write_packed

    def other_tokenizer(folder, *arguments):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "GPT2Tokenizer"
        settings["split_special_tokens"] = False
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return usual(folder, *arguments)

    monkeypatch.setattr(module, "write_packed", other_tokenizer)
    table = write_table(tmp_path / "table.toml", PACKABLE["int8"])
    with pytest.raises(ReadBackError, match=r"other ids .* for the text .* it has \["):
        module.export_packed(str(folder), read_transforms([table], str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_is_packed_as_it_was_trained(run_here, tmp_path):
    spec = '{kind = "quantise", weight = {format = "ternary"}, input = {format = "int8", scale = "row"}, norm = true}'
    run_here(training__stop_after=5, transforms=f"[{spec}]")
    main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "packed"), "--packed"])
    tokens = torch.randint(0, 257, (1, 16), generator=torch.Generator().manual_seed(0))
    loaded = load_model(str(tmp_path / "run"), "cpu")
    read_transforms(["run"], str(tmp_path / "run")).attach(loaded).chip(0)
    with torch.no_grad():
        expected = loaded.model(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "packed" / PROVENANCE).read_text())["step"] == 5


def specs(*bodies: str) -> list:
    import tomli

    text = "".join(f'[[transforms]]\nkind = "quantise"\n{body}\n' for body in bodies)
    return [TypeAdapter(TransformSpec).validate_python(table) for table in tomli.loads(text)["transforms"]]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_refused_by_name(name):
    with pytest.raises(TransformError, match=r"quantise with .* cannot be packed. What can: ") as refused:
        layout_of(specs(PACKABLE["int8"], REFUSED[name]))
    assert refused.value.index == 1


def test_one_folder_has_one_layout():
    assert layout_of(specs(PACKABLE["bitnet"], PACKABLE["bitnet in part"].replace("norm", ""))[:1]) == Layout(
        "bitnet", 1e-5
    )
    with pytest.raises(TransformError, match=r"other inputs .* than transforms\.0"):
        layout_of(specs(PACKABLE["bitnet"], PACKABLE["bitnet without norm"]))
    with pytest.raises(TransformError, match="other inputs"):
        layout_of(specs(PACKABLE["ternary"], PACKABLE["bitnet"]))


BAD = {
    "bit errors": ('weight = { mantissa = 1e-3 }', [], 'kind = "bitflip" cannot be packed'),
    "no such groups": ('weight = { format = "int4", scale = "group", group_size = 24 }', [], "do not divide"),
    "groups that leave a rest": ('weight = { format = "int4", scale = "group", group_size = 48 }', [], "groups of 48"),
    "twice": (f'{PACKABLE["int8"]}\n[[transforms]]\nkind = "quantise"\n{PACKABLE["int8"]}', [], "has 2 effects"),
    "layout": (PACKABLE["int8"], ["--packed", "bitnet"], "inputs of these transforms are as they are"),
    "rounded inputs": (PACKABLE["bitnet"], ["--packed", "metal"], "rounded to int8, which needs bitnet"),
    "unknown range": ('weight = { format = "int8", scale = "learned" }', [], "converters are not known"),
    "step": (PACKABLE["int8"], ["--step", "5"], "a Hugging Face folder has no steps"),
    "no nn.Linear": (PACKABLE["int8"], [], "c_attn is no torch.nn.Linear"),
    "tied head": ('weight = { format = "int8" }\nmodules = ["lm_head"]', [], "shares its weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_exports_end_with_a_message_and_no_folder(name, folder, tmp_path, capsys):
    body, more, message = BAD[name]
    if name == "no nn.Linear":
        gpt2 = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=257, n_positions=64)
        model = save(GPT2LMHeadModel(gpt2), tmp_path / "gpt2")
    else:
        model = write_model(tmp_path / "tied", tie_word_embeddings=True) if name == "tied head" else folder
    table = write_table(tmp_path / "table.toml", body)
    if name == "bit errors":
        Path(table).write_text(Path(table).read_text().replace("quantise", "bitflip"))
    with pytest.raises(SystemExit) as ended:
        main(
            ["export", "--model", str(model), "--transforms", table, "--out", str(tmp_path / "out"), "--packed", *more]
        )
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "modules" not in error or name != "bit errors"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "hf", "--out", "out"], "--model: only with --packed"),
     (["--run", "run", "--out", "out", "--transforms", "table.toml"], "--transforms: only with --packed")],
)  # fmt: skip
def test_plain_exports_are_of_runs(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["export", *arguments])
    assert message in capsys.readouterr().err
