"""Settings without effect are refused, and every key says when it acts."""

from __future__ import annotations

import pytest
import tomli

from train.config import Config, SourceConfig
from train.config_effect import ACTS, ALWAYS, SOURCE_ACTS, TRANSFORM_ACTS, TRANSFORM_ALWAYS
from train.config_sources import ConfigError, load_config, read_sources, schema_keys, to_toml
from transforms.specs import BitflipSpec, CellFaults, LoraSpec, OpticalSpec, Quantised, QuantiseSpec

PIPELINE = ["--parallel.pipeline", "2", "--model.shape.num_layers", "8"]
FILES = ["--data.source", "files", "--data.paths", "*"]
HUB = ["--data.source", "hub"]
EFFECTS = ["--transforms", '[{kind = "bitflip", weight = {mantissa = 0.1}}]']
INT8 = ["--transforms", '[{kind = "quantise", weight = {format = "int8"}}]']
WSD, TWO_STAGE = ["--schedule.name", "wsd"], ["--schedule.name", "two_stage"]
FLOAT8 = ["--float8.recipe", "rowwise"]
TEACHER = ["--distillation.teacher", "outputs/teacher"]
MIXTURE = ["--data.sources", '[{source = "embedded"}, {source = "files", paths = "a.txt"}]']
CONDITIONAL = {
    "model.size": ("60M", []),
    "model.shape.dim": (64, []),
    "model.shape.num_layers": (2, []),
    "model.shape.num_heads": (2, []),
    "model.shape.num_kv_heads": (1, []),
    "model.shape.head_dim": (16, []),
    "model.shape.ffn_dim": (64, []),
    "model.shape.vocab_size": (5000, []),
    "model.shape.rope_theta": (5e5, []),
    "model.shape.rope_scaling": ("{factor = 4.0}", []),
    "model.shape.max_context": (4096, []),
    "model.shape.tied_embeddings": ("true", []),
    "tokenizer.path": ("folder", ["--tokenizer.kind", "hf"]),
    "tokenizer.vocab_size": (4096, []),
    "data.paths": ("a.txt", ["--data.source", "files"]),
    "data.validation_paths": ("b.txt", FILES),
    "data.column": ("body", FILES),
    "data.errors": ("replace", FILES),
    "data.skip_invalid": ("true", HUB),
    "data.dataset": ("other/one", HUB),
    "data.subset": ("other", HUB),
    "data.split": ("test", HUB),
    "data.revision": ("abc", HUB),
    "data.max_documents": (5, []),
    "data.validation_fraction": (0.1, []),
    "data.weight": (2.0, MIXTURE),
    "data.shuffle_window": (7, ["--data.streaming", "true", "--tokenizer.kind", "bytes", *HUB]),
    "optimizer.momentum": (0.9, ["--optimizer.name", "muon"]),
    "optimizer.nesterov": ("false", ["--optimizer.name", "muon"]),
    "schedule.decay_fraction": (0.3, WSD),
    "schedule.stage_fraction": (0.3, TWO_STAGE),
    "schedule.first_stage_end": (0.3, TWO_STAGE),
    "schedule.second_stage_start": (0.3, TWO_STAGE),
    "schedule.min_lr_ratio": (0.4, [*TWO_STAGE, "--schedule.second_stage_start", "0.5"]),
    "parallel.async_tensor": ("true", ["--parallel.tensor", "2"]),
    "parallel.pipeline_schedule": ("gpipe", PIPELINE),
    "parallel.pipeline_stages": (4, [*PIPELINE, "--parallel.pipeline_schedule", "interleaved_1f1b"]),
    "float8.min_size": (64, FLOAT8),
    "float8.skip": ("*.k_proj", FLOAT8),
    "compile.cuda_graphs": ("true", []),
    "compile.backend": ("aot_eager", []),
    "activation_checkpointing.budget": (0.1, ["--activation_checkpointing.mode", "budget"]),
    "checkpoint.mode": ("sync", []),
    "checkpoint.keep": (7, []),
    "checkpoint.permanent_interval": (1000, []),
    "checkpoint.max_unsaved_steps": (700, []),
    "faults.max_skipped": (3, ["--faults.non_finite", "skip"]),
    "validation.interval": (7, []),
    "validation.steps": (7, []),
    "validation.transforms": ("both", EFFECTS),
    "robust.clip_per": ("tensor", ["--robust.clip_weights", "3"]),
    "distillation.weight": (0.7, TEACHER),
    "distillation.temperature": (3.0, TEACHER),
    "metrics.wandb_project": ("mine", ["--metrics.wandb", "true"]),
    "profiling.trace_steps": (2, ["--profiling.trace_step", "5"]),
    "profiling.ranks": ("all", ["--profiling.memory_step", "5"]),
    "noise.seed": (7, EFFECTS),
    "noise.group_size": (8, EFFECTS),
    "noise.warmup_steps": (7, EFFECTS),
}
"""A value that is not the default, and flags with which it acts."""
AGAINST = {
    **{key: ["--model.init_from", "hf:folder"] for key in CONDITIONAL if key.startswith(("model.size", "model.shape"))},
    "tokenizer.vocab_size": ["--tokenizer.kind", "bytes"],
    "data.max_documents": ["--data.source", "random"],
    "data.validation_fraction": [*FILES, "--data.validation_paths", "b.txt"],
    "data.column": ["--data.source", "files", "--data.paths", '["a.txt", "b.md.gz"]'],
    "schedule.min_lr_ratio": TWO_STAGE,
    "noise.seed": INT8,
    "noise.group_size": [*EFFECTS[:1], EFFECTS[1].replace("weight", "input")],
    "compile.cuda_graphs": ["--compile.backend", "aot_eager"],
    "compile.backend": ["--compile.enabled", "false"],
    "checkpoint.mode": ["--checkpoint.interval", "0"],
    "checkpoint.keep": ["--checkpoint.interval", "0"],
    "checkpoint.permanent_interval": ["--checkpoint.interval", "0"],
    "checkpoint.max_unsaved_steps": ["--checkpoint.interval", "0"],
    "validation.interval": ["--data.source", "random"],
    "validation.steps": ["--validation.interval", "0"],
}
"""Flags with which it does not act; elsewhere the defaults are enough."""


