"""Damage by language: every family of models against a plain loop over transformers, and the disparity by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import (
    CONFIGS,
    CONTEXT,
    ENCODERS,
    PAD,
    TEXTS,
    VOCABULARY,
    build,
    save_tokenizer,
)

from evals.chips import TransformList, Trials, text_over_chips
from evals.languages import FIGURES, describe, disparity, draw, languages_over_chips, read_languages
from evals.masked import MaskedProtocol, choose_masked_protocol, passes, surroundings
from evals.models import is_masked, load_model
from evals.noise import NoisyModel, token_noise
from evals.text import choose_protocol, evaluate_text, protocol_for
from launch.cli import main
from transforms.selection import TransformError
from transforms.specs import BitflipSpec, CellFaults

OF_LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
OF_OPT = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"]
OF_BERT = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
           "intermediate.dense", "output.dense"]  # fmt: skip
OF_NEOX = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
LAYERS = {
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], 8),
    "opt": ("model.decoder.layers", OF_OPT, 12),
    "opt350m": ("model.decoder.layers", OF_OPT, 12),
    "gpt_neox": ("gpt_neox.layers", OF_NEOX, 8),
    "bloom": ("transformer.h", ["self_" + OF_NEOX[0], "self_" + OF_NEOX[1], *OF_NEOX[2:]], 8),
    "llama": ("model.layers", OF_LLAMA, 14),
    "mistral": ("model.layers", OF_LLAMA, 14),
    "bert": ("bert.encoder.layer", OF_BERT, 12),
    "xlmr": ("roberta.encoder.layer", OF_BERT, 12),
}  # fmt: skip
"""Family -> (name of its blocks, the linear layers of one, how many the two blocks have)."""
SIGNS = CellFaults(bits=[0.05] + [0.0] * 31)
"""Sign flips of float32 words: heavy noise that is continuous in the value, so that rounding differences stay small."""
NOISE = BitflipSpec(kind="bitflip", storage="float32", weight=SIGNS, input=SIGNS, output=SIGNS)

every_family = pytest.mark.parametrize("family", CONFIGS)
MOST_ALIKE = ("xlmr", "mistral", "opt350m", "gpt_neox")
"""Close relatives of other families: slow where every family is evaluated in full."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """family -> a Hugging Face folder of it."""
    parent = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        path = parent / family
        if not path.exists():
            build(family).save_pretrained(path)
            save_tokenizer(path)
        return path

    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.txt" for name in TEXTS}


def plain_nats(folder: Path, text: str) -> tuple[float, int]:
    """Summed nats and the number of scored tokens by a loop over transformers' own loss, one row at a time.

    Decoders: windows that do not overlap, their first token unscored. Encoders: each window is read five times, with
    the places of one residue modulo 5 masked and scored.
    """
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    nats, count = 0.0, 0
    with torch.no_grad():
        if folder.name not in ENCODERS:
            model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
            for begin in range(0, len(ids), 20):
                window = torch.tensor([ids[begin : begin + 20]])
                scored = window.shape[1] - 1
                nats += float(model(window, labels=window).loss) * scored if scored else 0.0
                count += scored
            return nats, count
        model = hf.AutoModelForMaskedLM.from_pretrained(folder).eval()
        for begin in range(0, len(ids), 18):
            window = [0, *ids[begin : begin + 18], 2]
            for place in range(1, min(5, len(window) - 2) + 1):
                hidden = [0 < j < len(window) - 1 and (j - place) % 5 == 0 for j in range(len(window))]
                row = [4 if hide else token for hide, token in zip(hidden, window)]
                labels = [token if hide else -100 for hide, token in zip(hidden, window)]
                loss = model(torch.tensor([row]), labels=torch.tensor([labels])).loss
                nats += float(loss) * sum(hidden)
                count += sum(hidden)
    return nats, count


def protocol_of(model):
    return protocol_for(model, 20, None, 5 if model.masked else None)


@every_family
def test_default_layers_are_those_counted_by_hand(family):
    noisy = NoisyModel(build(family), [NOISE], seed=3)
    blocks, layers, count = LAYERS[family]
    (applied,) = noisy.noise.applied
    assert set(applied.layers) == {f"{blocks}.{i}.{layer}" for i in range(2) for layer in layers}
    assert len(applied.layers) == count


@torch.no_grad()
def test_projections_of_embeddings_are_transformed_where_they_are_named():
    model = build("opt350m")
    ids = torch.arange(5, 17)[None]
    clean = model(ids).logits
    noisy = NoisyModel(model, [NOISE.model_copy(update={"modules": ["*.project_*"]})], seed=3)
    assert set(noisy.noise.applied[0].layers) == {"model.decoder.project_in", "model.decoder.project_out"}
    noisy.chip(1)
    assert (model(ids).logits - clean).abs().amax() > 0.01


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] if name in MOST_ALIKE else []) for name in CONFIGS]
)
def test_clean_figures_are_those_of_a_plain_loop_and_noise_does_not_depend_on_the_batch(family, folder_of, files):
    model = load_model(str(folder_of(family)), "cpu")
    assert model.masked == (family in ENCODERS)
    noisy = TransformList([NOISE], [""]).attach(model)
    some = [files["en"], files["hi"]]
    alone, together = (
        text_over_chips(model, noisy, Trials("chip", 2), some, protocol_of(model), batch_size) for batch_size in (2, 16)
    )
    for name in ("en", "hi"):
        row = alone[str(files[name])]
        nats, count = plain_nats(folder_of(family), TEXTS[name])
        tokens = len(model.tokenizer(TEXTS[name], add_special_tokens=False)["input_ids"])
        assert row["tokens"] == count
        assert row["perplexity_clean"] == pytest.approx(math.exp(nats / count), rel=1e-4)
        per_byte = nats / count * tokens / len(TEXTS[name].encode())
        assert row["bits_per_byte_clean"] == pytest.approx(per_byte / math.log(2), rel=1e-5)
        if model.masked:
            assert count == tokens, "every token is scored"
        chips = row["bits_per_byte_per_chip"]
        assert chips == pytest.approx(together[str(files[name])]["bits_per_byte_per_chip"], rel=1e-5)
        for chip in chips:
            assert abs(chip / row["bits_per_byte_clean"] - 1) > 1e-4, "and there is noise"
        assert chips[0] != pytest.approx(chips[1], rel=1e-4), "a chip is not the other"


@pytest.mark.parametrize("left", [True, False])
@every_family
@torch.no_grad()
def test_padding_changes_no_noise(family, left):
    model = build(family)
    noisy = NoisyModel(model, [NOISE], seed=3)
    noisy.chip(1)
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in (11, 7, 9)]
    ids, mask = torch.full((3, 11), PAD), torch.zeros(3, 11, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(11 - len(row), 11) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    # ALiBi takes the positions from the mask, XLM-R from the pads.
    given = {} if family in ("bloom", "xlmr") else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    batch = model(ids, attention_mask=mask, **given).logits
    for i, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(batch[i, mask[i] == 1], alone, rtol=1e-4, atol=1e-4)
        with noisy.clean():
            assert (model(row[None]).logits[0] - alone).abs().amax() > 0.01, "and there is noise"


@every_family
@torch.no_grad()
def test_removal_restores_the_model(family):
    model = build(family)
    ids = torch.arange(5, 17)[None]
    before, kinds = model(ids).logits, [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    noisy = NoisyModel(model, [NOISE], seed=3)
    noisy.chip(1)
    assert not torch.equal(model(ids).logits, before)
    noisy.detach()
    assert torch.equal(model(ids).logits, before)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_bloom_that_multiplies_in_slices_is_refused():
    config = CONFIGS["bloom"]()
    config.slow_but_exact, config.pretraining_tp = True, 2
    with pytest.raises(TransformError, match="dense: the effect on its inputs never acted"):
        NoisyModel(hf.AutoModelForCausalLM.from_config(config), [NOISE], seed=3)


def test_a_mask_changes_the_noise_from_its_place_on():
    ids = torch.arange(5, 25)[None]
    masked = ids.clone()
    masked[0, 8] = 4
    (_, samples), (_, changed) = token_noise(ids), token_noise(masked)
    assert torch.equal(samples[:, :8], changed[:, :8])
    assert (samples[:, 8:] != changed[:, 8:]).all()


@pytest.mark.parametrize("every", [2, 5, 7, 100])
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 18, 19, 40])
def test_passes_mask_each_token_once(num_tokens, every):
    found = []
    for begin, end, first in passes(num_tokens, MaskedProtocol(20, 2, every)):
        assert end - begin <= 18
        masked = range(begin + first, end, every)
        assert len(masked) == 1 or every < 18
        found += masked
    assert sorted(found) == list(range(num_tokens))


def test_windows_of_an_encoder_stand_between_its_special_tokens(folder_of):
    model = load_model(str(folder_of("xlmr")), "cpu")
    around = surroundings(model.tokenizer)
    assert (around.before.tolist(), around.after.tolist(), around.mask) == ([0], [2], 4)
    assert model.context == CONTEXT, "positions begin behind the pad token's index"
    model.model(torch.arange(5, 5 + CONTEXT)[None])
    with pytest.raises((IndexError, RuntimeError)):
        model.model(torch.arange(5, 6 + CONTEXT)[None])
    assert choose_masked_protocol(model, None, None) == MaskedProtocol(CONTEXT, 2, 7)
    for options, message in (((3, None), "--context 3"), ((25, None), "--context 25"), ((None, 1), "--mask-every 1")):
        with pytest.raises(ValueError, match=message):
            choose_masked_protocol(model, *options)
    with pytest.raises(ValueError, match="--stride"):
        protocol_for(model, None, 4, None)
    with pytest.raises(ValueError, match="not the protocol"):
        evaluate_text(model, [], choose_protocol(CONTEXT, None, None))


def test_which_configs_are_masked_encoders():
    named = {"BertLMHeadModel": False, "BertForMaskedLM": True, "BertForPreTraining": True, "BertModel": True}
    for name, expected in named.items():
        assert is_masked(hf.BertConfig(architectures=[name])) == expected, name
    assert is_masked(hf.BertConfig())
    assert not is_masked(hf.BertConfig(is_decoder=True))
    assert not is_masked(hf.GPT2Config())
    assert not is_masked(hf.BartConfig())


def test_an_encoder_without_a_head_is_refused(tmp_path):
    hf.BertModel(CONFIGS["bert"]()).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no weights for cls\.predictions.*random"):
        load_model(str(tmp_path), "cpu")


def test_disparity_by_hand():
    found = disparity({"en": [0.05, 0.35], "hi": [0.5, 0.7], "zh": [0.3, 0.3]})
    assert (found["worst"], found["best"], found["chips"]) == ("hi", "en", 2)
    assert found["ratio"] == pytest.approx(0.6 / 0.2)
    assert found["ratio_per_chip"] == pytest.approx([10.0, 0.7 / 0.3])
    assert found["undefined"] is None
    assert "en's degradation is less than 2 standard errors from 0" in found["note"], (
        "0.2, with a standard error of 0.15"
    )
    assert "2.333 to 10.000 on single chips" in describe(found)


@pytest.mark.parametrize(
    ("degradations", "reason"),
    [
        ({"en": [-0.1, 0.05], "hi": [0.5, 0.7]}, r"en does not degrade \(-2.500%\)"),
        ({"en": [0.0], "hi": [0.5]}, r"en does not degrade \(\+0.000%\)"),
        ({"en": [0.0], "hi": [0.0]}, "does not degrade"),
        ({"en": [0.1]}, "two languages"),
        ({"en": [0.1, None], "hi": [None, 0.2]}, "no chip is finite in every language"),
    ],
)
def test_a_disparity_that_means_nothing_is_undefined(degradations, reason):
    import re

    found = disparity(degradations)
    assert found["ratio"] is None
    assert re.search(reason, found["undefined"])
    assert "undefined" in describe(found)


def test_chips_that_break_in_one_language_count_in_none():
    found = disparity({"en": [0.1, 0.1, 9.0], "hi": [0.3, 0.3, None]})
    assert found["ratio"] == pytest.approx(3.0)
    assert (found["chips"], found["ratio_per_chip"][2]) == (2, None)
    assert found["note"] == "1 of 3 chips left out, not finite in hi"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small GPT-2 that has learnt the texts, so that noise can only do harm."""
    folder = tmp_path_factory.mktemp("trained")
    save_tokenizer(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = []
    for text in TEXTS.values():
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        rows += [ids[i : i + CONTEXT] for i in range(0, len(ids) - CONTEXT, 8)]
    for _ in range(60):
        batch = torch.stack(rows)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


FAULTS = '[noise]\nseed = 7\n[[transforms]]\nkind = "bitflip"\nweight = { sign_exponent = 0.01, zero_above = 1.25 }\n'


def test_the_command_reports_what_text_over_chips_finds(trained, files, tmp_path, capsys):
    (tmp_path / "faults.toml").write_text(FAULTS)
    common = ["--model", str(trained), "--transforms", str(tmp_path / "faults.toml"), "--chips", "3", "--device", "cpu"]
    languages = [part for name, file in files.items() for part in ("--language", f"{name}={file}")]
    out, plot = tmp_path / "eval.json", tmp_path / "plots" / "damage.svg"
    main(["eval", *common, *languages, "--out", str(out), "--plot", str(plot)])
    printed = capsys.readouterr().out
    main(["eval", *common, "--text", *map(str, files.values()), "--out", str(tmp_path / "text.json")])
    found, texts = (json.loads(file.read_text()) for file in (out, tmp_path / "text.json"))
    assert list(found["languages"]) == list(TEXTS)
    means = {}
    for name, row in found["languages"].items():
        text = texts["text"][str(files[name])]
        assert row["file"] == str(files[name])
        assert {key: row[key] for key in text} == text
        rises = [value / text["bits_per_byte_clean"] - 1 for value in text["bits_per_byte_per_chip"]]
        ratios = [value / text["perplexity_clean"] for value in text["perplexity_per_chip"]]
        assert row["degradation_per_chip"] == pytest.approx(rises)
        assert row["perplexity_ratio_per_chip"] == pytest.approx(ratios)
        assert row["nats_rise_per_chip"] == pytest.approx([math.log(ratio) for ratio in ratios])
        for figure in FIGURES:
            values = row[f"{figure}_per_chip"]
            mean = sum(values) / 3
            assert row[figure] == pytest.approx(mean)
            assert row[f"{figure}_std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 2))
        means[name] = sum(rises) / 3
        assert means[name] > 0.01
    best, worst = min(means, key=means.get), max(means, key=means.get)
    disparity = found["disparity"]
    assert (disparity["best"], disparity["worst"], disparity["chips"]) == (best, worst, 3)
    assert disparity["ratio"] == pytest.approx(means[worst] / means[best])
    assert f"disparity ratio {disparity['ratio']:.3f}: {worst} degrades most, {best} least" in printed
    drawn = plot.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in drawn for name in TEXTS), "a label for every language"


def test_an_encoder_through_the_command(folder_of, files, tmp_path, capsys):
    (tmp_path / "faults.toml").write_text(FAULTS)
    out = tmp_path / "eval.json"
    main(["eval", "--model", str(folder_of("bert")), "--transforms", str(tmp_path / "faults.toml"), "--chips", "1",
          "--language", f"en={files['en']}", "--language", f"zh={files['zh']}", "--context", "20", "--mask-every", "5",
          "--device", "cpu", "--out", str(out)])  # fmt: skip
    found = json.loads(out.read_text())
    assert found["protocol"] == {"context": 20, "special_tokens": 2, "mask_every": 5}
    assert "every 5th masked at a time" in capsys.readouterr().out
    for name in ("en", "zh"):
        nats, count = plain_nats(folder_of("bert"), TEXTS[name])
        row = found["languages"][name]
        assert row["perplexity_clean"] == pytest.approx(math.exp(nats / count), rel=1e-4)
        assert (row["degradation_std"], len(row["degradation_per_chip"])) == (None, 1)
    main(["eval", "--model", str(folder_of("bert")), "--text", str(files["en"]), "--device", "cpu", "--out", str(out)])
    assert json.loads(out.read_text())["protocol"]["mask_every"] == 7


def test_a_language_that_breaks_every_chip_is_null_and_drawn(trained, files, tmp_path):
    model = load_model(str(trained), "cpu")
    spec = BitflipSpec(kind="bitflip", weight=CellFaults(sign_exponent=0.05))
    noisy = TransformList([spec], [""]).attach(model)
    texts = {name: files[name] for name in ("en", "zh")}
    found = languages_over_chips(model, noisy, Trials("chip", 2), texts, protocol_of(model))
    json.dumps(found, allow_nan=False)
    for row in found["languages"].values():
        assert (row["degradation"], row["non_finite_chips"]) == (None, 2)
    assert found["disparity"]["undefined"] == "no chip is finite in every language"
    draw({"model": "m", **found}, tmp_path / "damage.png")
    assert (tmp_path / "damage.png").read_bytes()[:4] == b"\x89PNG"


def test_a_clean_model_that_is_not_finite_is_refused(trained, files):
    model = load_model(str(trained), "cpu")
    with torch.no_grad():
        model.model.transformer.ln_f.weight.fill_(math.nan)
    noisy = TransformList([NOISE], [""]).attach(model)
    with pytest.raises(ValueError, match="nan bits per byte without hardware effects"):
        languages_over_chips(model, noisy, Trials("chip", 1), {"en": files["en"]}, protocol_of(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--language", "en={en}"], "compares a model under hardware effects"),
        (
            ["--language", "en={en}", "--transforms", "{t}", "--mode", "clean"],
            "compares a model under hardware effects",
        ),
        (["--language", "{en}", "--transforms", "{t}"], "expected NAME=FILE"),
        (["--language", "en={en}", "--language", "en={zh}", "--transforms", "{t}"], "en has a text already"),
        (["--language", "en={en}", "--language", "zh={en}", "--transforms", "{t}"], "the text of another language"),
        (["--language", "en=/no/such/file", "--transforms", "{t}"], "No such file"),
        (
            ["--language", "en={en}", "--transforms", "{t}", "--plot", "damage.xyz"],
            "--plot damage.xyz: expected a name",
        ),
        (["--text", "{en}", "--plot", "damage.png"], "--plot draws what --language"),
        (["--text", "{en}", "--mask-every", "3"], "is a decoder"),
    ],
)
def test_bad_requests_are_refused(trained, files, tmp_path, capsys, arguments, message):
    (tmp_path / "faults.toml").write_text(FAULTS)
    given = [part.format(en=files["en"], zh=files["zh"], t=tmp_path / "faults.toml") for part in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--model", str(trained), "--device", "cpu", *given])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_encoder_generates_nothing_and_has_no_tasks(folder_of, capsys, monkeypatch):
    monkeypatch.setattr("evals.tasks.find_tasks", lambda *_: None)  # reading lm-eval's index takes long
    folder = str(folder_of("bert"))
    for command in (["generate", "--prompt", "The"], ["eval", "--tasks", "arc_easy"]):
        with pytest.raises(SystemExit) as stopped:
            main([command[0], "--model", folder, *command[1:], "--device", "cpu"])
        assert stopped.value.code == 2
        assert "is a masked encoder" in capsys.readouterr().err


def test_names_may_hold_anything_but_the_equals_sign(tmp_path):
    (tmp_path / "a=b.txt").write_text("x")
    assert read_languages([f"Ελληνικά={tmp_path}/a=b.txt"]) == {"Ελληνικά": tmp_path / "a=b.txt"}
