"""Every kind of run in miniature on a GPU, against the same run on the CPU: losses agree as far as the formats let them.

`NEWCOMPUTE_TEST_DEVICE=cpu` trains on the CPU instead, to try the file where there is no GPU.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import losses, read_metrics, tiny_flags

from benchmarks.common import PRESETS
from train.config_sources import load_config
from train.job import run_job
from train.prepare import prepare

DEVICE = os.environ.get("NEWCOMPUTE_TEST_DEVICE", "cuda")
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="NEWCOMPUTE_TEST_DEVICE is cpu")
STEPS = 5
SHAPE: dict[str, Any] = {
    "model__shape__dim": 128, "model__shape__num_layers": 2, "model__shape__num_heads": 4,
    "model__shape__num_kv_heads": 2, "model__shape__ffn_dim": 256, "training__sequence_length": 128,
    "training__global_batch_size": 8, "training__micro_batch_size": 4, "training__steps": STEPS,
    "checkpoint__interval": 0, "validation__interval": STEPS, "validation__steps": 1,
}  # fmt: skip
FLOAT32 = {"precision__compute": "float32"}
EAGER = {"compile__enabled": "false"}
MASK = {"training__document_mask": "true"}
BITFLIP = {"transforms": "bitflip_published"}


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own():
    """A job sets what is global to its process, and compiles blocks of which one process keeps eight variants at most."""
    torch._dynamo.reset()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


def recompute(mode: str) -> dict[str, str]:
    return {"activation_checkpointing__mode": mode}


CASES: dict[str, tuple[dict[str, Any], float]] = {
    # name: changes, and by how much of it a loss may differ from float32 on the CPU, uncompiled
    "float32, uncompiled": (FLOAT32 | EAGER, 1e-4),
    "float32": (FLOAT32, 1e-4),
    "bfloat16, uncompiled": (EAGER, 0.03),
    "bfloat16": ({}, 0.03),
    "whole batch": ({"training__micro_batch_size": 8}, 0.03),
    "gradients reduced once": ({"parallel__reduce_each_micro_batch": "false"}, 0.03),
    "resharded": ({"parallel__reshard_after_forward": "true"}, 0.03),
    "cpu offload": ({"parallel__cpu_offload": "true"}, 0.03),
    "document mask": (FLOAT32 | MASK, 1e-3),
    "document mask, uncompiled": (MASK | EAGER, 0.03),
    "document mask, selective": (MASK | recompute("selective"), 0.03),
    "chunked loss": ({"training__loss_chunk_tokens": 300}, 0.03),
    "selective": (recompute("selective"), 0.03),
    "full": (recompute("full"), 0.03),
    "budget": (recompute("budget"), 0.03),
    "CUDA graphs": ({"compile__cuda_graphs": "true"}, 0.03),
    "deterministic": ({"run__deterministic": "true"}, 0.03),
    "skip": ({"faults__non_finite": "skip"}, 0.03),
    "muon": ({"optimizer__name": "muon"}, 0.05),
    "adamw_8bit": ({"optimizer__name": "adamw_8bit"}, 0.05),
    "adamw_bf16": ({"optimizer__name": "adamw_bf16"}, 0.05),
    "float8 tensorwise": ({"float8__recipe": "tensorwise", "float8__min_size": 64}, 0.1),
    "float8 rowwise": ({"float8__recipe": "rowwise", "float8__min_size": 64}, 0.1),
    "profile": ({"profiling__trace_step": 3, "profiling__memory_step": 2}, 0.03),
    # Hardware effects draw the same bits on both devices.
    "bitflip, float32": (FLOAT32 | BITFLIP, 2e-3),
    "bitflip, document mask": (BITFLIP | MASK, 0.05),
    "bitflip, selective": (BITFLIP | recompute("selective"), 0.05),
    "bitflip, full": (BITFLIP | recompute("full"), 0.05),
    "bitflip, uncompiled": (BITFLIP | EAGER, 0.05),
    "bitflip, warm-up": (BITFLIP | {"noise__warmup_steps": 4, "noise__group_size": 4}, 0.05),
    "optical, document mask": ({"transforms": "optical_8bit"} | MASK, 0.1),
    "optical, float32": (FLOAT32 | {"transforms": "optical_transformer"}, 0.02),
    "clipped weights": ({"transforms": "int4", "robust__clip_weights": 3.0}, 0.1),
    **{f"preset {file.stem}": ({"transforms": file.stem}, 0.1) for file in sorted(PRESETS.glob("*.toml"))},
}
NEEDS_GPU = ("bfloat16", "bfloat16, uncompiled", "budget", "CUDA graphs", "float8", "profile")
"""A CPU trains in float32 and uncompiled here, so that these would say nothing or are refused."""

# What the reference on the CPU takes over: what changes the numbers by more than rounding.
KEPT = ("transforms", "training__document_mask", "noise__", "robust__", "optimizer__")


def run(folder: Path, corpus: Path, device: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    given = SHAPE | {"compile__enabled": "true"} | changes | {"run__device": device}
    preset = given.pop("transforms", None)
    files = [str(PRESETS / f"{preset}.toml")] if preset else []
    config = load_config(files, tiny_flags(folder, corpus, "run", **given), world_size=1)
    prepare(config, say=lambda text: None)
    run_job(config)
    return read_metrics(folder / "run")


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory, text_corpus):
    @cache
    def reference(changes: str) -> list[tuple[int, float]]:
        return losses(run(tmp_path_factory.mktemp("cpu"), text_corpus, "cpu", json.loads(changes)))

    def wanted(changes: dict[str, Any]) -> list[tuple[int, float]]:
        kept = {key: value for key, value in changes.items() if key.startswith(KEPT)}
        return reference(json.dumps(kept | EAGER | FLOAT32, sort_keys=True))

    return wanted


@pytest.mark.parametrize("name", CASES)
def test_a_run_agrees_with_the_cpu(name, tmp_path, text_corpus, on_cpu):
    changes, tolerance = CASES[name]
    if DEVICE == "cpu":
        if name.startswith(NEEDS_GPU):
            pytest.skip("needs a GPU")
        changes = changes | EAGER
    recordings: list[str] = []
    started = recordings.append
    torch._dynamo.callback_handler.register_start_callback(note := lambda event: started(event.callback_trigger.name))
    try:
        found = losses(run(tmp_path, text_corpus, DEVICE, changes))
    finally:
        torch._dynamo.callback_handler.remove_start_callback(note)
    wanted = on_cpu(changes)
    print(f"{name}: {found} instead of {wanted}")
    assert [step for step, _ in found] == [step for step, _ in wanted]
    for (step, ours), (_, theirs) in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance), f"step {step}"
    assert found[STEPS - 1][1] < found[0][1], "it must learn, or the comparison says nothing"
    # These are given up without an error where they do not work.
    assert ("CUDAGRAPH_RECORDING" in recordings) == (name == "CUDA graphs")
    profiles = {file.suffix for file in (tmp_path / "run").rglob("*") if "profiles" in file.parts and file.is_file()}
    assert profiles >= ({".gz", ".pickle"} if name == "profile" else set())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(tmp_path, text_corpus, mode, optimizer):
    changes = EAGER | {
        "checkpoint__interval": 3, "checkpoint__mode": mode, "optimizer__name": optimizer,
        "run__deterministic": "true", "transforms": "optical_8bit",
    }  # fmt: skip
    whole = losses(run(tmp_path / "whole", text_corpus, DEVICE, changes))
    run(tmp_path / "parts", text_corpus, DEVICE, changes | {"training__stop_after": 3})
    parts = losses(run(tmp_path / "parts", text_corpus, DEVICE, changes))
    assert [step for step, _ in parts] == [1, 2, 3, 3, 4, 5, 5]  # the run that stopped validated at its end
    assert [row for row in parts if row[0] > 3] == [row for row in whole if row[0] > 3]


@needs_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adamw_bf16", "muon"])
def test_the_benchmark_finds_moments_that_are_not_finite(optimizer):
    """torchao counts steps in tensors of the host, beside moments on the GPU."""
    from benchmarks.gpu_step import all_finite, local_moments
    from train.config import OptimizerConfig
    from train.optimizer import build_optimizer

    layer = torch.nn.Linear(128, 128, device="cuda")
    built = build_optimizer([layer], OptimizerConfig.model_validate({"name": optimizer}))
    layer(torch.randn(4, 128, device="cuda")).sum().backward()
    built.step()
    assert all_finite(local_moments(built))
    layer.weight.grad.fill_(torch.nan)
    built.step()
    assert not all_finite(local_moments(built))


@needs_gpu
@pytest.mark.parametrize("backend", ["CUDNN_ATTENTION", "FLASH_ATTENTION"])
def test_a_block_takes_a_fused_attention(backend):
    """Head widths, groups and lengths of the models: otherwise attention is 10 times slower, and nobody hears of it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for heads, kv_heads in ((6, 2), (12, 4), (24, 8)):
        q = torch.randn(2, heads, 2048, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k, v = (
            torch.randn(2, kv_heads, 2048, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv"
        )
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out.square().mean().backward()
        assert all(t.grad is not None and torch.isfinite(t.grad).all() for t in (q, k, v))
