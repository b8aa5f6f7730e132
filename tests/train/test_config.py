"""Configuration: layering, every class of error with its message, the resolved file and the help text."""

from __future__ import annotations

from typing import get_args

import pytest
import tomli
from support import run_python

from parallel.degrees import resolve_degrees
from train.config import Config
from train.config_help import SECTIONS, asked_for_help, help_page
from train.config_sources import ConfigError, load_config, schema_keys, split_arguments, to_toml
from transforms.specs import BitflipSpec, CellFaults, LoraSpec, OpticalSpec, Quantised, QuantiseSpec


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def toml(tmp_path):
    """Writes a configuration file and gives its path."""

    def write(text: str, name: str = "run.toml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def problems(files=(), flags=(), world_size: int | None = None) -> list[str]:
    """One line for every reported problem: where, what and why."""
    with pytest.raises(ConfigError) as error:
        load_config(files, flags, world_size)
    report = str(error.value)
    count = len(error.value.problems)
    assert report.startswith("1 problem in" if count == 1 else f"{count} problems in")
    lines = [" ".join(str(problem).split()) for problem in error.value.problems]
    assert all(line in " ".join(report.split()) for line in lines)
    return lines


def only_problem(*arguments, **named) -> str:
    found = problems(*arguments, **named)
    assert len(found) == 1, found
    return found[0]


# Layers


def test_defaults_are_valid():
    config = load_config([])
    assert config == Config()
    assert config.model.name == "clm"
    assert config.tokens_per_step == 8 * 256


def test_later_files_win_and_flags_win_over_files(toml):
    first = toml("[run]\nseed = 1\nname = 'first'\n[optimizer]\nlr = 0.1\nbeta2 = 0.9", "first.toml")
    second = toml("[run]\nseed = 2\n[optimizer]\nlr = 0.2", "second.toml")
    config = load_config([first, second], ["--optimizer.lr", "0.3"])
    assert (config.run.seed, config.run.name, config.optimizer.lr, config.optimizer.beta2) == (2, "first", 0.3, 0.9)
    assert load_config([second, first]).run.seed == 1
    assert load_config([], ["--run.seed", "5", "--run.seed", "6"]).run.seed == 6


@pytest.mark.parametrize("flags", [["--training.steps", "300"], ["--training.steps=300"], ["--training.steps=3e2"]])
def test_flags_are_written_with_a_space_or_an_equals_sign(flags):
    assert load_config([], flags).training.steps == 300


def test_a_bare_flag_means_true():
    config = load_config([], ["--metrics.wandb", "--compile.enabled", "false", "--metrics.tensorboard"])
    assert (config.metrics.wandb, config.compile.enabled, config.metrics.tensorboard) == (True, False, True)


def test_a_bare_flag_of_another_type_is_refused():
    """`--run.name --run.seed 3` lacks a name; "true" would be a folder nobody asked for."""
    assert "run.name" in only_problem(flags=["--run.name", "--run.seed", "3"])
    assert "training.steps" in only_problem(flags=["--training.steps"])


def test_negative_numbers_are_values_not_flags():
    assert load_config([], ["--parallel.shard", "-1", "--parallel.replicate", "1"]).parallel.shard == -1


def test_strings_that_look_like_other_types_stay_strings():
    values = {
        "run.name": "2024",
        "run.dir": "true",
        "data.source": "hub",
        "data.dataset": "1e3",
        "data.column": "[a]",
        "data.revision": "0012",
    }
    config = load_config([], [argument for key, value in values.items() for argument in (f"--{key}", value)])
    assert config.run.name == "2024"
    assert config.run.dir == "true"
    assert (config.data.dataset, config.data.column, config.data.revision) == ("1e3", "[a]", "0012")


def test_resume_takes_a_word_a_step_or_a_path():
    for text, value in [("auto", "auto"), ("none", "none"), ("120", 120), ("outputs/run-1", "outputs/run-1")]:
        assert load_config([], ["--checkpoint.resume", text]).checkpoint.resume == value


def test_a_path_to_resume_from_may_look_like_a_date():
    assert load_config([], ["--checkpoint.resume", "2024-01-31"]).checkpoint.resume == "2024-01-31"


def test_counts_may_be_written_with_an_exponent(toml):
    config = load_config([toml("[training]\ntokens = 1e9\n[tokenizer]\nvocab_size = 4.096e3")])
    assert (config.training.tokens, config.tokenizer.vocab_size) == (1_000_000_000, 4096)
    assert type(config.training.tokens) is int
    assert "expected a whole number" in only_problem([toml("[training]\ntokens = 1.5")])


def test_arrays_of_tables_append_and_an_empty_array_clears(toml):
    one = toml("[[data.sources]]\nsource = 'embedded'\n", "one.toml")
    two = toml("[[data.sources]]\nsource = 'files'\npaths = ['a.txt']\nweight = 2.0", "two.toml")
    clear = toml("[data]\nsources = []", "clear.toml")
    assert [source.source for source in load_config([one, two]).data.sources] == ["embedded", "files"]
    assert load_config([one, clear]).data.sources == []
    assert load_config([one], ["--data.sources", "[]"]).data.sources == []
    assert [source.weight for source in load_config([one, clear, two, two]).data.sources] == [2.0, 2.0]


def test_a_single_source_is_the_data_section_itself(toml):
    config = load_config([toml("[data]\nsource = 'files'\npaths = ['a.jsonl', 'b.jsonl']\ncolumn = 'body'")])
    [source] = config.data.all_sources
    assert (source.source, source.paths, source.column) == ("files", ["a.jsonl", "b.jsonl"], "body")


# Length


def test_two_ways_to_say_the_length_in_one_source_are_refused(toml):
    path = toml("[training]\nsteps = 200\ntokens = 1000")
    report = only_problem([path])
    assert path in report
    assert "training.steps and training.tokens say the same thing: give one" in report
    flags = ["--training.tokens_per_parameter", "20", "--training.steps", "200"]
    assert "training.steps and training.tokens_per_parameter" in only_problem(flags=flags)


def test_a_later_source_replaces_the_way_to_say_the_length(toml):
    file = toml("[training]\ntokens_per_parameter = 20")
    training = load_config([file], ["--training.steps", "200"]).training
    assert (training.steps, training.tokens, training.tokens_per_parameter) == (200, None, None)
    training = load_config([toml("[training]\nsteps = 200"), toml("[training]\ntokens = 1e6", "b.toml")]).training
    assert (training.steps, training.tokens) == (None, 1_000_000)


def test_a_warm_up_longer_than_the_run_is_refused():
    report = only_problem(flags=["--training.steps", "50", "--schedule.warmup_steps", "51"])
    assert report == "flag --schedule.warmup_steps: schedule.warmup_steps = 51 longer than the run of 50 steps"
    load_config([], ["--training.steps", "50", "--schedule.warmup_steps", "50"])


def test_rows_longer_than_the_context_are_refused():
    flags = ["--model.name", "llama3", "--training.sequence_length", "131073"]
    assert "training.sequence_length = 131073 longer than the model's context of 131072" in only_problem(flags=flags)


# Errors of one key


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("[training]\nstesp = 1", "training.stesp = 1", "training.steps"),
        ("[optimizer]\nlearning = 1\nweight_decy = 0.1", "optimizer.weight_decy = 0.1", "optimizer.weight_decay"),
        ("[model.shape]\nnum_head = 4", "model.shape.num_head = 4", "model.shape.num_heads"),
        ("seed = 3", "seed = 3", "run.seed"),
        ("[[data.sources]]\nwieght = 2.0", "data.sources.0.wieght = 2.0", None),
    ],
)
def test_an_unknown_key_in_a_file_is_named_with_the_nearest_one(toml, text, key, nearest):
    path = toml(text)
    [report] = [line for line in problems([path]) if key in line]
    assert report.startswith(f"{path}: {key} unknown key")
    if nearest:
        assert report.endswith(f"; did you mean {nearest}?")


