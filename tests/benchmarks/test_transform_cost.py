"""The benchmark of what effects cost: what it records, and that it goes on from its file."""

from __future__ import annotations

import json
from statistics import median

import pytest
from support import ROOT, run_python

from benchmarks import common
from benchmarks.transform_cost import GOALS, configuration, summary

SCRIPT = str(ROOT / "benchmarks" / "transform_cost.py")
QUICK = [
    "--device", "cpu", "--models", "quickstart", "--rounds", "2", "--seconds", "0.01", "--max-steps", "1",
    "--training.global_batch_size", "2", "--training.sequence_length", "32",
]  # fmt: skip


@pytest.mark.slow
def test_ratios_are_recorded_and_not_measured_again(tmp_path):
    out = tmp_path / "cost.json"
    effect = ["--effects", "int8", "--out", str(out)]
    settings = ["--cpu-layers", '{"quickstart": 1}', "--compile.enabled", "false"]
    shown = run_python(SCRIPT, *QUICK, *effect, *settings).stdout
    (row,) = json.loads(out.read_text())["rows"]
    assert row["transforms"][0]["weight"]["format"] == "int8"
    assert (row["model"], row["effect"], row["layers"], row["tokens"]) == ("quickstart", "int8", 1, 64)
    assert row["compute_dtype"] == "float32"
    assert len(row["ratios"]) == 2
    assert row["ratio_median"] == pytest.approx(median(row["ratios"]), abs=1e-4)
    assert row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
    assert "goal" not in row  # goals are of GPUs
    assert f"ratio {row['ratio_median']:.3f}" in shown

    row["ratio_median"] = 123.0  # would be lost if it were measured again
    out.write_text(json.dumps({"rows": [row]}))
    shown = run_python(SCRIPT, *QUICK, *effect, *settings, "--resume").stdout
    assert "ratio 123.000" in shown
    assert json.loads(out.read_text())["rows"] == [row]
    out.write_text(json.dumps({"rows": [row | {"sources": "of other code"}]}))
    assert "ratio 123.000" not in run_python(SCRIPT, *QUICK, *effect, *settings, "--resume").stdout


@pytest.mark.parametrize("effect", sorted(GOALS))
def test_the_transformed_run_has_the_effect_and_the_clean_one_none(effect, tmp_path):
    clean = configuration("60M", "cpu", 2, 3, [], [])
    transformed = configuration("60M", "cpu", 2, 3, [str(common.effect_file(effect, tmp_path))], [])
    assert not clean.transforms
    assert len(transformed.transforms) == 1
    assert transformed.tokens_per_step == clean.tokens_per_step == 3 * 2048
    assert transformed.model_copy(update={"transforms": []}) == clean


def test_goals_stand_beside_the_figures_of_a_gpu():
    row = {
        "model": "60M", "effect": "int8", "layers": 10, "tokens": 32768, "milliseconds_clean": 50.0, "goal": 1.05,
        "milliseconds_transformed": 60.0, "ratio_median": 1.2, "ratio_min": 1.1, "ratio_max": 1.3,
    }  # fmt: skip
    assert summary(row).endswith("ratio 1.200 (1.100 to 1.300), goal 1.05")
    assert summary({"model": "60M", "effect": "int8", "out_of_memory": True}).endswith("not enough memory")
