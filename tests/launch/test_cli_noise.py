"""`newcompute eval --transforms` as a user meets it: results of runs and exports, tasks, and every bad input."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from evals.held_out_task import write_task
from launch.cli import main
from train.config_sources import load_config

PRESET = '[[transforms]]\nkind = "bitflip"\nweight = { sign_exponent = 1e-3, mantissa = 1e-3, zero_above = 1.25 }\n'


@pytest.fixture
def trained(run_here, tmp_path, monkeypatch):
    """A run of a few steps under bit flips, as the flags for it and for its export; with a text of its own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    transforms = '[{kind = "bitflip", input = {sign_exponent = 1e-3, zero_above = 8.0}, weight = {mantissa = 0.02}}]'
    run_here(training__stop_after=5, transforms=transforms)
    main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "hf")])
    (tmp_path / "text.txt").write_text("for i in range(10):\n    print(i)\n" * 20)
    return str(tmp_path / "run"), str(tmp_path / "hf")


def evaluate(tmp_path, *arguments: str) -> dict:
    out = tmp_path / "eval.json"
    main(["eval", *arguments, "--device", "cpu", "--out", str(out)])
    return json.loads(out.read_text())


def test_a_run_and_its_export_are_the_same_chip(trained, tmp_path, capsys):
    text = ["--text", str(tmp_path / "text.txt"), "--transforms", "run", "--chips", "2", "--first-chip", "0"]
    rows = []
    for model in trained:
        result = evaluate(tmp_path, "--model", model, *text)
        assert (result["mode"], result["chips"], result["first_chip"]) == ("chip", 2, 0)
        assert result["noise_seed"] == 1234
        assert result["transforms"][0]["input"] == {
            "sign_exponent": 1e-3,
            "mantissa": 0.0,
            "bits": [],
            "zero_above": 8.0,
        }
        assert "14 layers" in result["table"][0]
        rows.append(result["text"][str(tmp_path / "text.txt")])
    assert rows[0] == rows[1]
    printed = capsys.readouterr().out
    for name in ("perplexity", "perplexity_std", "perplexity_clean", "bits_per_byte"):
        assert f"{rows[0][name]:.4f}" in printed


def test_clean_mode_is_the_evaluation_without_transforms(trained, tmp_path):
    text = ["--model", trained[0], "--text", str(tmp_path / "text.txt")]
    plain = evaluate(tmp_path, *text)
    assert list(plain) == ["model", "transforms", "text", "tasks", "protocol"]
    clean = evaluate(tmp_path, *text, "--transforms", "run", "--mode", "clean")
    assert clean["text"] == plain["text"]
    assert clean["mode"] == "clean"
    noisy = evaluate(tmp_path, *text, "--transforms", "run", "--mode", "resample", "--chips", "1")
    (row,), (plain_row,) = noisy["text"].values(), plain["text"].values()
    assert row["perplexity_clean"] == plain_row["perplexity"] != row["perplexity"]
    assert noisy["batch_size"] == 8


@pytest.mark.slow  # lm-eval; below, the metrics of chips without it
def test_a_task_is_evaluated_on_a_chip(trained, task_index, tmp_path, capsys):
    _, task = write_task(tmp_path / "run", tmp_path / "task", limit=1)
    (tmp_path / "head.toml").write_text(PRESET + 'modules = ["lm_head", "*_proj"]\n')
    arguments = [
        "--model",
        trained[1],
        "--tasks",
        str(task),
        "--transforms",
        str(tmp_path / "head.toml"),
        "--chips",
        "1",
    ]
    metrics = evaluate(tmp_path, *arguments)["tasks"]["held_out"]
    bits = metrics["bits_per_byte,none"]
    assert metrics["bits_per_byte,none_per_chip"] == [bits]
    assert (metrics["bits_per_byte,none_std"], metrics["non_finite_chips"]) == (None, 0)
    assert 4 < metrics["bits_per_byte,none_clean"] < 8
    assert bits != metrics["bits_per_byte,none_clean"]
    assert f"{bits:.4f}" in capsys.readouterr().out


