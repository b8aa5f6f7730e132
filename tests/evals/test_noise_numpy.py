"""Perplexity under bit flips against a simulation that shares nothing with ours: plain numpy, its own random numbers.

The model below is Llama written out in float32; flips are drawn with numpy's generator on bfloat16 words. Chips of the two
simulations differ, so their mean log perplexities are compared, in units of the standard error that their spread gives.
"""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.bitflip_perplexity import cases
from evals.chips import TransformList, Trials, text_over_chips
from evals.models import load_model
from evals.sweep import at_probability
from evals.text import Protocol

WINDOW, NUM_WINDOWS = 256, 16


class Memory:
    """A bfloat16 memory whose bits flip independently with probability `p`; values from `below` on read as 0."""

    def __init__(self, rng, p: float, bits, below: float | None):
        self.rng, self.p, self.bits, self.below = rng, p, np.array(bits), below

    def __call__(self, value):
        words = np.ascontiguousarray(value, np.float32).view(np.uint32).ravel().astype(np.uint64)
        words = (words + 0x7FFF + ((words >> 16) & 1)) >> 16  # to the nearest, ties to even
        cells = len(words) * len(self.bits)
        # Gaps between failing cells are geometric, which is an exact Bernoulli process over all of them.
        failing = np.cumsum(self.rng.geometric(self.p, int(cells * self.p + 12 * math.sqrt(cells * self.p) + 30))) - 1
        assert failing[-1] >= cells
        failing = failing[failing < cells]
        np.bitwise_xor.at(
            words, failing // len(self.bits), np.uint64(1) << self.bits[failing % len(self.bits)].astype(np.uint64)
        )
        out = (words.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(value.shape)
        return out if self.below is None else np.where(np.abs(out) < self.below, out, np.float32(0))


def same(value):
    return value


class NumpyLlama:
    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")

    def mean_nll(self, ids, weight_memory=same, input_memory=same) -> float:
        """-log p per scored token of windows (W, T); every linear layer in the blocks reads through the memories."""
        config, weights = self.config, self.weights
        heads, kv_heads, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        num, length = ids.shape
        noisy = {name: weight_memory(w) for name, w in weights.items() if name.endswith("_proj.weight")}

        def linear(x, name):
            return input_memory(x) @ noisy[f"{name}.weight"].T

        def norm(x, name):
            root = np.sqrt((x * x).mean(-1, keepdims=True, dtype=np.float32) + np.float32(config["rms_norm_eps"]))
            return x / root * weights[f"{name}.weight"]

        def heads_of(x, count):
            return x.reshape(num, length, count, width).swapaxes(1, 2)  # (W, heads, T, width)

        rates = config["rope_parameters"]["rope_theta"] ** (-np.arange(0, width, 2) / width)
        angle = np.concatenate([np.outer(np.arange(length), rates)] * 2, -1)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

        def rotate(x):
            first, second = np.split(x, 2, -1)
            return x * cos + np.concatenate([-second, first], -1) * sin

        x = weights["model.embed_tokens.weight"][ids]
        future = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        for i in range(config["num_hidden_layers"]):
            block = f"model.layers.{i}"
            h = norm(x, f"{block}.input_layernorm")
            q = rotate(heads_of(linear(h, f"{block}.self_attn.q_proj"), heads))
            k = rotate(heads_of(linear(h, f"{block}.self_attn.k_proj"), kv_heads)).repeat(heads // kv_heads, 1)
            v = heads_of(linear(h, f"{block}.self_attn.v_proj"), kv_heads).repeat(heads // kv_heads, 1)
            score = q @ k.swapaxes(-1, -2) / np.float32(math.sqrt(width)) + future
            share = np.exp(score - score.max(-1, keepdims=True))
            attended = (share / share.sum(-1, keepdims=True)) @ v
            x = x + linear(attended.swapaxes(1, 2).reshape(num, length, -1), f"{block}.self_attn.o_proj")
            h = norm(x, f"{block}.post_attention_layernorm")
            gate = linear(h, f"{block}.mlp.gate_proj")
            x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{block}.mlp.up_proj"), f"{block}.mlp.down_proj")
        logits = (norm(x, "model.norm") @ weights["model.embed_tokens.weight"].T)[:, :-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
        return float((log_sum - np.take_along_axis(logits, ids[:, 1:, None], -1)).mean())


@pytest.fixture(scope="module")
def both(real_inputs, tmp_path_factory):
    """Our model, the numpy one, a text of 4,096 tokens and its windows."""
    folder = real_inputs / "stories260K"
    model = load_model(str(folder), "cpu", "float32")
    text = (real_inputs / "text" / "wikitext-2-valid.txt").read_text(encoding="utf-8")[:12_000]
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    end = encoded["offset_mapping"][WINDOW * NUM_WINDOWS][0]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(text[:end], encoding="utf-8")
    ids = model.tokenizer(text[:end], add_special_tokens=False)["input_ids"]
    assert len(ids) == WINDOW * NUM_WINDOWS
    return model, NumpyLlama(folder), file, np.array(ids).reshape(NUM_WINDOWS, WINDOW)


# Case of the benchmark's table: p, failing bits, threshold of the weights, of the inputs, chips of ours (numpy: twice).
POINTS = {
    "inputs": (1e-3, range(16), None, 30.0, 12),
    "sign and exponent": (1e-3, range(7, 16), 1.25, 30.0, 16),
}


@pytest.mark.slow  # statistics of many chips; fast tests compare the bits themselves with plain formulas
@pytest.mark.parametrize("case", POINTS)
def test_perplexity_under_flips_is_that_of_an_independent_simulation(case, both):
    model, plain, file, windows = both
    p, bits, weights_below, inputs_below, chips = POINTS[case]
    noisy = TransformList([at_probability(cases()[case], p)], [""]).attach(model)
    row = text_over_chips(model, noisy, Trials("chip", chips), [file], Protocol(WINDOW, WINDOW))[str(file)]
    noisy.detach()
    ours = [math.log(value) for value in row["perplexity_per_chip"]]
    clean = plain.mean_nll(windows)
    assert clean == pytest.approx(math.log(row["perplexity_clean"]), rel=1e-5)
    theirs = []
    for seed in range(2 * chips):
        rng = np.random.default_rng(seed)
        weights = Memory(rng, p, bits, weights_below) if weights_below else same
        theirs.append(plain.mean_nll(windows, weights, Memory(rng, p, bits, inputs_below)))
    error = math.sqrt(statistics.variance(ours) / chips + statistics.variance(theirs) / (2 * chips))
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    print(
        f"{case}: clean {clean:.4f}, ours {statistics.fmean(ours):.4f}, numpy {statistics.fmean(theirs):.4f} ± {error:.4f}"
    )
    effect = statistics.fmean(theirs) - clean
    assert effect > 0.1
    assert 3 * error < 0.3 * effect, "or half the probability, with about half the effect, would go unseen"
    assert abs(difference) < 3 * error