def problems(flags: list[str], files: list[str] | None = None) -> dict[str, str]:
    """Refused keys with their messages."""
    try:
        load_config(files or [], flags)
    except ConfigError as error:
        return {problem.key: str(problem) for problem in error.problems}
    return {}


def test_every_key_says_when_it_acts():
    """Who adds a key has to say it in train/config_effect.py."""
    of_sources = {f"data.{key}" for key in SourceConfig.model_fields}
    assert {key for key, _ in schema_keys()} == set(ACTS) | of_sources
    assert set(SOURCE_ACTS) == set(SourceConfig.model_fields)
    for spec in (BitflipSpec, QuantiseSpec, OpticalSpec, LoraSpec):
        kind = spec.model_fields["kind"].annotation.__args__[0]
        said = [*TRANSFORM_ALWAYS[kind], *TRANSFORM_ACTS.get(kind, {}), "kind", "modules"]
        assert sorted(said) == sorted(spec.model_fields), kind
    assert set(TRANSFORM_ALWAYS["faults of an operand"]) == set(CellFaults.model_fields)
    assert set(TRANSFORM_ALWAYS["format of an operand"]) == set(Quantised.model_fields)


def test_every_condition_is_tried_below():
    conditional = {key for key, when in ACTS.items() if when != ALWAYS}
    assert set(CONDITIONAL) == conditional | {f"data.{key}" for key in SOURCE_ACTS} - {"data.source"}


@pytest.mark.parametrize("key", CONDITIONAL)
def test_a_setting_acts_or_is_refused(key):
    value, with_it = CONDITIONAL[key]
    flag = [f"--{key}", str(value)]
    assert key not in problems([*flag, *with_it])
    refused = problems([*flag, *AGAINST.get(key, [])])
    assert f"flag --{key}: {key} = " in refused[key]
    assert "has no effect" in refused[key]


@pytest.mark.parametrize(
    ("effect", "draws", "for_weights"),
    [
        ('{kind = "quantise", weight = {format = "int8"}, input = {format = "int8"}}', False, False),
        ('{kind = "quantise", weight = {format = "int8", rounding = "stochastic"}}', True, True),
        ('{kind = "quantise", input = {format = "int8", rounding = "stochastic"}}', True, False),
        ('{kind = "optical", rounding = "nearest"}', False, False),
        ('{kind = "optical", rounding = "nearest", photons = 9}', True, False),
        ('{kind = "optical"}', True, False),
        ('{kind = "bitflip", weight = {mantissa = 0.1}, lifetime = "persistent"}', True, False),
    ],
)
def test_seed_and_groups_act_on_effects_that_draw(effect, draws, for_weights):
    refused = problems(["--transforms", f"[{effect}]", "--noise.seed", "5", "--noise.group_size", "8"])
    assert ("noise.seed" not in refused, "noise.group_size" not in refused) == (draws, for_weights)


