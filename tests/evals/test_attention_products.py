"""Hardware effects on the attention products of transformers models, and the ranges that they need."""

from __future__ import annotations

import json

import pytest
import torch
from families import CONFIGS, ENCODERS, build, save_tokenizer
from safetensors.torch import load_file

from evals.noise import NoisyModel
from launch.cli import main
from transforms.apply import TransformError
from transforms.specs import OpticalSpec, Quantised, QuantiseSpec

OPTICAL = OpticalSpec(kind="optical", levels=64)
INT4 = QuantiseSpec(kind="quantise", attention=Quantised(format="int4"))
FAMILIES = [name for name in CONFIGS if name != "bloom"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def texts(count: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(5, 90, (count, length), generator=torch.Generator().manual_seed(5))


def calibrated(model, spec, ids=None) -> NoisyModel:
    noisy = NoisyModel(model, [spec], seed=3)
    noisy.calibrating()
    with torch.no_grad():
        model(texts(4) if ids is None else ids)
    noisy.noise.end_step()
    noisy.chip(1)
    return noisy


@every_family
@torch.no_grad()
def test_every_family_has_its_products_converted_and_is_restored(family):
    model = build(family)
    ids = texts()
    clean, usual = model(ids).logits, model.config._attn_implementation
    noisy = calibrated(model, OPTICAL)
    (row,) = noisy.noise.applied
    assert len(row.attentions) == 2
    with noisy.clean():
        torch.testing.assert_close(model(ids).logits, clean, rtol=1e-4, atol=1e-5)
    found = model(ids).logits
    assert torch.isfinite(found).all()
    error = (found - clean).norm() / clean.norm()
    assert 0.002 < error < 0.8
    # Without noise in the products something else comes out: they are not left as they were.
    noisy.detach()
    assert model.config._attn_implementation == usual
    assert torch.equal(model(ids).logits, clean)
    linear = calibrated(model, OPTICAL.model_copy(update={"attention": False}))
    assert not torch.equal(model(ids).logits, found)
    linear.detach()


@every_family
@torch.no_grad()
def test_noise_does_not_depend_on_batch_or_padding(family):
    model = build(family)
    calibrated(model, OPTICAL)
    rows = texts(3)
    together = model(rows, attention_mask=torch.ones_like(rows)).logits
    pads = torch.ones(3, 4, dtype=torch.int64)
    mask = torch.cat([torch.zeros_like(pads), torch.ones_like(rows)], 1)
    places = (
        {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        if family in ("llama", "mistral", "gpt2", "gpt_neox")
        else {}
    )
    for i in range(3):
        alone = model(rows[i : i + 1], attention_mask=torch.ones_like(rows[i : i + 1])).logits
        close(alone[0], together[i])
    if family in ENCODERS:
        after = model(torch.cat([rows, pads], 1), attention_mask=mask.flip(1)).logits[:, :-4]
    else:
        after = model(torch.cat([pads, rows], 1), attention_mask=mask, **places).logits[:, 4:]
    close(after, together)


def close(found, expected):
    """But for a level here and there, where sums differ in the last place."""
    far = (found - expected).abs() > 1e-3 * expected.abs().max()
    assert far.float().mean() < 0.05, f"{far.float().mean():.3f} of the logits differ"


@torch.no_grad()
def test_later_tokens_change_nothing_before_them_and_a_cache_changes_nothing():
    model = build("llama")
    calibrated(model, OPTICAL)
    ids = texts(1, 16)
    other = ids.clone()
    other[:, 10:] += 1
    whole = model(ids).logits
    assert torch.equal(whole[:, :10], model(other).logits[:, :10])
    first = model(ids[:, :7], use_cache=True)
    close(model(ids[:, 7:], past_key_values=first.past_key_values).logits, whole[:, 7:])


@torch.no_grad()
def test_products_of_few_bits_against_a_hand_computation():
    """int4 queries, keys and values per head of a token; probabilities of 16 levels: Llama's attention written out."""
    model = build("llama")
    noisy = NoisyModel(model, [INT4], seed=0)
    noisy.chip(1)
    attention = model.model.layers[0].self_attn
    assert not noisy.noise.applied[0].layers
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    cos, sin = model.model.rotary_emb(x, torch.arange(6)[None])
    noisy.noise.begin(0, 0, x.device)
    noisy.noise.keys = None
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    found, _ = attention(x, position_embeddings=(cos, sin), attention_mask=mask)

    def heads(projected, count):
        return projected.view(2, 6, count, 8).transpose(1, 2)

    def turned(value):
        first, second = value.chunk(2, -1)
        return value * cos + torch.cat([-second, first], -1) * sin

    def int4(value):
        scale = value.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 7
        return torch.round(value / scale).clamp(-7, 7) * scale

    q, k = int4(turned(heads(attention.q_proj(x), 4))), int4(turned(heads(attention.k_proj(x), 2)))
    v = int4(heads(attention.v_proj(x), 2)).repeat_interleave(2, 1)
    probabilities = torch.softmax(q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5 + mask, -1)
    expected = (torch.round(probabilities * 15) / 15) @ v
    expected = attention.o_proj(expected.transpose(1, 2).reshape(2, 6, 32))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_attention_that_cannot_be_reached_is_refused():
    model = build("bloom")
    with pytest.raises(TransformError, match="no port for effects on its products: set attention = false"):
        NoisyModel(model, [OPTICAL], seed=0)
    NoisyModel(model, [OPTICAL.model_copy(update={"attention": False})], seed=0)


def test_calibrate_and_evaluate_by_command(tmp_path, capsys):
    model, text, preset = tmp_path / "model", tmp_path / "text.txt", tmp_path / "optical.toml"
    build("llama").save_pretrained(model)
    save_tokenizer(model)
    text.write_text("The old mill stood by the river, and the wheel began to turn. " * 8, encoding="utf-8")
    preset.write_text('[[transforms]]\nkind = "optical"\n', encoding="utf-8")
    ranges, out = tmp_path / "ranges.safetensors", tmp_path / "out.json"
    common = ["--model", str(model), "--transforms", str(preset), "--text", str(text)]
    with pytest.raises(SystemExit) as error:
        main(["eval", *common[:4], "--tasks", "arc_easy"])
    assert error.value.code == 2
    assert "fit them with newcompute calibrate" in capsys.readouterr().err
    main(["calibrate", *common, "--out", str(ranges)])
    assert len(load_file(ranges)) == 2 * (7 * 2 + 5)  # input and sums of 7 layers; q, k, v and two products
    main(["eval", *common, "--chips", "2", "--ranges", str(ranges), "--out", str(out)])
    (found,) = json.loads(out.read_text())["text"].values()
    assert found["non_finite_chips"] == 0
    assert found["perplexity_per_chip"][0] != found["perplexity_per_chip"][1]
    assert found["perplexity"] == pytest.approx(found["perplexity_clean"], rel=0.1)
    preset.write_text('[[transforms]]\nkind = "quantise"\nweight = { format = "int8" }\n', encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["calibrate", *common, "--out", str(ranges)])
    assert "have no ranges to calibrate" in capsys.readouterr().err


@torch.no_grad()
def test_a_sliding_window_cache_changes_nothing():
    model = build("mistral")  # a window of 6
    calibrated(model, OPTICAL)
    ids = texts(1, 20)
    whole = model(ids).logits
    past, found = None, []
    for i in range(20):
        out = model(ids[:, i : i + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits)
    close(torch.cat(found, 1), whole)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The old mill stood by the river, and the wheel began to turn. " * 4, encoding="utf-8")
    return file


def test_an_encoder_is_calibrated_and_evaluated(tmp_path, text):
    model, preset, out = tmp_path / "model", tmp_path / "optical.toml", tmp_path / "out.json"
    build("bert").save_pretrained(model)
    save_tokenizer(model)
    preset.write_text('[[transforms]]\nkind = "optical"\n', encoding="utf-8")
    common = ["--model", str(model), "--transforms", str(preset), "--text", str(text)]
    main(["calibrate", *common, "--out", str(tmp_path / "ranges.safetensors")])
    main(["eval", *common, "--chips", "1", "--ranges", str(tmp_path / "ranges.safetensors"), "--out", str(out)])
    (found,) = json.loads(out.read_text())["text"].values()
    assert found["perplexity"] == pytest.approx(found["perplexity_clean"], rel=0.1)
    assert found["perplexity"] != found["perplexity_clean"]


def test_clean_is_without_what_the_transforms_add(tmp_path, text):
    """Of a model that was not trained with it, BitNet's norm is a part of the hardware."""
    model, preset, out = tmp_path / "model", tmp_path / "bitnet.toml", tmp_path / "out.json"
    build("llama").save_pretrained(model)
    save_tokenizer(model)
    preset.write_text(
        '[[transforms]]\nkind = "quantise"\nweight = { format = "ternary" }\nnorm = true\n', encoding="utf-8"
    )
    common = ["eval", "--model", str(model), "--text", str(text), "--out", str(out)]
    main(common)
    (plain,) = json.loads(out.read_text())["text"].values()
    main([*common, "--transforms", str(preset)])
    result = json.loads(out.read_text())
    (found,) = result["text"].values()
    assert found["perplexity_clean"] == pytest.approx(plain["perplexity"], rel=1e-6)
    assert found["perplexity"] != pytest.approx(plain["perplexity"], rel=1e-2)
    assert result["chips"] == len(found["perplexity_per_chip"]) == 1


def test_a_sweep_keeps_the_ranges_of_other_transforms(tmp_path, text):
    model, preset, ranges = tmp_path / "model", tmp_path / "both.toml", tmp_path / "ranges.safetensors"
    build("llama").save_pretrained(model)
    save_tokenizer(model)
    optical = '[[transforms]]\nkind = "optical"\nattention = false\n'
    preset.write_text(optical + '[[transforms]]\nkind = "bitflip"\nweight = { mantissa = 0.1 }\n', encoding="utf-8")
    common = ["--model", str(model), "--transforms", str(preset), "--text", str(text)]
    main(["calibrate", *common, "--out", str(ranges)])
    out = tmp_path / "sweep.json"
    main(
        [
            "sweep-noise",
            *common,
            "--ranges",
            str(ranges),
            "--key",
            "probability",
            "--values",
            "1e-3,1e-1",
            "--chips",
            "2",
            "--out",
            str(out),
        ]
    )
    points = json.loads(out.read_text())["points"]
    assert len(points) == 2
    assert points[1]["perplexity"] != points[0]["perplexity"]


def test_patterns_do_not_hide_an_attention_that_cannot_be_reached():
    with pytest.raises(TransformError, match="no port"):
        NoisyModel(build("bloom"), [OPTICAL.model_copy(update={"modules": ["transformer.h.*"]})], seed=0)
