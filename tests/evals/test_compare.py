"""`eval --compare`: each set is what `--transforms` finds for it, against one clean measurement, kept as it comes."""

from __future__ import annotations

import json

import pytest
from families import TEXTS, build, save_tokenizer

from evals import chips, text
from launch.cli import main

FAULTS = '[[transforms]]\nkind = "bitflip"\nweight = { sign_exponent = 0.01, zero_above = 1.25 }\n'
OPTICAL = '[noise]\nseed = 7\n[[transforms]]\nkind = "optical"\n'
INT4 = '[[transforms]]\nkind = "quantise"\nweight = { format = "int4" }\n'


@pytest.fixture
def small(tmp_path):
    """Options for a small random model and two texts, and files of transforms."""
    build("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    for name in ("en", "de"):
        (tmp_path / f"{name}.txt").write_text(TEXTS[name] * 2, encoding="utf-8")
    for name, tables in (("faults", FAULTS), ("optical", OPTICAL), ("int4", INT4)):
        (tmp_path / f"{name}.toml").write_text(tables)
    texts = [str(tmp_path / "en.txt"), str(tmp_path / "de.txt")]
    return ["--model", str(tmp_path / "model"), "--text", *texts, "--device", "cpu"]


def test_sets_are_what_each_is_alone_against_one_clean_measurement(small, tmp_path, capsys, monkeypatch):
    files = [str(tmp_path / f"{name}.toml") for name in ("faults", "optical", "int4")]
    out, plot = tmp_path / "compared.json", tmp_path / "plots" / "compared.svg"
    clean, measured = [], text.evaluate_text
    monkeypatch.setattr(text, "evaluate_text", lambda *arguments: clean.append(1) or measured(*arguments))
    main(["eval", *small, "--chips", "2", "--compare", *files, "--out", str(out), "--plot", str(plot)])
    assert len(clean) == 1
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [one["name"] for one in found["sets"]] == ["faults", "optical", "int4"]
    for one, file in zip(found["sets"], files):
        main(["eval", *small, "--chips", "2", "--transforms", file, "--out", str(tmp_path / "alone.json")])
        alone = json.loads((tmp_path / "alone.json").read_text())
        assert one == {"name": one["name"]} | {key: alone[key] for key in one if key != "name"}
        assert alone.keys() - one.keys() == {"model", "protocol"}
        assert found["protocol"] == alone["protocol"]
        for name, row in alone["text"].items():
            assert row["perplexity_clean"] == found["text"][name]["perplexity"]
            assert f"{row['perplexity'] / row['perplexity_clean'] - 1:+.2%}" in printed
    assert found["sets"][1]["calibration"].keys() == found["text"].keys()
    drawn = plot.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in drawn for name in ("faults", "optical", "int4"))


def test_a_comparison_that_was_killed_keeps_its_sets_and_goes_on(small, tmp_path, monkeypatch, capsys):
    files = [str(tmp_path / f"{name}.toml") for name in ("faults", "int4")]
    out, whole = tmp_path / "part.json", tmp_path / "whole.json"
    common = ["eval", *small, "--chips", "2", "--compare"]
    main([*common, *files, "--out", str(whole)])
    measured, left = chips.text_over_chips, iter([True, False])

    def until_killed(*arguments):
        if not next(left):
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr("evals.compare.text_over_chips", until_killed)
    with pytest.raises(SystemExit):
        main([*common, *files, "--out", str(out)])
    assert [one["name"] for one in json.loads(out.read_text())["sets"]] == ["faults"]
    monkeypatch.setattr("evals.compare.text_over_chips", measured)
    capsys.readouterr()
    main([*common, *files, "--out", str(out)])
    assert "goes on behind faults" in capsys.readouterr().out
    assert json.loads(out.read_text()) == json.loads(whole.read_text())
    (tmp_path / "faults.toml").write_text(FAULTS.replace("0.01", "0.02"))
    for change, message in (([], "its set faults has other transforms"), (["--chips", "3"], "chips: 2 there, 3 now")):
        with pytest.raises(SystemExit) as stopped:
            main([*common, *files, "--out", str(out), *change])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--transforms", "{int4}"], "not allowed with argument"),
        (["--ranges", "r.safetensors"], "ranges belong to one set of transforms"),
        (["--mode", "clean"], "the clean model is measured in any case"),
        (["--language", "en={int4}"], "damage by language is of one set"),
        (["--plot", "plot.xyz"], "--plot plot.xyz: expected a name that ends in"),
        (["--compare", "{int4}", "{int4}"], "is there twice"),
        (["--compare", "no/such.toml"], "cannot read this file"),
        (["--compare", "run"], "is neither a run nor an export of one"),
        (["--text", "no/such.txt"], "--text no/such.txt: No such file"),
    ],
)
def test_bad_comparisons_are_refused_before_a_model_is_loaded(small, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("evals.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    given = [part.format(int4=tmp_path / "int4.toml") for part in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *small, "--compare", str(tmp_path / "int4.toml"), *given])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
