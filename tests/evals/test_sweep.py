"""Sweeps over a number of the transforms: every point is the evaluation at that value, and the plot is drawn."""

from __future__ import annotations

import json

import pytest
from families import TEXTS, build, save_tokenizer
from tokenizers import Tokenizer

from evals import chips
from evals.chips import read_transforms
from evals.sweep import at_probability, describe, draw, numeric_keys, read_axis
from launch.cli import main
from transforms.specs import BitflipSpec, CellFaults

OVER = ["--key", "probability", "--values"]
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
    main(["sweep-noise", *common, "--transforms", preset("0.5"), *OVER, "1e-4,1e-2", "--out", str(out)])
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [point["value"] for point in found["points"]] == [1e-4, 1e-2]
    assert found["protocol"]["context"] == 512
    assert (found["mode"], found["chips"], found["noise_seed"]) == ("chip", 2, 77)
    assert found["transforms"][0]["weight"]["sign_exponent"] == 0.5
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    for point in found["points"]:
        alone = tmp_path / "alone.json"
        main(["eval", *common, "--transforms", preset(str(point["value"])), "--out", str(alone)])
        (row,) = json.loads(alone.read_text())["text"].values()
        assert {name: row[name] for name in point if name != "value"} == {
            k: v for k, v in point.items() if k != "value"
        }
        assert found["clean"] == row["perplexity_clean"]
        assert describe("probability", point) in printed
    assert found["points"][1]["perplexity"] > 2 * found["points"][0]["perplexity"]


def test_points_without_a_finite_chip_are_null_and_can_be_drawn(files, tmp_path):
    common, _ = files
    (tmp_path / "inf.toml").write_text('[[transforms]]\nkind = "bitflip"\nweight = { sign_exponent = 0.1 }\n')
    out = tmp_path / "sweep.json"
    main(["sweep-noise", *common, "--transforms", str(tmp_path / "inf.toml"), *OVER, "1e-9,0.1", "--chips", "1",
          "--mode", "resample", "--out", str(out)])  # fmt: skip
    found = json.loads(out.read_text())
    fine, broken = found["points"]
    assert (fine["non_finite_chips"], broken["non_finite_chips"]) == (0, 1)
    assert (broken["perplexity"], broken["perplexity_per_chip"]) == (None, [None])
    assert found["batch_size"] == 8
    assert out.with_suffix(".png").exists()


def test_a_sweep_without_any_finite_chip_can_be_drawn(tmp_path):
    points = [
        {"value": p, "perplexity": None, "perplexity_per_chip": [None], "non_finite_chips": 1} for p in (0.2, 0.5)
    ]
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


BITS = '[[transforms]]\nkind = "quantise"\nweight = { format = "int4" }\ninput = { format = "int8" }\n'
OPTICAL = '[[transforms]]\nkind = "optical"\nphotons = 100.0\n'
FAULTS = '[[transforms]]\nkind = "bitflip"\nweight = { sign_exponent = 0.5 }\n'


def transforms_of(folder, *tables: str):
    (folder / "preset.toml").write_text("".join(tables))
    return read_transforms([str(folder / "preset.toml")], "no model")


def test_numbers_of_transforms_are_found_by_any_end_of_their_name_that_no_other_has(tmp_path):
    transforms = transforms_of(tmp_path, OPTICAL, BITS, FAULTS)
    assert {"transforms.0.photons", "transforms.0.tile", "transforms.1.weight.bits", "probability"} <= numeric_keys(
        transforms.specs
    ).keys()
    axis = read_axis(transforms, "photons", "1,10.5,1e3")
    assert axis.key == "transforms.0.photons"
    assert [variant.specs[0].photons for variant in axis.variants] == [1.0, 10.5, 1000.0]
    assert all(variant.specs[1:] == transforms.specs[1:] for variant in axis.variants)
    tiles = [variant.specs[0].tile for variant in read_axis(transforms, "tile", "64,1e2").variants]
    assert tiles == [64, 100]
    assert all(type(tile) is int for tile in tiles)
    widths = read_axis(transforms, "weight.bits", "2,8").variants
    assert [(one.specs[1].weight.format, one.specs[1].input.format) for one in widths] == [
        ("int2", "int8"),
        ("int8", "int8"),
    ]
    assert (
        read_axis(transforms, "transforms.2.weight.sign_exponent", "0.25").variants[0].specs[2].weight.sign_exponent
        == 0.25
    )
    assert "transforms.0.range_decay" not in numeric_keys(transforms.specs), "acts in training only"


