"""Perplexity against transformers' own loss under the same protocol, written down independently."""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import torch

from evals.models import load_model
from evals.text import Protocol, choose_protocol, evaluate_text, negative_log_likelihood, windows
from launch.cli import main
from models.hf import HFWeights, shape_from_hf
from models.llama import Llama
from parallel.init import load_weights

CHARACTERS = 30_000
"""A part of a text: about 20 windows, the last one shorter."""


@cache
def transformers_perplexity(folder, text: str, context: int) -> float:
    """Non-overlapping windows, each scored by transformers' own shifted loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    nats, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids), context):
            window = ids[None, start : start + context]
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
    main(["eval", "--model", str(folder), "--text", str(file), "--out", str(tmp_path / "eval.json"), "--device", "cpu"])
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["protocol"] == {"context": 512, "stride": 512, "first_token_scored": False, "bos_added": False}
    row = result["text"][str(file)]
    assert f"{row['perplexity']:.4f}" in capsys.readouterr().out
    expected = transformers_perplexity(folder, text, 512)
    assert row["perplexity"] == pytest.approx(expected, rel=1e-5)


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
    ],
)
def test_bad_requests_are_refused(real_inputs, task_index, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--model", str(real_inputs / "stories260K"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--model", str(tmp_path), "--text", __file__])
    assert stopped.value.code == 2
    assert "neither a run, a checkpoint nor a Hugging Face folder" in capsys.readouterr().err


def test_a_model_in_bfloat16_keeps_its_rotary_frequencies(real_inputs):
    from models.llama import rope_frequencies

    model = load_model(str(real_inputs / "stories260K"), "cpu", "bfloat16").model
    assert model.dtype == torch.bfloat16
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, rope_frequencies(shape_from_hf(real_inputs / "stories260K")))
