"""Noise of an evaluation belongs to the text: however it is batched, padded, cached or searched, each token meets the same."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from evals.chips import TransformList, Trials, text_over_chips
from evals.models import load_model
from evals.noise import NoisyModel, token_noise
from evals.text import choose_protocol, evaluate_text
from transforms.specs import BitflipSpec, CellFaults

TINY = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
                  num_attention_heads=4, max_position_embeddings=64)
    ),
}  # fmt: skip
SIGNS = CellFaults(bits=[0.1] + [0.0] * 31)
"""Sign flips of float32 words: heavy noise that is continuous in the value, so that rounding differences stay small."""
NOISE = BitflipSpec(kind="bitflip", storage="float32", weight=SIGNS, input=SIGNS, output=SIGNS)
LENGTHS = (9, 5, 7)


def tiny(kind: str):
    torch.manual_seed(0)
    model = TINY[kind]().eval()
    return model, NoisyModel(model, [NOISE], seed=3)


def texts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 64, (length,), generator=generator) for length in lengths]


def padded(rows, left: bool):
    """Token ids, attention mask and position ids of a batch."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def philox_word(counter: tuple[int, int, int, int]) -> int:
    """First word of Philox 4x32 with 7 rounds and key (0, 0), on Python's integers."""
    (c0, c1, c2, c3), k0, k1 = counter, 0, 0
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0


def test_sample_is_the_running_sum_of_mixed_tokens():
    ids = [7, 50_000, 7, 3, 128_255]
    position, sample = token_noise(torch.tensor([ids]))
    total, expected = 0, []
    for place, token in enumerate(ids):
        total = (total + philox_word((token, place, 0, 0))) % 2**32
        expected.append(total)
    assert position[0].tolist() == list(range(5))
    assert sample[0].tolist() == expected


@pytest.mark.parametrize("left", [True, False])
def test_pads_and_neighbours_change_no_noise(left):
    ids, mask, _ = padded(texts(), left)
    ids[mask == 0] = 63  # whatever stands there
    noise = token_noise(ids, mask)
    for i, row in enumerate(texts()):
        assert torch.equal(noise[:, i, mask[i] == 1], token_noise(row[None])[:, 0])


def test_noise_is_causal_and_tells_texts_apart():
    ids = torch.arange(1, 21)[None].clone()
    before = token_noise(ids)
    ids[0, 12] += 1
    after = token_noise(ids)
    assert torch.equal(before[:, :, :12], after[:, :, :12])
    assert (before[1, :, 12:] != after[1, :, 12:]).all()
    swapped = ids.clone()
    swapped[0, [3, 4]] = ids[0, [4, 3]]
    assert (token_noise(swapped)[1, :, 4:] != after[1, :, 4:]).all(), "a sum alone would not see the order"


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_logits_of_a_batch_are_those_of_its_texts_alone(kind, left):
    model, noisy = tiny(kind)
    noisy.chip(1)
    ids, mask, positions = padded(texts(), left)
    batch = model(ids, attention_mask=mask, position_ids=positions).logits
    for i, row in enumerate(texts()):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(batch[i, mask[i] == 1], alone, rtol=1e-5, atol=1e-5)
        with noisy.clean():
            assert (model(row[None]).logits[0] - alone).abs().amax() > 0.01, "and there is noise"


@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_logits_from_a_cache_are_those_of_the_whole_text(kind):
    model, noisy = tiny(kind)
    noisy.chip(1)
    (text,) = texts((12,))
    whole = model(text[None]).logits[0]
    cache, parts = None, []
    for begin, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
        out = model(text[None, begin:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits[0])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True}], ids=["greedy", "sampling"])