@pytest.mark.parametrize(
    ("tables", "key", "values", "message"),
    [
        ([OPTICAL], "foton", "1", "these transforms have no such number; they have levels, input_levels"),
        ([FAULTS], "photons", "1", "they have sign_exponent, mantissa, zero_above, probability"),
        ([OPTICAL, OPTICAL], "photons", "1", "name transforms.0.photons or transforms.1.photons"),
        ([BITS], "bits", "4", "name transforms.0.weight.bits or transforms.0.input.bits"),
        ([BITS], "weight.bits", "9", "'int9' is no format"),
        ([BITS], "weight.bits", "2.5", "'int2.5' is no format"),
        ([BITS], "weight.group_size", "64", 'group_size needs scale = "group"'),
        ([OPTICAL], "tile", "64,-1", "--values -1: transforms.0.tile = -1\n      expected a value at least 0"),
        ([OPTICAL], "tile", "1.5", "expected a whole number"),
        ([OPTICAL], "photons", "0", "expected a value greater than 0"),
        ([OPTICAL], "photons", "1,inf", "expected finite numbers"),
        ([OPTICAL], "photons", "1,,2", "expected finite numbers"),
        ([OPTICAL], "photons", "1,1.0", "1.0 is there twice"),
        ([FAULTS], "probability", "0", "expected probabilities above 0"),
        ([FAULTS], "probability", "7", "expected a value at most 1"),
        ([FAULTS.replace("sign_exponent = 0.5", "zero_above = 1.0")], "probability", "0.1", "no such number"),
    ],
)
def test_keys_and_values_are_checked_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, tables, key, values, message
):
    transforms_of(tmp_path, *tables)
    (tmp_path / "text.txt").write_text("some text")
    monkeypatch.setattr("evals.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        main(["sweep-noise", "--model", str(tmp_path), "--text", str(tmp_path / "text.txt"), "--key", key, "--values", values,
              "--transforms", str(tmp_path / "preset.toml"), "--out", str(tmp_path / "sweep.json")])  # fmt: skip
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def small(tmp_path):
    """Options for a small random model and its text."""
    model = tmp_path / "model"
    build("llama").save_pretrained(model)
    save_tokenizer(model)
    (tmp_path / "text.txt").write_text(TEXTS["en"] * 3, encoding="utf-8")
    return ["--model", str(model), "--text", str(tmp_path / "text.txt"), "--device", "cpu"]


def test_photons_are_swept_each_point_as_eval_finds_it_with_ranges_of_its_own(small, tmp_path):
    transforms_of(tmp_path, OPTICAL)
    common = [*small, "--transforms", str(tmp_path / "preset.toml"), "--chips", "2"]
    out = tmp_path / "sweep.json"
    main(["sweep-noise", *common, "--key", "photons", "--values", "1,1000", "--out", str(out)])
    for point in json.loads(out.read_text())["points"]:
        transforms_of(tmp_path, OPTICAL.replace("100.0", str(point["value"])))
        main(["eval", *common, "--out", str(tmp_path / "alone.json")])
        alone = json.loads((tmp_path / "alone.json").read_text())
        read = len(
            Tokenizer.from_file(f"{small[1]}/tokenizer.json").encode(TEXTS["en"] * 3, add_special_tokens=False).ids
        )
        assert alone["calibration"] == point["calibration"] == {small[3]: read}
        assert alone["text"][small[3]]["perplexity_per_chip"] == point["perplexity_per_chip"]


def test_a_sweep_goes_on_where_it_was_ended_and_refuses_other_settings(small, tmp_path, monkeypatch, capsys):
    transforms_of(tmp_path, FAULTS.replace("0.5", "0.5, zero_above = 2.0"))
    common = [
        "sweep-noise",
        *small,
        "--transforms",
        str(tmp_path / "preset.toml"),
        "--chips",
        "2",
        "--key",
        "probability",
    ]
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    main([*common, "--values", "1e-3,1e-2,1e-1", "--out", str(whole)])
    measured = chips.text_over_chips
    left = iter([True, False])

    def until_killed(*arguments, **options):
        if not next(left):
            raise KeyboardInterrupt
        return measured(*arguments, **options)

    monkeypatch.setattr("evals.sweep.text_over_chips", until_killed)
    with pytest.raises(SystemExit):
        main([*common, "--values", "1e-3,1e-2,1e-1", "--out", str(part)])
    assert [point["value"] for point in json.loads(part.read_text())["points"]] == [1e-3]
    monkeypatch.setattr("evals.sweep.text_over_chips", measured)
    capsys.readouterr()
    main([*common, "--values", "1e-3,1e-2,1e-1", "--out", str(part)])
    assert json.loads(part.read_text()) == json.loads(whole.read_text())
    printed = capsys.readouterr().out
    assert "goes on behind probability = 0.001" in printed
    assert "probability = 0.001: perplexity" not in printed
    for other, told in (
        (["--chips", "3"], "chips: 2 there, 3 now"),
        (["--noise-seed", "5"], "noise_seed: 1234 there, 5 now"),
        (["--key", "sign_exponent"], 'key: "probability" there, "transforms.0.weight.sign_exponent" now'),
        (["--add-bos", "no"], "protocol: "),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*common, "--values", "1e-1", "--out", str(part), *other])
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("another text, that is long enough")
    with pytest.raises(SystemExit):
        main([*common, "--values", "1e-1", "--out", str(part)])
    assert "sha256: " in capsys.readouterr().err


def test_a_sweep_does_not_go_on_with_another_model_of_the_same_name(small, tmp_path, capsys):
    transforms_of(tmp_path, FAULTS.replace("0.5", "0.5, zero_above = 2.0"))
    common = ["sweep-noise", *small, "--transforms", str(tmp_path / "preset.toml"), "--chips", "1", "--key", "probability",
              "--out", str(tmp_path / "sweep.json")]  # fmt: skip
    main([*common, "--values", "1e-3"])
    build("mistral").save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        main([*common, "--values", "1e-2"])
    assert "the clean model gave other figures there" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(SystemExit):
        main([*common, "--values", "1e-2"])
    assert "is no result to go on with" in capsys.readouterr().err
