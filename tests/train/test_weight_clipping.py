"""Weight clipping against torch.std of whole matrices, on one process and on many."""

from __future__ import annotations

import pytest
import torch
from record_clipping import KINDS, record
from support import ROOT, fork_python, quietly, read_metrics, tiny_flags

from models.llama import Llama
from models.sizes import LlamaShape
from train.config import RobustConfig
from train.config_sources import ConfigError, load_config
from train.weight_clipping import WeightClipping
from transforms.apply import apply
from transforms.specs import BitflipSpec, CellFaults, Quantised, QuantiseSpec

LIMIT = 1.5
SHAPE = LlamaShape(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=80, vocab_size=128, max_context=8)
BITFLIP = '[{ kind = "bitflip", modules = ["*.mlp.*"], weight = { mantissa = 1e-3 } }]'


def expected(weight: torch.Tensor, kind: str) -> torch.Tensor:
    std = weight.std(dim=1, keepdim=True) if kind == "row" else weight.std()
    return torch.minimum(torch.maximum(weight, -LIMIT * std), LIMIT * std)


def clipping(model: Llama, kind: str = "row", noise=None) -> WeightClipping:
    return WeightClipping([model], noise, RobustConfig(clip_weights=LIMIT, clip_per=kind), torch.device("cpu"))


@pytest.fixture
def model() -> Llama:
    """Weights of which some rows are larger than others, with outliers and a mean that is not 0."""
    generator = torch.Generator().manual_seed(0)
    model = Llama(SHAPE)
    for parameter in model.parameters():
        size = torch.rand(len(parameter), generator=generator).add(0.1)
        size = size if parameter.ndim == 1 else size[:, None]
        drawn = torch.randn(parameter.shape, generator=generator) ** 3 + 0.5
        parameter.data.copy_(drawn * size)
    return model


@pytest.mark.parametrize("kind", ["row", "tensor"])
def test_a_whole_model(model, kind):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    clipping(model, kind)()
    for name, parameter in model.named_parameters():
        of_block = ".layers." in name and name.endswith("proj.weight")
        wanted = expected(before[name], kind) if of_block else before[name]
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(parameter, before[name]) != of_block, name


