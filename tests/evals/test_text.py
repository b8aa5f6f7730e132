"""Perplexity against transformers' own loss under the same protocol, written down independently."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evals.models import load_model
from evals.text import Protocol, choose_protocol, encode, evaluate_text, negative_log_likelihood, protocol_for, windows
from launch.cli import main
from models.hf import HFWeights, shape_from_hf
from models.llama import Llama
from parallel.init import load_weights

CHARACTERS = 30_000
"""A part of a text: about 20 windows, the last one shorter."""


@cache
def transformers_perplexity(folder, text: str, context: int, bos: tuple[int, ...] = ()) -> float:
    """Non-overlapping windows, behind BOS or not, each scored by transformers' own shifted loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    nats, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids), context - len(bos)):
            window = torch.cat([torch.tensor(bos, dtype=torch.int64), ids[start : start + context - len(bos)]])[None]
            if window.shape[1] > 1:
                nats += model(window, labels=window).loss.double().item() * (window.shape[1] - 1)
                count += window.shape[1] - 1
    return math.exp(nats / count)


@pytest.mark.parametrize(
    "characters", [CHARACTERS, pytest.param(10 * CHARACTERS, marks=pytest.mark.slow)], ids=["part", "ten times as much"]
)
def test_perplexity_of_the_pretrained_model_equals_transformers(real_inputs, tmp_path, capsys, characters):
    folder, file = real_inputs / "stories260K", tmp_path / "text.txt"
    text = (real_inputs / "text" / "wikitext-2-valid.txt").read_text(encoding="utf-8")[:characters]
    file.write_text(text, encoding="utf-8")
    of = ["eval", "--model", str(folder), "--text", str(file), "--out", str(tmp_path / "eval.json"), "--device", "cpu"]
    # The model's tokenizer puts BOS before a text by itself.
    for option, bos in (([], (1,)), (["--add-bos", "no"], ())):
        main([*of, *option])
        result = json.loads((tmp_path / "eval.json").read_text())
        expected = {"context": 512, "stride": 512 - len(bos), "first_token_scored": bool(bos), "bos_added": bool(bos)}
        assert result["protocol"] == expected | ({"bos": [1]} if bos else {})
        row = result["text"][str(file)]
        printed = capsys.readouterr().out
        assert f"{row['perplexity']:.4f}" in printed
        assert ("BOS before each window" if bos else "no BOS") in printed
        assert row["perplexity"] == pytest.approx(transformers_perplexity(folder, text, 512, bos), rel=1e-5)


def test_our_model_has_the_perplexity_that_transformers_has(real_inputs):
    folder = real_inputs / "stories260K"
    text = (real_inputs / "text" / "wikitext-2-valid.txt").read_text(encoding="utf-8")[:CHARACTERS]
    shape = shape_from_hf(folder)
    model = Llama(shape)
    load_weights([model], HFWeights(folder).read)
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"])
    nats, count = negative_log_likelihood(model, ids, Protocol(512, 512))
    assert math.exp(nats / count) == pytest.approx(transformers_perplexity(folder, text, 512), rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (5, 4), (100, 100)])
@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 33])
def test_windows_score_each_token_at_most_once_and_overlapping_ones_all(num_tokens, context, stride):
    scored = []
    for begin, end, first in windows(num_tokens, Protocol(context, stride)):
        assert end - begin <= context
        assert first > begin, "the first token of a window has no context"
        scored += range(first, end)
    assert len(scored) == len(set(scored))
    if stride < context:
        assert scored == list(range(1, num_tokens))
    else:
        assert scored == [i for i in range(num_tokens) if i % context]


@pytest.mark.parametrize("stride", [7, 3, 1])
@pytest.mark.parametrize("num_tokens", [2, 7, 8, 33])
def test_behind_bos_every_token_is_scored_once_and_bos_never(num_tokens, stride):
    protocol = Protocol(8, stride, bos=(3,))
    scored = [place for _, end, first in windows(num_tokens, protocol) for place in range(first, end)]
    assert scored == list(range(num_tokens))
    seen = []

    def logits_of(rows):
        assert rows.shape[1] <= 8
        assert (rows[:, 0] == 3).all()
        seen.append(rows)
        return torch.zeros(*rows.shape, 16)

    nats, count = negative_log_likelihood(logits_of, torch.arange(num_tokens) % 16, protocol, batch_size=2)
    assert (nats, count) == (pytest.approx(num_tokens * math.log(16)), num_tokens)