def test_the_end_of_a_rate_that_never_falls_is_refused():
    refused = problems([*WSD, "--schedule.decay_fraction", "0", "--schedule.min_lr_ratio", "0.5"])
    assert "schedule.min_lr_ratio" in refused


def test_permanent_checkpoints_that_would_not_be_saved_are_refused():
    refused = problems(["--checkpoint.interval", "300", "--checkpoint.permanent_interval", "1000"])
    assert "expected a multiple of it, such as 900" in refused["checkpoint.permanent_interval"]
    assert not problems(["--checkpoint.interval", "300", "--checkpoint.permanent_interval", "900"])


@pytest.mark.parametrize("pattern", ["*.k_porj", "model.layers.3.self_attn.k_proj", "lm_head"])
def test_layers_of_float8_that_are_not_there_are_refused(pattern):
    with pytest.raises(ConfigError) as caught:
        load_config([], [*FLOAT8, "--float8.skip", f'["*.q_proj", "{pattern}"]'], world_size=1)
    assert f"'{pattern}' names no layer" in str(caught.value)
    assert "q_proj' names" not in str(caught.value)


def test_all_of_them_come_at_once_and_with_other_problems():
    found = problems(["--noise.seed", "3", "--schedule.decay_fraction", "0.3", "--training.steps", "0"])
    assert set(found) == {"noise.seed", "schedule.decay_fraction", "training.steps"}


def test_a_wrong_choice_is_one_problem(tmp_path):
    assert set(problems(["--schedule.name", "wds", "--schedule.decay_fraction", "0.3"])) == {"schedule.name"}


def test_a_value_that_is_the_default_or_asks_for_nothing_is_no_problem():
    load_config([], ["--parallel.pipeline_stages", "2", "--data.source", "random", "--validation.interval", "0"])


@pytest.mark.parametrize("key", CONDITIONAL)
def test_a_complete_configuration_loads_as_it_is(key, tmp_path):
    """A run folder keeps every key, whether it acts or not."""
    value, with_it = CONDITIONAL[key]
    assert not problems([f"--{key}", str(value), *with_it])
    config = load_config([], [f"--{key}", str(value), *with_it])
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config([str(tmp_path / "config.toml")]) == config
    assert Config.model_validate(tomli.loads(to_toml(config))) == config