@torch.no_grad()
def test_generation_from_a_left_padded_batch_sees_the_noise_of_the_whole_text(kind, how):
    model, noisy = tiny(kind)
    noisy.chip(2)
    ids, mask, _ = padded(texts(), left=True)
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, eos_token_id=None,
                         return_dict_in_generate=True, output_logits=True, **how)  # fmt: skip
    for i, row in enumerate(texts()):
        whole = torch.cat([row, out.sequences[i, ids.shape[1] :]])
        expected = model(whole[None]).logits[0, len(row) - 1 : -1]
        torch.testing.assert_close(torch.stack(out.logits)[:, i], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_beam_search_carries_the_noise_with_its_beams():
    model, noisy = tiny("llama")
    noisy.chip(1)
    ids, mask, _ = padded(texts(), left=True)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, num_beams=4, num_return_sequences=4, eos_token_id=None,
                         pad_token_id=0, length_penalty=0.0, return_dict_in_generate=True, output_scores=True)  # fmt: skip
    assert (out.beam_indices[:, 1:6] != out.beam_indices[:, :5]).any(), "or the beams never changed places"
    for i, sequence in enumerate(out.sequences):
        row = texts()[i // 4]
        new = sequence[ids.shape[1] :]
        logits = model(torch.cat([row, new])[None]).logits[0, len(row) - 1 : -1]
        score = logits.log_softmax(-1)[torch.arange(6), new].sum()
        torch.testing.assert_close(out.sequences_scores[i], score, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_takes_its_history_along_or_is_refused():
    model, noisy = tiny("llama")
    noisy.chip(1)
    first, second = texts((8, 8))
    whole = model(first[None]).logits[0, -1]

    def cache_of(rows, length):
        return model(torch.stack(rows)[:, :length], use_cache=True).past_key_values

    def last(cache, tokens):
        return model(tokens, past_key_values=cache).logits[:, -1]

    selected = cache_of([second, first], 7)
    selected.batch_select_indices(torch.tensor([1]))
    repeated = cache_of([first], 7)
    kept = copy.deepcopy(repeated)
    repeated.batch_repeat_interleave(3)
    assert isinstance(selected, DynamicCache)
    for cache, rows in ((selected, 1), (repeated, 3), (kept, 1)):
        for logits in last(cache, first[None, 7:].expand(rows, 1)):
            torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)
    cropped = cache_of([first], 8)
    cropped.crop(-1)
    assert cropped.get_seq_length() == 7
    torch.testing.assert_close(last(cropped, first[None, 7:])[0], whole, rtol=1e-5, atol=1e-5)

    changed = cache_of([first], 7)
    for layer in changed.layers:
        layer.crop(-2)
    with pytest.raises(ValueError, match="holds 5 tokens of which the noise knows nothing"):
        last(changed, first[None, 7:])
    noisy.detach()
    foreign = cache_of([first], 7)
    NoisyModel(model, [NOISE], seed=3).chip(1)
    with pytest.raises(ValueError, match="holds 7 tokens of which the noise knows nothing"):
        last(foreign, first[None, 7:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "with input_ids, not with embeddings"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 1, 3, 3)}, "shape"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64), "logits_to_keep": torch.tensor([0])}, "logits_to_keep"),
    ],
)
def test_calls_that_the_noise_cannot_follow_are_refused(call, message):
    model, noisy = tiny("llama")
    noisy.chip(1)
    with pytest.raises(ValueError, match=message):
        model(**call)


@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_clean_is_the_model_without_transforms_and_detaching_restores_it(kind):
    torch.manual_seed(0)
    model = TINY[kind]().eval()
    names, ids = set(model.state_dict()), padded(texts(), False)[0]
    plain = model(ids).logits
    noisy = NoisyModel(model, [NOISE], seed=3)
    noisy.chip(1)
    with noisy.clean():
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-6, atol=1e-6)
    noisy.detach()
    assert torch.equal(model(ids).logits, plain)
    assert set(model.state_dict()) == names


@torch.no_grad()
def test_an_output_head_can_be_tied_again():
    """As lm-eval does with a model that it is handed."""
    torch.manual_seed(0)
    model = TINY["llama"]().eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    noisy = NoisyModel(model, [NOISE.model_copy(update={"modules": ["lm_head"]})], seed=3)
    noisy.chip(1)
    ids = padded(texts(), False)[0]
    before = model(ids).logits
    model.tie_weights()
    assert torch.equal(model(ids).logits, before)
    noisy.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_a_chip_keeps_its_noise_and_resample_draws_weights_for_every_batch():
    model, noisy = tiny("llama")
    ids = padded(texts(), False)[0]

    def on(choose, *arguments):
        choose(*arguments)
        return model(ids).logits

    first = on(noisy.chip, 1)
    assert torch.equal(model(ids).logits, first)
    assert not torch.equal(on(noisy.chip, 2), first)
    assert torch.equal(on(noisy.chip, 1), first)
    drawn = on(noisy.resample)
    assert not torch.equal(drawn, first)
    assert not torch.equal(model(ids).logits, drawn)
    assert torch.equal(on(noisy.resample), drawn), "the count of batches begins again"


@torch.no_grad()
def test_persistent_faults_are_those_of_the_chip():
    model = TINY["llama"]().eval()
    noisy = NoisyModel(model, [NOISE.model_copy(update={"lifetime": "persistent"})], seed=3)
    ids = padded(texts(), False)[0]
    weight = model.model.layers[0].mlp.up_proj
    noisy.noise.enter("train")
    noisy.noise.begin(5, 0, torch.device("cpu"))
    trained = weight.weight.clone()
    noisy.chip(0)
    model(ids)
    assert torch.equal(weight.weight, trained)
    noisy.chip(1)
    assert not torch.equal(weight.weight, trained)


