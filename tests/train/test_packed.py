"""Packed folders, loaded by transformers in a process without this project, against a plain fake-quantised model."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.packed import BITNET, METAL, TORCHAO, Layout, PackedWeight, pack_ternary, patterns_of, write_packed

LOAD = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'train', 'models', 'parallel', 'transforms', 'evals', 'launch'}:
            raise ImportError('this project is not installed here: ' + name)
sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
tokens = load_file(sys.argv[1])['tokens']
logits = {}
for folder in sys.argv[3:]:
    # The metal layout asks for an Apple GPU unless told otherwise.
    place = {'device_map': 'cpu'} if '"metal"' in open(folder + '/config.json').read() else {}
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **place)
    problems = {name: found for name, found in report.items() if found}
    assert not problems, (folder, problems)
    with torch.no_grad():
        logits[folder] = model(tokens).logits.contiguous()
save_file(logits, sys.argv[2])
"""

PLAIN = Layout(TORCHAO)


@dataclass(frozen=True)
class Case:
    weight: str
    """ "int4 group 32", "int8 row", "ternary tensor", or several for the layers in turn."""
    layout: Layout = PLAIN
    left_out: tuple[str, ...] = ("lm_head",)


CASES = {
    "int8 per row": Case("int8 row"),
    "int8 per tensor": Case("int8 tensor"),
    "int8 per group": Case("int8 group 32"),
    "int4 per group of 32": Case("int4 group 32"),
    "int4 per group of 16": Case("int4 group 16"),
    "int4 per row": Case("int4 row"),
    "int4 per tensor": Case("int4 tensor"),
    "int2 per group": Case("int2 group 32"),
    "ternary, inputs as they are": Case("ternary tensor"),
    "output head too": Case("int8 row", left_out=()),
    "several kinds": Case("int8 row, int4 group 32, ternary tensor"),
    "int4, two to a byte": Case("int4 group 32", Layout(METAL)),
    "int4 per row, two to a byte": Case("int4 row", Layout(METAL)),
    "ternary, four to a byte": Case("ternary tensor", Layout(METAL)),
    "int8 and int4 in one width": Case("int8 row, int4 tensor", Layout(METAL)),
    "bitnet": Case("ternary tensor", Layout(BITNET)),
    "bitnet with norm": Case("ternary tensor", Layout(BITNET, norm_eps=1e-5)),
    "bitnet in part": Case("ternary tensor", Layout(BITNET), ("lm_head", "model.layers.1.mlp.up_proj")),
}


def reference_codes(weight: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """(codes, a scale for each weight, scales by blocks, bits), by the formulas of the literature, block by block."""
    kind, granularity, *group = how.split()
    out, inputs = weight.shape
    if kind == "ternary":
        scales = torch.tensor([[max(weight.abs().mean().item(), 1e-5)]])
        largest, bits = 1, 2
    else:
        bits = int(kind.removeprefix("int"))
        largest = 2 ** (bits - 1) - 1
        width = int(group[0]) if group else inputs
        pieces = [weight] if granularity == "tensor" else weight.split(1)
        columns = [list(piece.split(width, 1)) for piece in pieces]
        scales = torch.tensor([[block.abs().max().item() / largest for block in row] for row in columns])
    spread = scales.repeat_interleave(out // scales.shape[0], 0).repeat_interleave(inputs // scales.shape[1], 1)
    return (weight / spread).round().clamp(-largest, largest), spread, scales, bits


class FakeQuantised(nn.Module):
    """y = (s_x c_x) (s_w c_w)^T, with inputs rounded to int8 per token and normalised before, where asked for."""

    def __init__(self, codes: Tensor, scale: Tensor, layout: Layout):
        super().__init__()
        self.weight, self.layout = codes * scale, layout

    def forward(self, x: Tensor) -> Tensor:
        if self.layout.norm_eps is not None:
            x = x / (x.square().mean(-1, keepdim=True) + self.layout.norm_eps).sqrt()
        if self.layout.name == BITNET:
            largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
            x = (x * 127 / largest).round().clamp(-128, 127) * largest / 127
        return x @ self.weight.T


def small_model() -> nn.Module:
    """A random Llama whose logits are far from uniform; its widths are neither powers of two nor equal."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)
    return model


def write_case(model, case: Case, folder: Path) -> nn.Module:
    """Write the packed folder, and return the fake-quantised model that it has to equal."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in case.left_out]
    kinds = case.weight.split(", ")
    fake, layers = copy.deepcopy(model), {}
    for i, name in enumerate(names):
        codes, spread, scales, bits = reference_codes(model.get_submodule(name).weight.data, kinds[i % len(kinds)])
        layers[name] = PackedWeight(codes.to(torch.int8), scales, bits)
        fake.set_submodule(name, FakeQuantised(codes, spread, case.layout))
    folder.mkdir()
    model.config.save_pretrained(folder)
    write_packed(folder, dict(model.named_parameters()), layers, list(case.left_out), case.layout)
    return fake


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_model()


@pytest.fixture(scope="module")
def reloaded(model, tmp_path_factory) -> dict[str, tuple[Tensor, Tensor]]:
    """For each case the logits of the folder as transformers loads it, and those of the reference, (32, 8, 96)."""
    place = tmp_path_factory.mktemp("packed")
    tokens = torch.randint(0, 96, (32, 8), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens}, place / "tokens.safetensors")
    expected, folders = {}, {}
    for i, (name, case) in enumerate(CASES.items()):
        folders[name] = place / str(i)
        with torch.no_grad():
            expected[name] = write_case(model, case, folders[name])(tokens).logits
    with torch.no_grad():
        expected["as it is"] = model(tokens).logits
    # Compiled, BitLinear computes the same; the compiler would take half a minute.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    arguments = [str(place / "tokens.safetensors"), str(place / "logits.safetensors"), *map(str, folders.values())]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], cwd=place, env=environment, capture_output=True,
                          text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(place / "logits.safetensors")
    return {name: (found[str(folders[name])], expected[name]) for name in CASES} | {
        "as it is": (expected["as it is"], expected["as it is"])
    }


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_gives_the_logits_of_the_fake_quantised_model(name, reloaded):
    found, expected = reloaded[name]
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)  # (32,) of each text
    if CASES[name].layout.name == BITNET:
        # An input within an ulp of the middle between two codes may be rounded either way; that text then differs
        # by about a code, the others do not.
        assert error.sort().values[:28].max() < 1e-5
        assert error.max() < 0.05
    else:
        assert error.max() < 1e-5
    clean, _ = reloaded["as it is"]
    assert (found - clean).norm() > 5e-3 * clean.norm()