def test_an_unknown_flag_is_named_with_the_nearest_one():
    found = problems(flags=["--traning.steps", "10", "--model.shape.ffn=4", "--nothing.like.it", "1"])
    assert any(line.startswith("flag --traning.steps: ") and "did you mean training" in line for line in found)
    assert "flag --model.shape.ffn: model.shape.ffn = 4 unknown key; did you mean model.shape.ffn_dim?" in found
    assert len(found) == 3


@pytest.mark.parametrize("text", ["[trainning]\nsteps = 200", "[model.shpae]\ndim = 64", "[trainning]"])
def test_an_unknown_table_is_named_with_its_file(toml, text):
    path = toml(text)
    assert path in only_problem([path])


def test_an_unknown_key_without_a_near_one_lists_what_is_allowed():
    report = only_problem(flags=["--compile.zzzzzz", "1"])
    assert "allowed are compile.enabled, compile.cuda_graphs, compile.backend" in report


def test_a_bad_argument_is_named():
    assert "argument steps=3 expected a flag like --training.steps 100" in only_problem(flags=["steps=3"])


@pytest.mark.parametrize(
    ("text", "report"),
    [
        ("[training]\nsteps = 'many'", 'training.steps = "many" expected a whole number'),
        ("[training]\nsteps = true", "training.steps = true expected a whole number"),
        ("[training]\nsteps = 0", "training.steps = 0 expected a value greater than 0"),
        ("[run]\nseed = -1", "run.seed = -1 expected a value at least 0"),
        ("[run]\nname = 7", "run.name = 7 expected a string"),
        ("[run]\nname = '../up'", 'run.name = "../up" expected letters, digits'),
        ("[compile]\nenabled = 1", "compile.enabled = 1 expected true or false"),
        ("[compile]\nenabled = 'yes'", 'compile.enabled = "yes" expected true or false'),
        ("[optimizer]\nlr = '1e-3'", 'optimizer.lr = "1e-3" expected a number'),
        ("[optimizer]\nlr = inf", "optimizer.lr = inf expected a finite number"),
        ("[optimizer]\nlr = nan", "optimizer.lr = nan expected a finite number"),
        ("[optimizer]\nbeta1 = 1.0", "optimizer.beta1 = 1.0 expected a value less than 1"),
        ("[data]\nvalidation_fraction = 1.5", "data.validation_fraction = 1.5 expected a value at most 1"),
        ("[data]\nsource = 'files'\npaths = 5", "data.paths = 5 expected an array"),
        ("[data]\nsources = [5]", "data.sources.0 = 5 expected a table"),
        ("[data]\nsource = 'hubb'", "expected one of 'embedded', 'files', 'hub' or 'random'; did you mean 'hub'?"),
        ("[schedule]\nname = 'step'", "schedule.name = \"step\" expected one of 'cosine', 'linear', 'wsd' or 'two_stage'"),
        ("[model]\nsize = '61M'", 'model.size = "61M" not a size of clm; choose from debug, 60M, 200M'),
        ("[model]\nname = 'llama3'\nsize = '60M'", 'model.size = "60M" not a size of llama3; choose from 1B, 3B, 8B'),
        ("[model]\ninit_from = 'folder'", 'model.init_from = "folder" expected "hf:FOLDER"'),
        ("[tokenizer]\nvocab_size = 100", "tokenizer.vocab_size = 100 expected a value at least 257"),
        ("[tokenizer]\nkind = 'hf'", 'tokenizer.kind = "hf" needs a folder or Hub id here'),
        ("[tokenizer]\nkind = 'tiktoken'", "needs Llama-3's tokenizer.model file here"),
        ("[data]\nsource = 'files'", 'source = "files" needs globs here'),
        ("[checkpoint]\nresume = -3", 'checkpoint.resume = -3 expected "auto", "none", a step of 0 or more, or a path'),
        ("training = 5", "training = 5 expected a table with keys below it"),
        ("transforms = 5", "transforms = 5 expected an array"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(toml, text, report):
    path = toml(text)
    found = only_problem([path])
    assert report in found
    if "needs" not in report:  # what is missing stands in no file
        assert found.startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["[data]\npaths = [1]", "[data]\npaths = ['a.txt', 2]", "transforms = [5]"])
def test_a_wrong_item_of_an_array_is_named(toml, text):
    path = toml(text)
    assert path in only_problem([path])


@pytest.mark.parametrize("value", ["1.5", "true", "[1]"])
def test_a_wrong_value_of_a_key_with_two_types_is_one_problem(toml, value):
    report = only_problem([toml(f"[checkpoint]\nresume = {value}")])
    assert "checkpoint.resume = " in report


def test_a_shape_that_does_not_fit_is_named_with_its_file(toml):
    path = toml("[model.shape]\nnum_heads = 3")
    report = only_problem([path])
    assert "num_heads 3 must be a multiple of num_kv_heads 2" in report
    assert path in report


def test_a_shape_beside_imported_weights_is_refused():
    found = problems(flags=["--model.init_from", "hf:folder", "--model.size", "60M", "--model.shape.dim", "64"])
    assert len(found) == 2
    assert "model.size" in found[0]
    assert "model.shape" in found[1]


def test_a_value_where_a_table_is_meant_is_named():
    report = only_problem(flags=["--training.steps", "200", "--training.steps.more", "3"])
    assert "--training.steps.more" in report


# Errors of files


def test_unreadable_files_are_named(toml, tmp_path):
    missing = str(tmp_path / "missing.toml")
    assert only_problem([missing]) == f"{missing} cannot read this file: No such file or directory"
    assert only_problem([str(tmp_path)]).startswith(str(tmp_path))
    broken = toml("[run\nseed = 1")
    assert only_problem([broken]).startswith(f"{broken} not a TOML file: Expected ']'")
    twice = toml("[run]\nseed = 1\nseed = 2")
    assert "not a TOML file" in only_problem([twice])
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    assert "not a TOML file" in only_problem([str(binary)])


def test_a_config_option_without_a_file_is_named():
    done = run_python("train/main.py", "--run.seed", "1", "--config", check=False)
    assert done.returncode == 2
    assert "--config" in done.stderr


def test_all_problems_of_all_sources_come_in_one_report(toml, tmp_path):
    first = toml("[training]\nstesp = 1\n[optimizer]\nlr = -1.0", "first.toml")
    second = toml("[model]\nsize = '61M'", "second.toml")
    missing = str(tmp_path / "missing.toml")
    found = problems([first, missing, second], ["--run.nmae", "x", "--schedule.name", "step"], 4)
    expected = {
        f"{first}: training.stesp = 1": "did you mean training.steps?",
        f"{first}: optimizer.lr = -1.0": "greater than 0",
        f'{second}: model.size = "61M"': "choose from debug",
        missing: "No such file",
        "flag --run.nmae: run.nmae": "did you mean run.name?",
        'flag --schedule.name: schedule.name = "step"': "expected one of",
    }
    assert len(found) == len(expected)
    for start, reason in expected.items():
        assert any(line.startswith(start) and reason in line for line in found), start


def test_a_value_reported_once_brings_no_further_complaints():
    """The default stands in for a value that failed; what does not fit the default is not the user's mistake."""
    flags = ["--training.global_batch_size", "ten", "--model.size", "7"]
    assert len(problems(flags=flags, world_size=3)) == 2


# Layout


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does():
    flags = ["--training.global_batch_size", "10"]
    report = only_problem(flags=flags, world_size=4)
    assert report.startswith("flag --training.global_batch_size: training.global_batch_size = 10 not a multiple of 4")
    assert report.endswith("the nearest that is: 8")
    assert only_problem(flags=["--training.global_batch_size", "3"], world_size=8).endswith("the nearest that is: 8")
    micro = only_problem(flags=["--training.global_batch_size", "22", "--training.micro_batch_size", "4"], world_size=2)
    assert "not a multiple of 2 data-parallel processes x training.micro_batch_size 4 = 8" in micro
    assert micro.endswith("the nearest that is: 24")
    load_config([], flags, world_size=5)
    load_config([], flags)


def test_a_degree_that_does_not_divide_is_refused_with_the_nearest_that_does():
    report = only_problem(flags=["--parallel.shard", "7"], world_size=8)
    assert report.startswith("flag --parallel.shard: parallel.shard = 7 7 does not divide the 8 running processes")
    assert report.endswith("the nearest that does: 8")
    report = only_problem(flags=["--parallel.replicate", "5", "--parallel.shard", "-1"], world_size=6)
    assert report.startswith("flag --parallel.replicate: parallel.replicate = 5")
    assert report.endswith("the nearest that does: 6")


def test_degrees_that_do_not_multiply_to_the_world_size_are_refused():
    report = only_problem(flags=["--parallel.replicate", "2", "--parallel.shard", "3"], world_size=4)
    assert "replicate 2 x shard 3 = 6 processes, but 4 are running" in report


def test_a_degree_of_zero_names_its_own_key():
    for key, other in [("replicate", "shard"), ("shard", "replicate")]:
        report = only_problem(flags=[f"--parallel.{key}", "0", f"--parallel.{other}", "2"], world_size=2)
        assert report.startswith(f"flag --parallel.{key}: parallel.{key} = 0")


def test_both_degrees_open_is_refused():
    assert "cannot both be -1" in only_problem(flags=["--parallel.shard", "-1"], world_size=2)


@pytest.mark.parametrize(
    ("given", "world_size", "resolved"),
    [
        ({"replicate": -1}, 8, {"replicate": 8}),
        ({"replicate": 1, "shard": -1}, 8, {"shard": 8}),
        ({"replicate": 2, "shard": -1}, 8, {"replicate": 2, "shard": 4}),
        ({"replicate": -1, "shard": 4}, 8, {"replicate": 2, "shard": 4}),
        ({"replicate": 2, "shard": 4}, 8, {"replicate": 2, "shard": 4}),
        ({}, 1, {}),
        ({"tensor": 2, "pipeline": 2}, 16, {"replicate": 4, "tensor": 2, "pipeline": 2}),
        ({"replicate": 1, "context": -1, "tensor": 2}, 8, {"context": 4, "tensor": 2}),
    ],
)
def test_degrees_are_filled_in(given, world_size, resolved):
    flags = [part for name, degree in given.items() for part in (f"--parallel.{name}", str(degree))]
    found = resolve_degrees(load_config([], flags), world_size)
    assert found._asdict() == dict.fromkeys(found._fields, 1) | resolved


# The resolved file, help and the command line

FULL = """
[run]
name = "a-1"
dir = "out/with \\"quotes\\" and ü"
seed = 7
[model]
size = "400M"
[model.shape]
head_dim = 32
[tokenizer]
kind = "bytes"
[data]
validation_fraction = 0.0
[[data.sources]]
source = "files"
paths = ["a/*.txt", "b.jsonl"]
[[data.sources]]
source = "embedded"
weight = 0.25
[training]
tokens = 1e10
[optimizer]
lr = 3
eps = 1e-15
[checkpoint]
resume = 120
"""


@pytest.mark.parametrize("text", ["", FULL])
def test_the_resolved_file_loads_to_the_same_configuration(toml, text):
    config = load_config([toml(text)])
    resolved = to_toml(config)
    assert load_config([toml(resolved, "resolved.toml")]) == config
    assert tomli.loads(resolved)["optimizer"]["beta2"] == 0.95, "defaults are written out"
    assert "tokens_per_parameter" not in resolved, "what is not given stays out"


def test_help_lists_every_section_in_a_line_or_two():
    page = help_page("newcompute plan", "newcompute plan: what would run", "")
    assert set(SECTIONS) == set(Config.model_fields)
    for section, text in SECTIONS.items():
        assert f"  {section} " in page
        assert text in " ".join(page.split())
    assert len(page.splitlines()) < 50
    assert max(map(len, page.splitlines())) <= 80


@pytest.mark.parametrize("section", sorted(set(Config.model_fields) - {"transforms"}))
def test_help_of_a_section_names_each_of_its_keys_with_its_meaning(section):
    page = help_page("newcompute plan", "", section)
    words = " ".join(page.split())
    for key, field in schema_keys():
        if key.startswith(f"{section}."):
            assert f"--{key} " in page, key
            assert field.description, f"{key} has no description"
            assert " ".join(field.description.split()) in words, key
    assert all(len(line) <= 80 or "|" in line for line in page.splitlines()), "choices are not cut"


@pytest.mark.parametrize("spec", [BitflipSpec, QuantiseSpec, OpticalSpec, LoraSpec])
def test_help_of_a_kind_of_transform_names_each_of_its_keys(spec):
    (kind,) = get_args(spec.model_fields["kind"].annotation)
    assert f'kind = "{kind}"' in help_page("newcompute plan", "", "transforms")
    page = help_page("newcompute plan", "", f"transforms.{kind}")
    tables = [CellFaults] if spec is BitflipSpec else [Quantised] if spec is QuantiseSpec else []
    for model in (spec, *tables):
        for key, field in model.model_fields.items():
            assert key == "kind" or f"  {key} " in page, key
            assert " ".join((field.description or "").split()) in " ".join(page.split())


def test_help_of_one_key_and_of_nested_tables():
    assert "Peak learning rate." in help_page("newcompute plan", "", "optimizer.lr")
    assert "--model.shape.dim N" in help_page("newcompute plan", "", "model.shape")
    assert "--model.shape.rope_scaling.factor X  (default 8.0)" in help_page("newcompute plan", "", "model")
    assert "source embedded|files|hub|random" in help_page("newcompute plan", "", "data.sources")


@pytest.mark.parametrize(
    ("topic", "nearest"),
    [("optimiser", "optimizer"), ("transforms.optcal", "transforms.optical"), ("training.stepz", "training.steps")],
)
def test_help_of_what_is_not_there_names_the_nearest(topic, nearest):
    with pytest.raises(ConfigError, match=rf"did you mean {nearest}\?"):
        help_page("newcompute plan", "", topic)


def test_the_topic_of_help_is_what_follows_it():
    assert asked_for_help(["--config", "a.toml", "--help", "training"]) == "training"
    assert asked_for_help(["-h", "--config", "a.toml"]) == ""
    assert asked_for_help(["--config", "a.toml"]) is None


def test_command_lines_are_split():
    arguments = ["--config", "a.toml", "--run.seed", "3", "--config=b.toml", "--out=x=y", "--run.dir=a=b"]
    files, options, rest = split_arguments(arguments, known=["--out"])
    assert files == ["a.toml", "b.toml"]
    assert options == {"--out": "x=y"}
    assert rest == ["--run.seed", "3", "--run.dir=a=b"]
    assert load_config([], rest).run.dir == "a=b"


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["train/main.py"], "--training.steps"),
        (["-m", "launch.cli"], "prepare"),
        (["-m", "launch.cli", "plan"], "--config"),
    ],
)
def test_help_does_not_import_torch(command, shown):
    """torch alone takes seconds; an import is counted, not timed."""
    done = run_python("-X", "importtime", *command, "--help")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "train.config_sources" in imported
    assert not imported & {"torch", "transformers", "tokenizers", "datasets", "pyarrow", "lm_eval"}
    assert shown in done.stdout


def test_a_refused_configuration_exits_with_2_before_importing_torch(toml):
    path = toml("[training]\nstesp = 1")
    done = run_python("-X", "importtime", "train/main.py", "--config", path, "--run.nmae", "x", check=False)
    assert done.returncode == 2
    assert f"{path}: training.stesp = 1" in done.stderr
    assert "flag --run.nmae" in done.stderr
    assert not any(line.endswith(" torch") for line in done.stderr.splitlines())
    assert "Traceback" not in done.stderr
