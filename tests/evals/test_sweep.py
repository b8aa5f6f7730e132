"""Sweeps over the probability of bit errors: every point is the evaluation at that probability, and the plot is drawn."""

from __future__ import annotations

import json

import pytest

from evals.sweep import at_probability, describe, draw, read_probabilities
from launch.cli import main
from transforms.specs import BitflipSpec, CellFaults

PRESET = """
[noise]
seed = 77
[[transforms]]
kind = "bitflip"
modules = ["*.mlp.*"]
weight = { sign_exponent = PROBABILITY, zero_above = 1.25 }
"""


@pytest.fixture
def files(real_inputs, tmp_path):
    """Model folder, text and a preset at some probability."""
    text = (real_inputs / "text" / "wikitext-2-valid.txt").read_text(encoding="utf-8")[:3000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")

    def preset(p: str) -> str:
        (tmp_path / f"p{p}.toml").write_text(PRESET.replace("PROBABILITY", p))
        return str(tmp_path / f"p{p}.toml")

    return ["--model", str(real_inputs / "stories260K"), "--text", str(tmp_path / "text.txt")], preset


def test_every_point_is_the_evaluation_at_its_probability(files, tmp_path, capsys):
    common, preset = files
    common += ["--chips", "2", "--device", "cpu"]
    out = tmp_path / "results" / "sweep.json"
    main(["sweep-noise", *common, "--transforms", preset("0.5"), "--probabilities", "1e-4,1e-2", "--out", str(out)])
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [point["p"] for point in found["points"]] == [1e-4, 1e-2]
    assert found["protocol"]["context"] == 512
    assert (found["mode"], found["chips"], found["noise_seed"]) == ("chip", 2, 77)
    assert found["transforms"][0]["weight"]["sign_exponent"] == 0.5
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    for point in found["points"]:
        alone = tmp_path / "alone.json"
        main(["eval", *common, "--transforms", preset(str(point["p"])), "--out", str(alone)])
        (row,) = json.loads(alone.read_text())["text"].values()
        assert {name: row[name] for name in point if name != "p"} == {k: v for k, v in point.items() if k != "p"}
        assert found["clean"] == row["perplexity_clean"]
        assert describe(point) in printed
    assert found["points"][1]["perplexity"] > 2 * found["points"][0]["perplexity"]


def test_points_without_a_finite_chip_are_null_and_can_be_drawn(files, tmp_path):
    common, _ = files
    (tmp_path / "inf.toml").write_text('[[transforms]]\nkind = "bitflip"\nweight = { sign_exponent = 0.1 }\n')
    out = tmp_path / "sweep.json"
    main(["sweep-noise", *common, "--transforms", str(tmp_path / "inf.toml"), "--probabilities", "1e-9,0.1", "--chips", "1",
          "--mode", "resample", "--out", str(out)])  # fmt: skip
    found = json.loads(out.read_text())
    fine, broken = found["points"]
    assert (fine["non_finite_chips"], broken["non_finite_chips"]) == (0, 1)
    assert (broken["perplexity"], broken["perplexity_per_chip"]) == (None, [None])
    assert found["batch_size"] == 8
    assert out.with_suffix(".png").exists()


def test_a_sweep_without_any_finite_chip_can_be_drawn(tmp_path):
    points = [{"p": p, "perplexity": None, "perplexity_per_chip": [None], "non_finite_chips": 1} for p in (0.2, 0.5)]
    draw({"all": points}, 200.0, "none is finite", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_only_probabilities_above_zero_are_changed():
    spec = BitflipSpec(
        kind="bitflip",
        weight=CellFaults(mantissa=0.1, zero_above=2.0),
        input=CellFaults(bits=[0.0, 0.2] + [0.0] * 14),
    )
    changed = at_probability(spec, 0.01)
    assert changed.weight == CellFaults(mantissa=0.01, zero_above=2.0)
    assert changed.input == CellFaults(bits=[0.0, 0.01] + [0.0] * 14)
    assert changed.output is None


@pytest.mark.parametrize("text", ["1e-3,", "0", "-1", "2", "nan", "often"])
def test_probabilities_out_of_range_are_refused(text):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        read_probabilities(text)


@pytest.mark.parametrize(
    ("preset", "probabilities", "message"),
    [
        ("weight = { sign_exponent = 0.5 }", "1e-3,7", "--probabilities: expected numbers above 0 and at most 1"),
        ("weight = { zero_above = 1.0 }", "1e-3", "every probability of these transforms is 0"),
    ],
)
def test_bad_sweeps_end_with_exit_code_2(files, tmp_path, capsys, preset, probabilities, message):
    common, _ = files
    (tmp_path / "preset.toml").write_text(f'[[transforms]]\nkind = "bitflip"\n{preset}\n')
    with pytest.raises(SystemExit) as stopped:
        main(["sweep-noise", *common, "--transforms", str(tmp_path / "preset.toml"), "--probabilities", probabilities,
              "--out", str(tmp_path / "sweep.json")])  # fmt: skip
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