def test_metrics_of_tasks_over_chips_leave_out_those_that_are_not_finite(monkeypatch):
    import contextlib
    import types

    import torch

    from evals import chips

    noisy = types.SimpleNamespace(
        non_finite=torch.zeros((), dtype=torch.bool),
        clean=contextlib.nullcontext,
        chip=lambda number: None,
        noise=types.SimpleNamespace(random=True, take_non_finite=lambda: 0),
    )
    answers = iter([0.5, 0.1, 0.3, 0.25])

    def evaluate_tasks(model, tasks):
        value = next(answers)
        noisy.non_finite.fill_(value == 0.25)  # the accuracy of a model that gives NaN looks like any other
        return {tasks[0]: {"acc": value}}

    monkeypatch.setattr(chips, "evaluate_tasks", evaluate_tasks)
    found = chips.tasks_over_chips(None, noisy, chips.Trials("chip", 3), ["arc"])["arc"]
    assert found == {
        "acc": pytest.approx(0.2),
        "acc_std": pytest.approx(0.02**0.5),
        "acc_per_chip": [0.1, 0.3, None],
        "acc_clean": 0.5,
        "non_finite_chips": 1,
    }


def test_every_preset_can_be_evaluated_and_trained():
    """A preset holds what both accept; a run takes it as one more configuration file."""
    from support import ROOT

    from evals.chips import read_transforms

    for preset in sorted((ROOT / "configs" / "transforms").glob("*.toml")):
        tables = load_config([str(preset)]).transforms
        if any(spec.kind != "lora" for spec in tables):
            assert read_transforms([str(preset)], "any").specs


def test_ranges_are_calibrated_and_named_in_the_result(real_inputs, tmp_path, capsys):
    table, ranges, text = tmp_path / "optical.toml", str(tmp_path / "ranges.safetensors"), tmp_path / "text.txt"
    table.write_text('[[transforms]]\nkind = "optical"\nrounding = "nearest"\n')
    text.write_text("Once upon a time there was a small dog. " * 20)
    of = [
        "--model",
        str(real_inputs / "stories260K"),
        "--transforms",
        str(table),
        "--text",
        str(text),
        "--device",
        "cpu",
    ]
    tasks = [part for part in of if part not in ("--text", str(text))]
    error = refused(capsys, "eval", *tasks, "--tasks", "arc_easy")
    assert "tasks are no text to fit them on" in error
    assert "--transforms run" in error
    capsys.readouterr()
    unknown = evaluate(tmp_path, *of)
    assert "ranges of converters calibrated on the first 261 tokens of" in capsys.readouterr().out
    main(["calibrate", *of, "--out", ranges])
    with safe_open(ranges, "pt") as file:
        noted = {name: json.loads(value) for name, value in file.metadata().items()}
    assert noted["text"] == [str(text)]
    assert noted["protocol"]["bos_added"]
    assert noted["transforms"][0]["kind"] == "optical"
    result = evaluate(tmp_path, *of, "--ranges", ranges)
    assert result["ranges"] == ranges
    assert unknown["calibration"] == {str(text): 261}
    assert unknown["text"] == result["text"], "without --ranges, the same ranges are fitted on the text itself"
    assert result["text"][str(text)]["perplexity"] == pytest.approx(
        result["text"][str(text)]["perplexity_clean"], rel=0.2
    )
    two = ["--transforms", str(table), str(tmp_path / "bitflip.toml"), "--ranges", ranges]
    (tmp_path / "bitflip.toml").write_text(PRESET)
    assert evaluate(tmp_path, *of, *two)["ranges"] == ranges, "a transform behind changes no name"
    assert "another order of them" in refused(capsys, "eval", *of, "--transforms", *two[2:0:-1], *two[3:])
    assert "these transforms have no ranges" in refused(capsys, "eval", *of, "--transforms", two[2], *two[3:])