def test_a_later_source_that_chooses_otherwise_takes_back_what_was_set_for_the_choice(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[schedule]\nname = "wsd"\ndecay_fraction = 0.4\n[validation]\nsteps = 5\n[data]\nsource = "hub"\n')
    config = load_config([str(file)], ["--schedule.name", "cosine", "--validation.interval", "0", *FILES])
    assert config == load_config([], ["--schedule.name", "cosine", "--validation.interval", "0", *FILES])
    again = ["--schedule.name", "cosine", "--schedule.decay_fraction", "0.4"]
    assert set(problems(again, [str(file)])) == {"schedule.decay_fraction"}
    both = tmp_path / "b.toml"
    both.write_text('[schedule]\nname = "cosine"\ndecay_fraction = 0.4\n')
    assert str(both) in problems([], [str(both)])["schedule.decay_fraction"]


def test_weights_to_begin_from_take_back_the_shape_of_an_earlier_file(tmp_path):
    """`--config clm_60m.toml --model.init_from hf:FOLDER`, and an adapting file that includes the first training's."""
    first, both = tmp_path / "first.toml", tmp_path / "both.toml"
    text = '[model]\nsize = "60M"\nshape = { num_layers = 2, rope_scaling = { factor = 4.0 } }\n'
    first.write_text(text)
    flags = ["--model.init_from", "hf:folder"]
    assert load_config([str(first)], flags) == load_config([], flags)
    both.write_text(f'{text}init_from = "hf:folder"\n')
    assert set(problems([], [str(both)])) == {"model.size", "model.shape.num_layers", "model.shape.rope_scaling"}
    again = ["--model.shape.rope_scaling.factor", "4.0"]
    assert set(problems([*flags, *again], [str(first)])) == {"model.shape.rope_scaling"}


# Sources


def sources(toml: str, tmp_path) -> list[SourceConfig]:
    file = tmp_path / "a.toml"
    file.write_text(toml)
    return load_config([str(file)]).data.all_sources


def test_a_source_takes_from_data_what_it_does_not_say(tmp_path):
    text = """
        [data]
        source = "files"
        column = "body"
        validation_fraction = 0.25
        [[data.sources]]
        paths = "a.jsonl"
        [[data.sources]]
        paths = ["b.jsonl"]
        column = "content"
        validation_fraction = 0.0
        weight = 3.0
        [[data.sources]]
        source = "embedded"
    """
    first, second, third = sources(text, tmp_path)
    assert (first.source, first.paths, first.column, first.validation_fraction) == ("files", ["a.jsonl"], "body", 0.25)
    assert (second.column, second.validation_fraction, second.weight) == ("content", 0.0, 3.0)
    assert (third.source, third.validation_fraction) == ("embedded", 0.25)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[data]\ncolumn = "body"\n[[data.sources]]\n[[data.sources]]\n', "data.column"),
        ('[data]\ncolumn = "b"\n[[data.sources]]\nsource = "hub"\ncolumn = "c"\n', "data.column"),
        ('[[data.sources]]\n[[data.sources]]\nsource = "hub"\npaths = ["a"]\n', "data.sources.1.paths"),
        ('[[data.sources]]\nweight = 2.0\n', "data.sources.0.weight"),
        ('[data]\nsource = "hub"\n[[data.sources]]\nsource = "embedded"\n', "data.source"),
    ],
)  # fmt: skip
def test_what_no_source_can_use_is_refused(text, key, tmp_path):
    file = tmp_path / "a.toml"
    file.write_text(text)
    assert set(problems([], [str(file)])) == {key}


# Transforms


def test_one_table_may_stand_alone_and_flags_reach_into_it(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[transforms]\nkind = "optical"\nphotons = 5.0\n[data.sources]\nsource = "embedded"\n')
    flags = [
        "--transforms.0.photons",
        "10",
        "--transforms.0.modules",
        "*.q_proj",
        "--data.sources.0.max_documents",
        "3",
    ]
    config = load_config([str(file)], flags)
    [spec], [source] = config.transforms, config.data.all_sources
    assert (spec.photons, spec.modules, source.max_documents) == (10, ["*.q_proj"], 3)
    twice = read_sources([str(file), str(file)], [])
    assert [one["kind"] for one in twice.values["transforms"]] == ["optical", "optical"]
    made = ["--transforms.0.kind", "bitflip", "--transforms.0.weight.mantissa", "1e-3"]
    assert load_config([], made).transforms[0].weight.mantissa == 1e-3


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--transforms.photons", "transforms is an array of tables: name one by its number, transforms.0.photons"),
        ("--transforms.2.photons", "transforms has one table, number 0: expected a number there"),
        ("--transforms.0.photns", "unknown key; did you mean photons?"),
    ],
)
def test_a_flag_that_reaches_into_nothing_says_how(flag, message, tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[transforms]\nkind = "optical"\n')
    [found] = problems([flag, "10"], [str(file)]).values()
    assert message in found
    assert f"flag {flag}" in found


@pytest.mark.parametrize("flag", ["notes.md", '["notes.md"]', "2024.md"])
def test_one_path_needs_no_array(flag):
    assert load_config([], ["--data.source", "files", "--data.paths", flag]).data.paths == [flag.strip('[]"')]


def test_several_values_without_an_array_say_how():
    flags = ["--data.source", "files", "--data.paths", "a.md", "b.md"]
    assert "several values are one array" in "".join(problems(flags).values())


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ('{kind = "quantise", weight = {format = "int4"}, range_decay = 0.5}', "transforms.0.range_decay"),
        ('{kind = "optical", input_levels = 8, weight_levels = 8, output_levels = 8, levels = 9}', "transforms.0.levels"),
    ],
)  # fmt: skip
def test_what_a_transform_would_ignore_is_refused(table, key):
    assert set(problems(["--transforms", f"[{table}]"])) == {key}