def test_files_hold_the_codes_and_nothing_that_is_pickled(model, tmp_path):
    write_case(model, CASES["int4 per group of 32"], tmp_path / "int4")
    write_case(model, CASES["int4, two to a byte"], tmp_path / "halves")
    write_case(model, CASES["bitnet"], tmp_path / "bitnet")
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".json", ".safetensors"}
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight.data
    stored = load_file(tmp_path / "int4" / "model.safetensors")
    codes, _, scales, _ = reference_codes(weight, "int4 group 32")
    assert torch.equal(stored[f"{name}._weight_qdata"], codes.to(torch.int8))
    assert torch.equal(stored[f"{name}._weight_scale"], scales)
    stored = load_file(tmp_path / "halves" / "model.safetensors")
    assert stored[f"{name}.weight"].numel() * 8 == weight.numel()  # of 32 bits
    stored = load_file(tmp_path / "bitnet" / "model.safetensors")
    assert stored[f"{name}.weight"].dtype == torch.uint8
    assert stored[f"{name}.weight"].numel() * 4 == weight.numel()


def test_ternary_codes_are_where_transformers_looks_for_them(monkeypatch):
    import transformers.integrations.bitnet as bitnet

    codes = torch.randint(-1, 2, (24, 10), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    with torch._dynamo.config.patch(disable=True):
        assert torch.equal(bitnet.unpack_weights(pack_ternary(codes), torch.int8), codes)


def test_a_large_model_is_written_in_several_files(model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    import train.packed as module

    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    fake = write_case(model, CASES["several kinds"], tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
        torch.testing.assert_close(loaded(tokens).logits, fake(tokens).logits, rtol=1e-5, atol=1e-4)


def test_layers_left_out_of_bitnet_are_just_those():
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = [f"model.layers.{i}.mlp.{part}" for i in range(12) for part in ("up_proj", "up_proj_2")] + ["model.lm_head"]
    left_out = ["model.layers.1.mlp.up_proj", "lm_head"]
    patterns = patterns_of(left_out, [name for name in names if name not in left_out])
    assert [name for name in [*names, "lm_head"] if not should_convert_module(name, patterns)] == left_out
    # torchao's reader asks for parameters.
    assert not should_convert_module(f"{left_out[0]}.weight", patterns)
    assert should_convert_module(f"{left_out[0]}_2.weight", patterns)


def test_names_that_are_no_other_names_beginning_are_written_plainly():
    left_out = ["lm_head", "model.layers.1.mlp.up_proj"]
    assert patterns_of(left_out, ["model.layers.11.mlp.up_proj", "model.layers.1.mlp.down_proj"]) == left_out


def ternary(out: int, inputs: int) -> PackedWeight:
    return PackedWeight(torch.zeros(out, inputs, dtype=torch.int8), torch.ones(1, 1), 2)


def test_bad_shapes_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="k_proj has 6 rows: the bitnet layout packs rows by four"):
        write_packed(tmp_path, {"k_proj.weight": torch.zeros(6, 8)}, {"k_proj": ternary(6, 8)}, [], Layout(BITNET))
    per_row = PackedWeight(torch.zeros(8, 8, dtype=torch.int8), torch.ones(8, 1), 2)
    with pytest.raises(ValueError, match="one scale per tensor"):
        write_packed(tmp_path, {"k_proj.weight": torch.zeros(8, 8)}, {"k_proj": per_row}, [], Layout(BITNET))
    groups = PackedWeight(torch.zeros(8, 48, dtype=torch.int8), torch.ones(8, 1), 4)
    with pytest.raises(ValueError, match="scales are shared by 48 inputs: the metal layout has groups of 128, 64, 32"):
        write_packed(tmp_path, {"k_proj.weight": torch.zeros(8, 48)}, {"k_proj": groups}, [], Layout(METAL))
    for codes, scale in ((torch.zeros(8, 40), (8, 3)), (torch.zeros(8, 40), (3, 1)), (torch.zeros(8), (8, 1))):
        with pytest.raises(ValueError, match="equal blocks"):
            PackedWeight(codes.to(torch.int8), torch.ones(scale), 4)
    with pytest.raises(ValueError, match="expected int8"):
        PackedWeight(torch.zeros(8, 8), torch.ones(8, 1), 8)