def test_with_effects_their_layers_are_clipped(model):
    """The stored weight of a parametrized layer, also one with an effect on its input alone; a head that is named too."""
    spec = BitflipSpec(kind="bitflip", modules=["*.up_proj", "lm_head"], weight=CellFaults(mantissa=0.1))
    of_input = BitflipSpec(kind="bitflip", modules=["*.o_proj"], input=CellFaults(mantissa=0.1))
    noise = apply(model, [spec, of_input], 0)
    clip = clipping(model, noise=noise)
    layers = {"mlp.up_proj", "self_attn.o_proj"}
    blocks = {f"model.layers.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert set(clip.weights) == {*blocks, "lm_head.weight"}
    stored = model.lm_head.parametrizations.weight.original
    wanted = expected(stored.detach().clone(), "row")
    clip()
    torch.testing.assert_close(stored.detach(), wanted, rtol=1e-6, atol=1e-7)


def test_effects_on_attention_alone_are_on_no_weight(model):
    before = set(clipping(model).weights)
    spec = QuantiseSpec(kind="quantise", attention=Quantised(format="int8"))
    assert set(clipping(model, noise=apply(model, [spec], 0)).weights) == before


def test_a_tied_head_is_clipped_once(model):
    """Clamping again would clip further: the standard deviation has become smaller."""
    model.lm_head.weight = model.model.embed_tokens.weight
    noise = apply(model, [BitflipSpec(kind="bitflip", modules=["lm_head"], weight=CellFaults(mantissa=0.1))], 0)
    before = model.model.embed_tokens.weight.detach().clone()
    clipping(model, noise=noise)()
    torch.testing.assert_close(model.model.embed_tokens.weight.detach(), expected(before, "row"), rtol=1e-6, atol=1e-7)


def test_off_by_default(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    WeightClipping([model], None, RobustConfig(), torch.device("cpu"))()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# Whole runs


def settings(**changes: object) -> dict[str, object]:
    plain = {"robust__clip_weights": LIMIT, "training__steps": 3, "schedule__warmup_steps": 1}
    return {**plain, "checkpoint__interval": 0, "validation__interval": 0, **changes}


def losses(run) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


@pytest.fixture(scope="module")
def references(tmp_path_factory, text_corpus):
    """(folder, name) -> losses of one process, by the settings that change what is computed."""
    folder, found = tmp_path_factory.mktemp("clipping"), {}

    def reference(of_both: dict[str, object]) -> list[float]:
        key = str(of_both)
        if key not in found:
            flags = tiny_flags(folder, text_corpus, f"one-{len(found)}", **settings(**of_both))
            quietly(load_config([], flags, 1))
            recorded = record(flags)
            check(recorded)
            found[key] = losses(folder / f"one-{len(found)}"), set(recorded["before"])
        return found[key]

    return reference


def check(recorded: dict[str, dict[str, torch.Tensor]]) -> None:
    for kind in ("row", "tensor"):
        for name, before in recorded["before"].items():
            wanted = expected(before, kind)
            assert not torch.equal(wanted, before), f"nothing of {name} had to be clipped"
            torch.testing.assert_close(recorded[kind][name], wanted, rtol=1e-6, atol=1e-8, msg=f"{kind}, {name}")


@pytest.mark.parametrize(
    ("processes", "layout", "of_both"),
    [
        (2, {"parallel__shard": 2}, {}),
        pytest.param(2, {"parallel__replicate": 2}, {}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__shard": 2, "parallel__cpu_offload": "true"}, {}, marks=pytest.mark.slow),
        (2, {"parallel__tensor": 2}, {}),
        (2, {"parallel__tensor": 2}, {"robust__clip_per": "tensor"}),
        pytest.param(
            2,
            {"parallel__pipeline": 2, "training__micro_batch_size": 2},
            {"robust__clip_per": "tensor"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            {"parallel__shard": 2, "activation_checkpointing__mode": "full"},
            {"transforms": BITFLIP},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2, {"parallel__shard": 2}, {"float8__recipe": "tensorwise", "float8__min_size": 16}, marks=pytest.mark.slow
        ),
        pytest.param(
            4, {"parallel__shard": 2, "parallel__replicate": 2}, {"robust__clip_per": "tensor"}, marks=pytest.mark.slow
        ),
        (4, {"parallel__shard": 2, "parallel__tensor": 2}, {"robust__clip_per": "tensor"}),
        pytest.param(4, {"parallel__shard": 2, "parallel__tensor": 2}, {}, marks=pytest.mark.slow),
        pytest.param(
            4,
            {"parallel__pipeline": 2, "parallel__tensor": 2, "training__micro_batch_size": 2},
            {"transforms": BITFLIP},
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "FSDP 2",
        "replicate 2",
        "FSDP 2 offloaded",
        "TP 2",
        "TP 2 whole",
        "PP 2 whole",
        "FSDP 2 transformed",
        "FSDP 2 float8",
        "HSDP 2 x 2 whole",
        "TP 2 x FSDP 2 whole",
        "TP 2 x FSDP 2",
        "PP 2 x TP 2 transformed",
    ],
)
def test_every_layout_clips_alike(references, tmp_path, text_corpus, processes, layout, of_both):
    expected_losses, names = references(of_both)
    flags = tiny_flags(tmp_path, text_corpus, "many", **settings(**of_both, **layout))
    quietly(load_config([], flags, processes))
    script = str(ROOT / "tests" / "train" / "record_clipping.py")
    fork_python(tmp_path, script, str(tmp_path / "clipped"), *flags, processes=processes)
    parts = [torch.load(tmp_path / f"clipped-{rank}.pt") for rank in range(processes)]
    for part in parts:
        check(part)
        for kind in KINDS:
            for name, weight in part[kind].items():
                others = [other[kind][name] for other in parts if name in other[kind]]
                assert all(torch.equal(weight, other) for other in others), f"ranks disagree about {kind} of {name}"
    assert {name for part in parts for name in part["before"]} == names
    # float8 rounds inputs by the device's own rows.
    assert losses(tmp_path / "many") == pytest.approx(expected_losses, abs=0.1 if "float8__recipe" in of_both else 2e-5)


def test_clipping_changes_the_training(references):
    assert references({})[0] != references({"robust__clip_per": "tensor"})[0]


def test_a_resumed_run_is_the_uninterrupted_one(run_here):
    """Clipping again what a checkpoint holds would change it."""
    changes = settings(training__steps=6, checkpoint__interval=3, validation__interval=3)
    straight = run_here("straight", **changes)
    run_here("pieces", **changes, training__stop_after=3)
    pieces = run_here("pieces", **changes)
    assert figures(pieces) == figures(straight)


def figures(rows: list[dict]) -> list[tuple]:
    return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("val_loss")) for row in rows]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--robust.clip_per", "tensor"], "it acts where robust.clip_weights is given"),
        (["--robust.clip_weights", "-1"], "robust.clip_weights"),
        (["--robust.clip_weights", "inf"], "robust.clip_weights"),
        (["--robust.clip_weights", "3", "--robust.clip_per", "column"], "robust.clip_per"),
        (
            ["--robust.clip_weights", "3", "--model.init_from", "hf:x", "--transforms", '[{ kind = "lora" }]'],
            "the weights beside adapters are frozen",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        load_config([], flags)