@pytest.fixture
def story(real_inputs, tmp_path):
    """The pretrained model and a short text."""
    text = (real_inputs / "text" / "wikitext-2-valid.txt").read_text(encoding="utf-8")[:3000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    return load_model(str(real_inputs / "stories260K"), "cpu"), tmp_path / "text.txt"


def figures(model, file, faults: dict, batch_size=4, trials=None, context=128, **changes):
    spec = BitflipSpec(kind="bitflip", **faults, **changes)
    noisy = TransformList([spec], [""]).attach(model)
    try:
        protocol = choose_protocol(model.context, context, None)
        return text_over_chips(model, noisy, trials or Trials("chip", 2), [file], protocol, batch_size)[str(file)]
    finally:
        noisy.detach()


def test_perplexity_of_a_chip_does_not_depend_on_the_batch(story):
    model, file = story
    faults = {name: CellFaults(bits=[p] + [0.0] * 31) for name, p in (("weight", 1e-3), ("input", 1e-2))}
    small, large = (
        figures(model, file, faults, batch_size, Trials("chip", 1), storage="float32") for batch_size in (1, 8)
    )
    assert small["perplexity_per_chip"] == pytest.approx(large["perplexity_per_chip"], rel=1e-5)
    assert small["perplexity"] > 1.05 * small["perplexity_clean"]


def test_figures_over_chips(story):
    model, file = story
    plain = evaluate_text(model, [file], choose_protocol(model.context, 128, None), 4)[str(file)]
    row = figures(model, file, {"weight": CellFaults(sign_exponent=1e-3, zero_above=1.25)}, trials=Trials("chip", 3))
    chips = row["perplexity_per_chip"]
    mean = sum(chips) / 3
    assert len(set(chips)) == 3
    assert row["perplexity"] == pytest.approx(mean)
    assert row["perplexity_std"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in chips) / 2))
    assert (row["perplexity_clean"], row["bits_per_byte_clean"]) == (plain["perplexity"], plain["bits_per_byte"])
    assert (row["non_finite_chips"], row["tokens"]) == (0, plain["tokens"])
    later = figures(
        model, file, {"weight": CellFaults(sign_exponent=1e-3, zero_above=1.25)}, trials=Trials("chip", 1, 3)
    )
    assert later["perplexity_per_chip"] == chips[2:]
    assert later["perplexity_std"] is None


def test_chips_that_are_not_finite_are_counted_and_not_averaged(story):
    model, file = story
    exponents = {"weight": CellFaults(bits=[0.0, 1e-4] + [0.0] * 14)}  # the exponent's highest bit of 226,560 weights
    row = figures(model, file, exponents, trials=Trials("chip", 6))
    broken = row["non_finite_chips"]
    assert 1 <= broken <= 5, "some of these chips give inf or NaN, some do not"
    kept = [value for value in row["perplexity_per_chip"] if value is not None]
    assert len(kept) == 6 - broken
    assert all(map(math.isfinite, kept))
    assert row["perplexity"] == pytest.approx(sum(kept) / len(kept))
    worst = figures(model, file, {"weight": CellFaults(sign_exponent=0.05)})
    assert (worst["non_finite_chips"], worst["perplexity"], worst["perplexity_std"]) == (2, None, None)
    assert worst["perplexity_per_chip"] == [None, None]


@torch.no_grad()
def test_greedy_generation_of_the_pretrained_model_sees_the_noise_of_the_whole_text(story):
    model, _ = story
    spec = BitflipSpec(kind="bitflip", modules=["*_proj", "lm_head"], storage="float32", input=SIGNS)
    noisy = NoisyModel(model.model, [spec], seed=1)
    noisy.chip(1)
    tokenizer = model.tokenizer
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("Once upon a time", "Lily and Tom went to the")]
    ids, mask, _ = padded(rows, left=True)
    out = model.model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None,
                               return_dict_in_generate=True, output_logits=True)  # fmt: skip
    for i, row in enumerate(rows):
        whole = torch.cat([row, out.sequences[i, ids.shape[1] :]])
        expected = model.model(whole[None]).logits[0, len(row) - 1 : -1]
        torch.testing.assert_close(torch.stack(out.logits)[:, i], expected, rtol=1e-4, atol=1e-4)
        with noisy.clean():
            assert (model.model(whole[None]).logits[0, len(row) - 1 : -1] - expected).abs().amax() > 1
    noisy.detach()