def test_bos_as_lm_eval_has_it(real_inputs, tmp_path):
    """A text of one window has the log-likelihood of lm-eval's rolling windows, and bits per byte of all its tokens."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = load_model(str(real_inputs / "stories260K"), "cpu")
    text = "Once upon a time, there was a small dog. It had a red ball."
    (tmp_path / "text.txt").write_text(text)
    # Left to itself, lm-eval has the tokenizer add another BOS behind its own, and counts it as predicted.
    wrapped = HFLM(
        pretrained=model.model, tokenizer=model.tokenizer, batch_size=1, max_length=model.context, add_bos_token=False
    )
    (expected,) = wrapped.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    row = evaluate_text(model, [tmp_path / "text.txt"], protocol_for(model, None, None, None, "auto"))
    (row,) = row.values()
    assert row["tokens"] == len(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert row["bits_per_byte"] == pytest.approx(-expected / math.log(2) / len(text.encode()), rel=1e-5)
    assert (
        evaluate_text(model, [tmp_path / "text.txt"], protocol_for(model, None, None, None))[
            str(tmp_path / "text.txt")
        ]["tokens"]
        == row["tokens"] - 1
    ), "without BOS by default"


def test_whether_bos_is_added(real_inputs):
    model = load_model(str(real_inputs / "stories260K"), "cpu")
    assert protocol_for(model, None, None, None) == choose_protocol(512, None, None) == Protocol(512, 512)
    assert protocol_for(model, None, None, None, "auto").bos == protocol_for(model, None, None, None, "yes").bos == (1,)

    class NoBos:
        bos_token_id = None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [5, 9] if add_special_tokens is False or self.shows else [6, 2]}

    without = replace(model, tokenizer=NoBos())
    NoBos.shows = True
    assert protocol_for(without, None, None, None, "auto").bos == ()
    with pytest.raises(ValueError, match="has no BOS token"):
        protocol_for(without, None, None, None, "yes")
    NoBos.shows = False
    with pytest.raises(ValueError, match="give --add-bos yes or no"):
        protocol_for(without, None, None, None, "auto")
    for option in ("yes", "no"):
        with pytest.raises(ValueError, match="masked encoder"):
            protocol_for(replace(model, masked=True), None, None, None, option)


def test_batches_of_windows_do_not_change_the_sum():
    table = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 16, (203,), generator=torch.Generator().manual_seed(1))
    by_hand = -table.log_softmax(-1)[ids[:-1], ids[1:]]
    for stride in (10, 4):
        for batch_size in (1, 3, 50):
            nats, count = negative_log_likelihood(lambda rows: table[rows], ids, Protocol(10, stride), batch_size)
            keep = [i - 1 for b, e, f in windows(203, Protocol(10, stride)) for i in range(f, e)]
            assert count == len(keep)
            assert nats == pytest.approx(float(by_hand[keep].double().sum()), rel=1e-5)


def test_default_window_is_the_context_but_at_most_512():
    assert choose_protocol(2048, None, None) == Protocol(512, 512)
    assert choose_protocol(128, None, None) == Protocol(128, 128)
    assert choose_protocol(2048, 1024, 256) == Protocol(1024, 256)
    with pytest.raises(ValueError, match="--stride 9"):
        choose_protocol(2048, 8, 9)
    with pytest.raises(ValueError, match="--context 1"):
        choose_protocol(2048, 1, None)


def test_bits_per_byte_of_a_run_follow_from_its_losses(run_here, tmp_path):
    run_here(training__stop_after=5)
    text = "for i in range(10):\n    print(i)\n" * 20
    (tmp_path / "text.txt").write_text(text)
    model = load_model(str(tmp_path / "run"), device="cpu")
    assert model.context == 64
    row = evaluate_text(model, [tmp_path / "text.txt"], choose_protocol(model.context, None, None))[
        str(tmp_path / "text.txt")
    ]
    # One byte is one token here, so the two figures are two spellings of one number.
    assert row["bits_per_byte"] == pytest.approx(math.log2(row["perplexity"]))
    assert row["tokens"] == len(text) - -(-len(text) // 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "/no/such/file"], "No such file"),
        (["--tasks", "no_such_task"], "lm-eval knows no no_such_task"),
        ([], "nothing to evaluate"),
        (["--tasks", "no/such/task.yaml"], "no/such/task.yaml: no such file"),
        (["--tasks", "arc_easy", "--include-path", "no/such"], "--include-path no/such: no such folder"),
        (["--tasks", "arc_easy", "--context", "64"], "--context: no text"),
        (["--tasks", "arc_easy", "--add-bos", "yes"], "--add-bos: no text"),
        (["--text", __file__, "--limit", "3"], "--limit: no tasks"),
    ],
)
def test_bad_requests_are_refused_before_a_model_is_loaded(
    real_inputs, task_index, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr("evals.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--model", str(real_inputs / "stories260K"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--model", str(tmp_path), "--text", __file__])
    assert stopped.value.code == 2
    assert "neither a run, a checkpoint nor a Hugging Face folder" in capsys.readouterr().err


@pytest.mark.parametrize("reference", ["./nope", "outputs/nope", "a/b/c", "{here}/nope", "~/nope"])
def test_a_path_to_nothing_is_no_name_on_the_hub(tmp_path, capsys, reference):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--model", reference.format(here=tmp_path), "--text", __file__])
    assert stopped.value.code == 2
    assert "nope: no such folder" in capsys.readouterr().err.replace("a/b/c:", "nope:")


def test_a_model_without_its_tokenizer_is_said_to_be_one(real_inputs, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(real_inputs / "stories260K" / name, tmp_path)
    with pytest.raises(ValueError, match=r"there is no tokenizer in this folder, none of tokenizer\.json"):
        load_model(str(tmp_path), "cpu")
    shutil.copy(real_inputs / "stories260K" / "tokenizer_config.json", tmp_path)
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded, are all of its files there"):
        load_model(str(tmp_path), "cpu")


def test_a_model_in_bfloat16_keeps_its_rotary_frequencies(real_inputs):
    from models.llama import rope_frequencies

    model = load_model(str(real_inputs / "stories260K"), "cpu", "bfloat16").model
    assert model.dtype == torch.bfloat16
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, rope_frequencies(shape_from_hf(real_inputs / "stories260K")))


class Bytes:
    """A tokenizer of bytes."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_a_byte_order_mark_is_no_text_and_other_encodings_are_refused(tmp_path):
    model: Any = SimpleNamespace(tokenizer=Bytes(), model=SimpleNamespace(device="cpu"))
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfna\xc3\xafve")
    ids, length = encode(model, file)
    assert (bytes(ids.tolist()), length) == (b"na\xc3\xafve", 6)
    for data, message in (
        (b"na\xefve", "text.txt: not UTF-8 from byte 2 on"),
        ("text".encode("utf-16"), "text.txt is UTF-16, by its byte order mark: convert it to UTF-8"),
        ("text".encode("utf-16-le"), "text.txt is no UTF-8, many of its bytes are zero"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            encode(model, file)