@pytest.mark.slow
def test_norms_that_plain_weights_are_without_are_told(run_here, tmp_path, capsys):
    """A BitNet run that is taken for a plain model; not where it is evaluated as it was trained, or packed."""
    spec = '{kind = "quantise", weight = {format = "ternary"}, input = {format = "int8"}, norm = true}'
    run_here(training__stop_after=5, transforms=f"[{spec}]")
    (tmp_path / "text.txt").write_text("for i in range(10):\n    print(i)\n" * 20)
    run, out, text = str(tmp_path / "run"), str(tmp_path / "hf"), ["--text", str(tmp_path / "text.txt")]
    told = "was trained with norms before its linear layers"
    main(["export", "--run", run, "--out", str(tmp_path / "packed"), "--packed"])
    for arguments, model in ((["--transforms", "run"], run), ([], str(tmp_path / "packed"))):
        evaluate(tmp_path, "--model", model, *text, *arguments)
        assert told not in capsys.readouterr().err
    main(["export", "--run", run, "--out", out])
    assert told in capsys.readouterr().err
    for model in (run, out):
        evaluate(tmp_path, "--model", model, *text)
        assert told in capsys.readouterr().err


BAD_FILES = {
    "unknown key": (PRESET + "lifetme = 1\n", "transforms.0.lifetme"),
    "unknown kind": ('[[transforms]]\nkind = "bitflop"\n', "did you mean 'bitflip'?"),
    "out of range": (PRESET.replace("1e-3", "1.5", 1), "expected a value at most 1"),
    "adapters": ('[[transforms]]\nkind = "lora"\n', "adapters are weights"),
    "other section": (PRESET + "[training]\nsteps = 3\n", "may hold [[transforms]] and [noise] only"),
    "no table": ("[noise]\nseed = 1\n", "there is no [[transforms]] table here"),
    "not a list": ("transforms = 3\n", "expected an array"),
    "not TOML": ("[[transforms\n", "not a TOML file"),
    "matches nothing": (PRESET + 'modules = ["*.q_prj"]\n', "'*.q_prj' matches no layer; the nearest layer is"),
    "no linear layer": (PRESET + 'modules = ["*norm"]\n', "matches no linear layer"),
}


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_of_transforms_are_refused(name, real_inputs, tmp_path, capsys):
    content, message = BAD_FILES[name]
    file = tmp_path / "preset.toml"
    file.write_text(content)
    error = refused(
        capsys, "eval", "--model", str(real_inputs / "stories260K"), "--text", __file__, "--transforms", str(file)
    )
    assert message in error
    assert str(file) in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--transforms", "no/such.toml"], "no/such.toml\n      cannot read this file: No such file or directory"),
        (["--transforms", "run"], "is neither a run nor an export of one; name a file"),
        (["--chips", "3"], "--chips: there are no hardware effects without --transforms"),
        (["--mode", "chip"], "--mode: there are no hardware effects without --transforms"),
        (["--transforms", "x.toml", "--mode", "resample", "--first-chip", "2"], "it has no chips to number"),
        (["--transforms", "x.toml", "--mode", "clean", "--chips", "3"], "there are no chips"),
        (["--transforms", "x.toml", "--chips", "0"], "at least 1"),
        (["--out", "."], "this is a folder, expected a file name"),
        (["--transforms", "x.toml", "--first-chip", "-1"], "at least 0"),
    ],
)
def test_bad_options_are_refused(arguments, message, real_inputs, capsys):
    error = refused(capsys, "eval", "--model", str(real_inputs / "stories260K"), "--text", __file__, *arguments)
    assert message in error


def test_a_run_without_effects_has_none_to_evaluate_under(run_here, tmp_path, capsys):
    run_here(training__stop_after=5)
    error = refused(capsys, "eval", "--model", str(tmp_path / "run"), "--text", __file__, "--transforms", "run")
    assert "was trained without hardware effects" in error
