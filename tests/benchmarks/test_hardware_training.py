"""The benchmark of training under hardware effects: its figures on rows with known ones, and tiny runs of it."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from statistics import fmean

import pytest
from support import ROOT, run_python

from benchmarks import common
from benchmarks.hardware_training import PLANS, Plan, campaign, cost, figures, line, section

TINY = """--data.source files --data.validation_fraction 0.1 --tokenizer.kind bytes --compile.enabled false
    --model.shape.dim 32 --model.shape.num_layers 2 --model.shape.num_heads 4 --model.shape.num_kv_heads 2
    --model.shape.ffn_dim 64 --model.shape.vocab_size 257 --training.steps 40 --validation.steps 2
    --metrics.log_interval 1""".split()  # noqa: SIM905 - a list would be 18 lines
SCRIPT = str(ROOT / "benchmarks" / "hardware_training.py")


def logged(rate: float, seconds: float, begin: float = 0.0, steps: int = 100) -> list[dict]:
    """Rows of a run that logs every ten steps."""
    return [
        {"step": step, "lr": 1e-3, "loss": 5.0, "grad_norm": 1.0, "tokens_per_second": rate, "time": begin + step * seconds}
        for step in range(10, steps + 1, 10)
    ]  # fmt: skip


def test_a_cost_is_that_of_the_steps_that_both_made():
    ours = logged(50.0, 2.0, begin=100.0)
    ours[0]["tokens_per_second"] = 1.0  # the first row holds the compilation
    early, beside, late = logged(900.0, 1.0), logged(80.0, 1.0, begin=115.0, steps=300), logged(7.0, 1.0, begin=500.0)
    assert cost(ours, early + beside + late, 100) == {
        "tokens_per_second": 50.0, "tokens_per_second_of_pacer": 80.0, "cost": 1.6,
    }  # fmt: skip


def test_a_cost_is_unknown_where_too_few_steps_were_made_together():
    assert cost(logged(50.0, 2.0), logged(80.0, 1.0, begin=150.0), 100)["cost"] is None
    assert cost([], logged(80.0, 1.0), 100)["cost"] is None


def test_steps_that_are_not_finite_are_counted_once():
    rows = logged(50.0, 2.0)
    rows[3]["loss"] = None
    rows[4]["grad_norm"] = None
    rows[9]["loss"] = 2.0
    rows += [{"step": 40, "event": "skipped", "message": ""}, {"step": 77, "event": "skipped", "message": ""}]
    rows.append({"step": 100, "val_loss": 3.0, "val_bits_per_byte": 1.5})
    found = figures(rows)
    assert found["non_finite_steps"] == 3  # 40 (both ways), 50 and 77
    assert (found["first_loss"], found["last_loss"], found["bits_per_byte"]) == (5.0, 2.0, 1.5)


def test_differences_are_taken_seed_by_seed():
    def row(effect, seed, bits):
        return {
            "effect": effect, "seed": seed, "bits_per_byte": bits, "cost": 1.0 + seed, "non_finite_steps": 0,
            "first_loss": 7.0, "last_loss": 5.0,
        }  # fmt: skip

    runs = [row("clean", 1, 2.0), row("clean", 2, 4.0), row("int8", 1, 2.2), row("int8", 2, 4.0), row("int8", 3, None)]
    cells = line("int8", runs)
    assert cells["runs"] == "2 of 3"
    assert cells["held-out bits per byte"] == f"3.1000 ± {math.sqrt(2 * 0.9**2):.4f}"
    assert cells["against clean"] == "+5.00%"
    assert cells["time of a step over clean"] == "3.00 (2.00 to 4.00)"
    assert cells["training loss, first to last"] == "7.000 to 5.000"


@pytest.mark.parametrize("effect", sorted({name for plan in PLANS.values() for name in plan.effects} - {"clean"}))
def test_effects_are_valid_and_of_the_kind_they_are_named_after(effect, tmp_path):
    from evals.chips import read_transforms

    (spec,) = read_transforms([str(common.effect_file(effect, tmp_path))], "").specs
    assert spec.kind == next(
        (kind for kind in ("bitflip", "optical") if effect.startswith(kind)),
        "quantise",
    )


@pytest.mark.slow
def test_tiny_runs_are_recorded_and_not_made_again(tmp_path, text_corpus):
    out, page = tmp_path / "result.json", tmp_path / "page.md"
    source = ["--data.paths", json.dumps([str(text_corpus / "corpus.txt")])]
    common_flags = ["debug", *TINY, *source, "--seeds", "1", "--out", str(out), "--page", str(page)]
    run_python(SCRIPT, *common_flags, "--effects", "clean,mxfp4")
    clean, noisy = json.loads(out.read_text())["runs"]
    assert (clean["effect"], noisy["effect"]) == ("clean", "mxfp4")
    assert clean["first_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert noisy["bits_per_byte"] != clean["bits_per_byte"]
    for row in (clean, noisy):
        assert row["finished"]
        assert row["non_finite_steps"] == 0
        assert row["last_loss"] < row["first_loss"] - 0.5
        assert row["tokens_per_second"] > 0
        assert row.keys() >= {"cost", "commit", "versions", "device", "date"}
    assert f"| {clean['bits_per_byte']:.4f} |" in page.read_text()

    changed = json.loads(out.read_text())
    changed["runs"][1]["bits_per_byte"] = 1.2345  # would be lost if the run were made again
    out.write_text(json.dumps(changed))
    run_python(SCRIPT, *common_flags, "--effects", "clean,mxfp4")
    assert "| 1.2345 |" in page.read_text()
    assert json.loads(out.read_text()) == changed
    other = run_python(SCRIPT, *common_flags, "--training.sequence_length", "32", check=False)
    assert other.returncode == 1
    assert "is of other settings" in other.stderr


@pytest.mark.slow
def test_a_run_that_hardware_breaks_is_a_result(tmp_path, text_corpus, monkeypatch):
    monkeypatch.setitem(common.INLINE, "broken", 'kind = "bitflip"\nweight = { sign_exponent = 0.2 }\n')
    flags = [*TINY, "--data.paths", json.dumps([str(text_corpus / "corpus.txt")])]
    options = Namespace(seeds=[1], effects=["broken"], flags=flags, out=tmp_path / "result.json")
    campaign(Plan("", ("broken",), (1,), 1, False), options, {"effects": {}, "runs": []}, tmp_path)
    (row,) = json.loads(options.out.read_text())["runs"]
    assert not row["finished"]
    assert row["bits_per_byte"] is None
    assert row["non_finite_steps"] > 10  # faults.max_skipped in a row
    cells = line("broken", [row])
    assert (cells["runs"], cells["held-out bits per byte"]) == ("0 of 1", "none")


def test_an_unknown_effect_is_refused():
    done = run_python(SCRIPT, "debug", "--effects", "clean,int9", check=False)
    assert done.returncode == 2
    assert "'int9' is none of clean, bitflip_all_bits" in done.stderr


def test_the_page_says_what_was_run():
    rows = [
        {
            "effect": "clean", "seed": seed, "bits_per_byte": 2.0 + seed, "non_finite_steps": 0, "first_loss": 7.0,
            "last_loss": 5.0, "date": "2030-01-01", "commit": f"c{seed}", "device": "a processor",
            "versions": {"torch": "2.13.0"},
        }
        for seed in (1, 2)
    ]  # fmt: skip
    text = section("debug", {"file": "f.json", "processes": 1, "settings": ["--a", "1"], "runs": rows})
    assert f"| clean | 2 of 2 | {fmean([3, 4]):.4f} ± {math.sqrt(0.5):.4f} |" in text
    assert "commit c1, c2" in text
    assert "2 seeds; settings `--a 1`" in text
