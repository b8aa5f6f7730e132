"""What a `[[transforms]]` table may say, and how mistakes are reported."""

from __future__ import annotations

import re

import pytest
from support import ROOT

from train.config_sources import ConfigError, load_config, to_toml

QUANTISE = '[[transforms]]\nkind = "quantise"\n'
OPTICAL = '[[transforms]]\nkind = "optical"\n'
BITFLIP = '[[transforms]]\nkind = "bitflip"\n'


def problems(tmp_path, text: str) -> str:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config([str(file)])
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[transforms]]\nkind = "bitflop"\n', "no kind of transform; choose from bitflip, quantise, optical, lora; did"),
        ("[[transforms]]\nweight = { mantissa = 0.1 }\n", "expected a kind, one of bitflip, quantise, optical, lora"),
        (BITFLIP, "give the faults of at least one of weight, input and output"),
        (BITFLIP + "weight = { mantisa = 0.1 }\n", r"transforms.0.weight.mantisa = 0.1.*did you mean mantissa?"),
        (BITFLIP + "weigth = { mantissa = 0.1 }\n", r"transforms.0.weigth.*did you mean weight?"),
        (BITFLIP + "weight = { mantissa = 1.5 }\n", r"transforms.0.weight.mantissa = 1.5.*expected a value at most 1.0"),
        (BITFLIP + "weight = { mantissa = -1e-9 }\n", "expected a value at least 0.0"),
        (BITFLIP + "weight = { mantissa = nan }\n", r"transforms.0.weight.mantissa = nan"),
        (BITFLIP + "weight = { mantissa = true }\n", "expected a number"),
        (BITFLIP + "input = { mantissa = 0.1, zero_above = 0.0 }\n", "expected a value greater than 0"),
        (BITFLIP + "input = { bits = [0.1, 0.2] }\n", "input.bits has 2 entries, bfloat16 has 16"),
        (BITFLIP + f"input = {{ bits = {[0.1] * 16}, mantissa = 0.1 }}\n", "give bits, or sign_exponent and mantissa"),
        (BITFLIP + 'storage = "int9"\nweight = { mantissa = 0.1 }\n', "expected one of 'bfloat16', 'float16', 'float32'"),
        (BITFLIP + f'storage = "int8"\nweight = {{ bits = {[0.1] * 16} }}\n', "weight.bits has 16 entries, int8 has 8"),
        (QUANTISE, "give the format of at least one of weight, input and attention"),
        (QUANTISE + 'weight = { format = "int9" }\n', "'int9' is no format: int2 to int8, ternary"),
        (QUANTISE + 'weight = { format = "mxfp4", scale = "row" }\n', "mxfp4 has a scale for each block of 32: leave scale out"),
        (QUANTISE + 'weight = { format = "ternary", scale = "row" }\n', "ternary has one scale"),
        (QUANTISE + 'input = { format = "int8", scale = "tensor" }\n', "would let tokens see later ones"),
        (QUANTISE + 'attention = { format = "mxfp8_e4m3" }\n', "with a format without scales of blocks"),
        (QUANTISE + 'weight = { format = "int8", group_sise = 32 }\n', "did you mean group_size?"),
        (QUANTISE + 'weight = { format = "int4", group_size = 64 }\n', 'group_size needs scale = "group"'),
        (QUANTISE + 'attention = { format = "int8" }\nnorm = true\n', "give the format of weight or input"),
        (BITFLIP + 'scale = "tensor"\nweight = { mantissa = 0.1 }\n', "bfloat16 stores values without a scale"),
        (OPTICAL + 'modules = ["*.mlp.*"]\n' + OPTICAL + 'modules = ["*.up_proj"]\n',
         "transforms.1.modules.*transforms.0 has the product of model.layers.0.mlp.up_proj already"),
        (OPTICAL + 'modules = ["*.self_attn"]\n' + QUANTISE + 'attention = { format = "int8" }\n', "matches no linear layer"),
        (OPTICAL + QUANTISE + 'attention = { format = "int8" }\n',
         "transforms.1.modules.*transforms.0 has the product of model.layers.0.self_attn already"),
        (OPTICAL + "levels = 2\n", "expected a value at least 3"),
        (OPTICAL + "photons = 0.0\n", "expected a value greater than 0"),
        (OPTICAL + "level = 16\n", "did you mean levels?"),
        (BITFLIP + 'fault = "stuck_at"\nweight = { mantissa = 0.1 }\n', 'needs lifetime = "persistent"'),
        (BITFLIP + 'modules = ["re:("]\nweight = { mantissa = 0.1 }\n', "no regular expression"),
        (BITFLIP + 'modules = ["*.q_prj"]\nweight = { mantissa = 0.1 }\n', r"matches no layer; the nearest layer is '.*q_proj'"),
        (BITFLIP + 'modules = ["model.norm"]\nweight = { mantissa = 0.1 }\n', "matches no linear layer, only RMSNorm"),
        (BITFLIP + 'modules = ["*embed*"]\nweight = { mantissa = 0.1 }\n', "matches no linear layer, only Embedding"),
        ('include = ["missing.toml"]\n', r"missing.toml.*cannot read this file \(included by .*bad.toml\)"),
        ('include = ["bad.toml"]\n', "includes itself"),
        ('include = "x"\n', "expected an array of file names"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, text, message):
    report = problems(tmp_path, text)
    pattern = message if re.search(r"\.\*|\\", message) else re.escape(message)
    assert re.search(pattern, report, re.DOTALL), report


