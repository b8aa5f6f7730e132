"""The benchmark of trained models under every preset, on a small text and presets of its own."""

from __future__ import annotations

import json
from argparse import Namespace
from statistics import fmean

import pytest

from benchmarks import common, preset_perplexity
from launch.cli import main

CHARACTERS = 600


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """A folder with one preset that is random, one that is not, and one with ranges to calibrate."""
    folder = tmp_path / "presets"
    folder.mkdir()
    for name in ("optical_8bit", "int4_a8", "bitflip_all_bits"):
        text = common.effect_file(name, tmp_path).read_text(encoding="utf-8")
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(common, "PRESETS", folder)
    return folder


@pytest.mark.slow
def test_figures_are_those_of_the_commands(presets, real_inputs, tmp_path):
    out = tmp_path / "result.json"
    names = ["bitflip_all_bits", "int4_a8", "optical_8bit"]
    options = Namespace(data=real_inputs, characters=CHARACTERS, chips=2, presets=names, device="cpu", out=out)
    result = preset_perplexity.run(options, tmp_path)
    assert json.loads(out.read_text()) == result
    bitflip, int4, optical = result["presets"]
    assert (bitflip["chips"], int4["chips"], optical["chips"]) == (2, 1, 2)
    assert (bitflip["random"], int4["random"], optical["random"]) == (True, False, True)
    assert bitflip["perplexity"] > 1.2 * result["clean"]
    assert bitflip["calibrated_ranges"] == int4["calibrated_ranges"] == 0
    assert optical["calibrated_ranges"] > 0

    whole = (real_inputs / "text" / "wikitext-2-valid.txt").read_text(encoding="utf-8")
    for name, text in (("evaluated", whole[:CHARACTERS]), ("calibrated", whole[CHARACTERS : 2 * CHARACTERS])):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    model = ["--model", str(real_inputs / "stories260K"), "--device", "cpu", "--add-bos", "no"]
    with_effect = [*model, "--transforms", str(presets / "optical_8bit.toml")]
    text, ranges, found = tmp_path / "evaluated.txt", tmp_path / "ranges.safetensors", tmp_path / "eval.json"
    main(["calibrate", *with_effect, "--text", str(tmp_path / "calibrated.txt"), "--out", str(ranges)])
    measured = ["--ranges", str(ranges), "--chips", "2", "--text", str(text), "--out", str(found)]
    main(["eval", *with_effect, *measured])
    expected = json.loads(found.read_text())["text"][str(text)]
    assert optical["perplexity_per_chip"] == pytest.approx(expected["perplexity_per_chip"], rel=1e-6)
    assert result["clean"] == pytest.approx(expected["perplexity_clean"], rel=1e-6)

    page = preset_perplexity.page(result, "result.json")
    difference = 100 * (fmean(expected["perplexity_per_chip"]) / expected["perplexity_clean"] - 1)
    assert f"| `optical_8bit` | {fmean(expected['perplexity_per_chip']):.2f} ± " in page
    assert f"| {difference:+.2f}% | 2 |" in page
    assert f"| `int4_a8` | {int4['perplexity']:.2f} | " in page


def test_chips_that_are_not_finite_are_said():
    result = {
        "model": "m", "clean": 2.0, "tokens": 5, "text": "t", "chips": 2, "compute": "float32", "device": "d",
        "date": "2030-01-01", "commit": "c", "protocol": {"context": 512}, "versions": {"torch": "2.13.0"},
        "presets": [{
            "preset": "p", "perplexity": None, "perplexity_std": None, "random": True, "chips": 2, "non_finite_chips": 2,
        }],
    }  # fmt: skip
    assert "| `p` | not finite |  | 2, 2 not finite |" in preset_perplexity.page(result, "f.json")
