"""Adapters in whole runs: what is trained, what is frozen, what an export holds."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_flags

from evals.models import load_model
from train.config_sources import ConfigError, load_config
from train.export import export, open_trained
from train.job import JobError, run_job
from train.prepare import prepare

NOISE = '{ kind = "bitflip", weight = { mantissa = 0.001 }, input = { mantissa = 0.001 } }'
SHAPE = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")


@pytest.fixture(scope="module")
def base(tmp_path_factory, text_corpus):
    """A trained run and its export."""
    folder = tmp_path_factory.mktemp("base")
    config = load_config([], tiny_flags(folder, text_corpus, "base", training__steps=5), world_size=1)
    prepare(config, say=lambda text: None)
    run_job(config)
    export(open_trained(folder / "base"), folder / "hf")
    return folder


def adapt(base, corpus, name: str, transforms: str, **changes):
    changes = {f"model__shape__{key}": None for key in SHAPE} | {
        "model__init_from": f"hf:{base / 'hf'}", "transforms": transforms, "training__steps": 6,
        "checkpoint__interval": 3,
    } | changes  # fmt: skip
    config = load_config([], tiny_flags(base, corpus, name, **changes), world_size=1)
    prepare(config, say=lambda text: None)
    run_job(config)
    return open_trained(base / name)


def test_base_is_frozen_and_export_is_merged(base, text_corpus, tmp_path):
    spec = f'[{NOISE}, {{ kind = "lora", rank = 4, alpha = 8, modules = ["*.q_proj", "*.mlp.*"] }}]'
    trained = adapt(base, text_corpus, "adapted", spec)
    before = load_file(base / "hf" / "model.safetensors")
    export(trained, tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert after.keys() == before.keys(), "an export has no adapters"
    from train.checkpoint import checkpoint_names, read_tensors

    raw = read_tensors(trained.checkpoint, checkpoint_names(trained.checkpoint))
    for name, weight in before.items():
        assert torch.equal(raw[name][: len(weight)], weight), f"{name} was frozen"
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" in raw:
            a, b = raw[f"{layer}.lora_A"].double(), raw[f"{layer}.lora_B"].double()
            assert b.abs().max() > 0, "the adapter was trained"
            torch.testing.assert_close(after[name].double(), weight.double() + 2.0 * b @ a, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(after[name], weight)
    assert sum(name.endswith("lora_A") for name in raw) == 2 * 4
    model = load_model(str(base / "adapted")).model
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, after[name], atol=0, rtol=0)


def test_first_step_equals_the_clean_model(base, text_corpus):
    """B starts at zero, so that the first loss under adapters alone is that of full fine-tuning."""
    from support import read_metrics

    adapt(base, text_corpus, "lora", '[{ kind = "lora", rank = 4 }]')
    adapt(base, text_corpus, "full", "[]")
    first = [read_metrics(base / name)[0]["loss"] for name in ("lora", "full")]
    assert first[0] == pytest.approx(first[1], abs=1e-6)
    last = [[row["loss"] for row in read_metrics(base / name) if "loss" in row][-1] for name in ("lora", "full")]
    assert last[0] != pytest.approx(last[1], abs=1e-4)


LORA = '{ kind = "lora", rank = 4 }'


@pytest.fixture(scope="module")
def straight(base, text_corpus):
    """A run with an adapter and noise, named in this order."""
    adapt(base, text_corpus, "straight", f"[{LORA}, {NOISE}]", validation__interval=6)


def test_resumed_adapters_equal_the_uninterrupted_ones(base, straight, text_corpus):
    from support import losses, read_metrics

    spec = f"[{LORA}, {NOISE}]"
    adapt(base, text_corpus, "pieces", spec, validation__interval=6, training__stop_after=3)
    adapt(base, text_corpus, "pieces", spec, validation__interval=6)
    straight, pieces = (
        [row for row in losses(read_metrics(base / name)) if row[0] != 3] for name in ("straight", "pieces")
    )
    assert straight == pieces


def test_order_of_tables_does_not_matter(base, straight, text_corpus):
    from support import read_metrics

    adapt(base, text_corpus, "noise_first", f"[{NOISE}, {LORA}]", validation__interval=6)
    one, other = ([row.get("loss") for row in read_metrics(base / name)] for name in ("straight", "noise_first"))
    assert one == other


def test_adapters_need_trained_weights(tmp_path, text_corpus):
    with pytest.raises(ConfigError, match=r"name them with model\.init_from"):
        load_config([], tiny_flags(tmp_path, text_corpus, transforms='[{ kind = "lora" }]'))


def test_a_checkpoint_goes_on_only_with_its_own_adapters(base, text_corpus):
    adapt(base, text_corpus, "four", '[{ kind = "lora", rank = 4 }]')
    for name, transforms in (
        ("other_rank", '[{ kind = "lora", rank = 5 }]'),
        ("other_scale", '[{ kind = "lora", rank = 4, alpha = 320 }]'),
        ("none", "[]"),
    ):
        with pytest.raises(JobError, match=r"(?s)was trained with \[.*'rank': 4.*model\.init_from"):
            adapt(base, text_corpus, name, transforms, checkpoint__resume=base / "four", training__steps=8)
    adapt(
        base, text_corpus, "same", '[{ kind = "lora", rank = 4 }]', checkpoint__resume=base / "four", training__steps=8
    )


def test_a_tied_head_takes_no_adapter(base, text_corpus):
    tied = base / "tied"
    config = load_config(
        [],
        tiny_flags(base, text_corpus, "tied", training__steps=6, model__shape__tied_embeddings="true"),
        world_size=1,
    )
    run_job(config)
    export(open_trained(tied), base / "tied_hf")
    with pytest.raises(JobError, match=r"transforms\.0\.modules: lm_head shares its weight"):
        adapt(
            base, text_corpus, "refused", '[{ kind = "lora", modules = ["lm_head"] }]',
            model__init_from=f"hf:{base / 'tied_hf'}",
        )  # fmt: skip


def test_a_plan_counts_what_is_trained(base, text_corpus, capsys):
    from launch.cli import main

    flags = {f"model__shape__{key}": None for key in SHAPE} | {"model__init_from": f"hf:{base / 'hf'}"}
    main(["plan", *tiny_flags(base, text_corpus, **flags, transforms='[{ kind = "lora", rank = 4 }]')])
    per_layer = 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 80) * 3)
    assert f"{2 * per_layer:,} parameters are trained" in capsys.readouterr().out