def test_all_mistakes_of_all_tables_at_once(tmp_path):
    report = problems(
        tmp_path,
        '[[transforms]]\nkind = "bitflop"\n'
        + BITFLIP + "weight = { mantissa = 2.0 }\n"
        + BITFLIP + 'modules = ["nothing"]\nweight = { mantissa = 0.1 }\n'
        + "[training]\nsteps = 0\n",
    )  # fmt: skip
    assert "4 problems" in report
    for key in ("transforms.0", "transforms.1.weight.mantissa", "transforms.2.modules", "training.steps"):
        assert key in report


def test_group_size_must_hold_whole_micro_batches():
    effect = ["--transforms", '[{kind = "bitflip", weight = {mantissa = 0.1}}]']
    flags = [*effect, "--training.global_batch_size", "16", "--training.micro_batch_size", "4", "--noise.group_size"]
    assert load_config([], [*flags, "8"], world_size=2).noise.group_size == 8
    with pytest.raises(ConfigError, match="a micro-batch of 4 rows would span several groups"):
        load_config([], [*flags, "6"], world_size=2)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("**/*.toml")), ids=lambda file: file.stem)
def test_every_configuration_loads_and_survives_a_round_trip(file, tmp_path):
    config = load_config([str(file)])
    assert bool(config.transforms) == (
        "transforms" in str(file.parent) or file.stem.endswith(("_bitflip", "_bitnet", "_optical"))
    )
    resolved = tmp_path / "config.toml"
    resolved.write_text(to_toml(config))
    assert load_config([str(resolved)]) == config


def test_tables_append_and_an_empty_array_clears(tmp_path):
    preset = str(ROOT / "configs" / "transforms" / "bitflip_mantissa.toml")
    assert len(load_config([preset, preset]).transforms) == 2
    assert not load_config([preset], ["--transforms", "[]"]).transforms


def test_published_preset_is_two_to_the_minus_16_on_all_bits():
    (spec,) = load_config([str(ROOT / "configs" / "clm_60m_bitflip.toml")]).transforms
    assert spec.storage == "bfloat16"
    assert spec.lifetime == "transient"
    assert (spec.weight.sign_exponent, spec.weight.mantissa, spec.weight.zero_above) == (2**-16, 2**-16, 1.25)
    assert (spec.input.sign_exponent, spec.input.mantissa, spec.input.zero_above) == (2**-16, 2**-16, 30.0)


def test_a_file_that_two_files_include_counts_once(tmp_path):
    (tmp_path / "effect.toml").write_text(BITFLIP + "weight = { mantissa = 0.1 }\n")
    for name in ("one", "two"):
        (tmp_path / f"{name}.toml").write_text('include = ["effect.toml"]\n')
    (tmp_path / "both.toml").write_text('include = ["one.toml", "two.toml"]\n')
    assert len(load_config([str(tmp_path / "both.toml")]).transforms) == 1
