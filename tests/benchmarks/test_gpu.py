"""The script behind the GPU figures: what it records, that it goes on from its file, and that failures end nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT, run_python

SCRIPT = ROOT / "benchmarks" / "gpu.py"
QUICK = ["--device", "cpu", "--models", "debug", "--steps", "2", "--no-search", "--no-float8"]
EAGER = ["--compile.enabled", "false"]
VERSIONS = {"date": "2026-11-28", "versions": {"torch": "2.13.0"}}
CPU = {"device": "a processor"} | VERSIONS
H100 = {"device": "NVIDIA H100 80GB HBM3", "peak_flops": 989e12} | VERSIONS


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", SCRIPT.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module, that can be run with arguments on a stated machine; steps are real unless replaced."""
    module = load("gpu")
    real = module.Campaign.run_step

    def run(out: Path, *arguments: str, machine=CPU, step=None, code: int | None = None) -> dict:
        def run_step(self, request, limit, **environment):
            if step is None:
                return real(self, request, limit, **environment)
            return {"machine": json.loads(json.dumps(machine))} | step(request), ""

        there = None if machine is CPU else (machine["device"], 85 * 10**9)
        monkeypatch.setattr(module, "query_gpu", lambda: there)
        monkeypatch.setattr(module.Campaign, "run_step", run_step)
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--out", str(out)])
        if code is None:
            module.main()
        else:
            with pytest.raises(SystemExit) as ended:
                module.main()
            assert ended.value.code == code
        return json.loads(out.read_text())

    module.run = run
    return module


def values(request: dict) -> dict[str, str]:
    return {key.removeprefix("--"): value for key, value in zip(request["flags"][::2], request["flags"][1::2])}


def at(rate: float) -> dict:
    return {"status": "measured", "tokens_per_second_per_gpu": rate, "spread": 0.0, "compute_dtype": "bfloat16"}


@pytest.mark.slow
def test_a_run_on_cpu_is_recorded_and_resumed(gpu, tmp_path):
    out = tmp_path / "result.json"
    shown = run_python(str(SCRIPT), *QUICK, *EAGER, "--out", str(out), "--markdown", "--write-configs").stdout
    content = json.loads(out.read_text())
    assert {"date", "device", "versions", "environment", "command", "best"} <= content.keys()
    assert content["versions"].keys() >= {"python", "torch", "triton", "torchao"}
    (row,) = content["measurements"]
    assert row["status"] == "measured"
    assert row["best"]
    assert row["tokens_per_step"] == 4 * 128
    assert row["timed_steps"] == 2
    assert row["compiled_while_timed"] == 0
    assert row["tokens_per_second_per_gpu"] == pytest.approx(2 * 4 * 128 / row["timed_seconds"], rel=0.5)
    assert row["loss"] == pytest.approx(7.6, abs=0.2)  # ln 2048, as long as the tokens are noise
    assert row["peak_resident_bytes"] > 2**27
    assert "--training.micro_batch_size 4" in row["flags"]
    # No MFU, peak or target on a device whose peak is not known.
    assert not {"mfu", "peak_flops", "mfu_formula"} & (row.keys() | content.keys())
    assert not any("target_reached" in entry for entry in content["best"])
    assert "| debug | float32 | 4 rows x 1 |" in shown
    assert "# configs/clm_debug.toml" in shown
    assert "micro_batch_size = 4" in shown

    assert row["planned_memory"] > 2**20
    assert content["extra_flags"] == "--compile.enabled false"

    never = pytest.fail
    assert gpu.run(out, *QUICK, *EAGER, "--resume", step=never) == content
    with pytest.raises(SystemExit, match="--resume goes on with it"):
        gpu.run(out, *QUICK, *EAGER, step=never)
    with pytest.raises(SystemExit, match="was measured with --compile"):
        gpu.run(out, *QUICK, "--resume", step=never)
    with pytest.raises(SystemExit, match="was measured on"):
        gpu.run(out, *QUICK, *EAGER, "--resume", "--change", "accumulation=2", step=lambda request: at(1.0))


@pytest.mark.slow  # another start of the script; what follows from the outcome is tested below
def test_out_of_memory_is_an_outcome(gpu, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.MODELS, "debug", gpu.replace(gpu.MODELS["debug"], first=gpu.Setting(1)))
    # Its embedding is beyond any address space.
    huge = ["--model.shape.vocab_size", str(1 << 24), "--model.shape.dim", str(1 << 22), "--model.shape.head_dim", "64"]
    content = gpu.run(tmp_path / "result.json", *QUICK, *EAGER, *huge)
    (row,) = content["measurements"]
    assert row["status"] == "out of memory"
    assert "can't allocate memory" in row["reason"]
    assert content["best"] == []


@pytest.mark.slow  # as above
def test_a_broken_setting_ends_nothing(gpu, tmp_path, capfd):
    content = gpu.run(tmp_path / "result.json", *QUICK, *EAGER, "--compile.cuda_graphs", "true", code=1)
    (row,) = content["measurements"]
    assert row["status"] == "failed"
    assert "it acts with compile.enabled = true" in row["reason"]
    assert "Traceback" in capfd.readouterr().err


def test_a_dead_process_ends_nothing(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (row,) = gpu.run(tmp_path / "other.json", *QUICK, code=1)["measurements"]
    assert row["reason"] == "the process ended with 1 and no answer"


def test_fewer_rows_until_they_fit(gpu, tmp_path):
    def step(request):
        few = int(values(request)["training.micro_batch_size"]) <= 12
        return at(1000.0) if few else {"status": "out of memory", "reason": "OutOfMemoryError: CUDA out of memory"}

    arguments = ["--models", "60M", "--no-search", "--no-float8"]
    content = gpu.run(tmp_path / "result.json", *arguments, machine=H100, step=step)
    tried = [(r["setting"]["micro_batch_size"], r["setting"]["accumulation"]) for r in content["measurements"]]
    assert tried == [(48, 2), (24, 4), (12, 8)]


def test_the_search_leaves_an_axis_at_the_first_change_that_is_no_faster(gpu, tmp_path):
    """Rates that grow up to 64 rows, and by CUDA graphs; recomputation costs."""
    asked = []

    def step(request):
        v = values(request)
        asked.append(v)
        rows = int(v["training.micro_batch_size"])
        rate = 500_000 + 1000 * rows
        rate += 10_000 * (v["compile.cuda_graphs"] == "true") - 9000 * (v["activation_checkpointing.mode"] != "none")
        rate -= 5000 * (v["training.loss_chunk_tokens"] != "0")
        return at(rate + (10_000 if v["float8.recipe"] == "tensorwise" else 0))

    content = gpu.run(tmp_path / "result.json", "--models", "60M", machine=H100, step=step)
    best = {row["precision"]: row for row in content["measurements"] if row.get("best")}
    found = best["bfloat16"]["setting"]
    assert (found["micro_batch_size"], found["accumulation"], found["cuda_graphs"]) == (64, 2, True)
    assert found["activation_checkpointing"] == "none"
    modes = [v["activation_checkpointing.mode"] for v in asked]
    assert modes.count("budget") == 1
    assert "selective" not in modes
    reached = {entry["precision"]: entry["target_reached"] for entry in content["best"]}
    assert reached == {"bfloat16": "yes", "float8 tensorwise": "yes"}  # 574,000 and 584,000 of 569,253
    assert content["best"][0]["target_tokens_per_second"] == 569_253
    (skipped,) = [row for row in content["measurements"] if row["status"] == "skipped"]
    assert skipped["precision"] == "float8 rowwise"  # no layer of 60M is large enough


def test_every_setting_of_the_search_is_a_valid_configuration(gpu):
    from train.config_sources import load_config

    campaign = SimpleNamespace(on_gpu=True, extra=[])
    for name, model in gpu.MODELS.items():
        trials = [model.first, *(gpu.replace(model.first, **change) for axis in model.axes for change in axis)]
        for setting in [*trials, *(gpu.replace(model.first, float8=recipe) for recipe in gpu.RECIPES)]:
            config = load_config([], gpu.Campaign.flags(campaign, name, setting), world_size=1)
            assert config.training.global_batch_size == setting.micro_batch_size * setting.accumulation
            assert config.compile.cuda_graphs == setting.cuda_graphs
            assert config.run.device == "cuda"


def test_targets_only_on_an_h100(gpu, tmp_path):
    other = H100 | {"device": "NVIDIA H200"}
    arguments = ["--models", "60M", "--no-search", "--no-float8"]
    content = gpu.run(tmp_path / "result.json", *arguments, machine=other, step=lambda request: at(900_000))
    assert "target_reached" not in content["best"][0]


def test_searched_models_come_first_and_are_searched_before_the_others(gpu, tmp_path):
    order = []

    def step(request):
        order.append(values(request)["model.size"])
        return at(1.0)

    content = gpu.run(tmp_path / "result.json", "--no-float8", machine=H100, step=step)
    assert order[:6] == ["60M", "200M", "1.1B"] * 2
    assert order[-3:] == ["400M", "1B", "3B"]
    assert {"400M", "1B", "3B"}.isdisjoint(order[:-3])
    (refused,) = [row for row in content["measurements"] if row["status"] == "skipped"]
    assert refused["model"] == "llama3-8B"  # 128 GB of weights, gradients and moments
    assert "alone are 120 GiB" in refused["reason"]


def test_no_setting_that_is_tried_on_an_h100_needs_more_than_it_has(gpu):
    campaign = SimpleNamespace(on_gpu=True, extra=[])
    for name, model in gpu.MODELS.items():
        if name == "llama3-8B":  # refused on one GPU
            continue
        for setting in [model.first, *(gpu.replace(model.first, **change) for axis in model.axes for change in axis)]:
            assert gpu.planned_memory(gpu.Campaign.flags(campaign, name, setting)) < 70 * 2**30, (name, setting)


def test_a_setting_beyond_the_memory_by_the_plan_is_not_tried(gpu, tmp_path):
    arguments = ["--models", "60M", "--change", "micro_batch_size=96"]
    content = gpu.run(tmp_path / "result.json", *arguments, machine=H100, step=pytest.fail)
    (row,) = content["measurements"]
    assert row["status"] == "skipped"
    assert row["reason"] == "it needs 95 GiB by the plan's estimate, the GPU has 79"
    # A file without any measurement still takes one.
    content = gpu.run(tmp_path / "result.json", "--models", "60M", "--change", "cuda_graphs=true", "--resume",
                      machine=H100, step=lambda request: at(5.0))  # fmt: skip
    assert content["device"] == H100["device"]


def test_a_change_starts_from_the_best_setting_so_far(gpu, tmp_path):
    out, few = tmp_path / "result.json", ["--models", "60M", "--no-float8", "--no-search"]
    gpu.run(out, *few, machine=H100, step=lambda request: at(5.0))
    gpu.run(
        out,
        "--models",
        "60M",
        "--resume",
        "--change",
        "micro_batch_size=64",
        machine=H100,
        step=lambda request: at(9.0),
    )
    content = gpu.run(out, "--models", "60M", "--resume", "--change", "cuda_graphs=true", "--change", "accumulation=3",
                      machine=H100, step=lambda request: at(7.0))  # fmt: skip
    last = content["measurements"][-1]["setting"]
    assert (last["micro_batch_size"], last["accumulation"], last["cuda_graphs"]) == (64, 3, True)
    assert [row.get("best", False) for row in content["measurements"]] == [False, True, False]


def test_what_other_code_or_another_device_has_measured_is_not_taken_over(gpu, tmp_path, monkeypatch):
    out, few = tmp_path / "result.json", ["--models", "60M", "--no-float8", "--no-search"]
    gpu.run(out, *few, machine=H100, step=lambda request: at(5.0))
    assert gpu.run(out, *few, "--resume", machine=H100, step=pytest.fail)["best"][0]["tokens_per_second_per_gpu"] == 5.0
    monkeypatch.setattr(gpu, "sources", lambda *folders: "changed")
    content = gpu.run(out, *few, "--resume", machine=H100, step=lambda request: at(4.0))
    assert [row["tokens_per_second_per_gpu"] for row in content["measurements"]] == [4.0]
    with pytest.raises(SystemExit, match="measured on NVIDIA H100 80GB HBM3, this is NVIDIA H200"):
        gpu.run(out, *few, "--resume", machine=H100 | {"device": "NVIDIA H200"}, step=pytest.fail)


@pytest.mark.parametrize("change", ["rows=4", "cuda_graphs=maybe", "accumulation=two", "accumulation"])
def test_a_change_that_is_none_is_refused(gpu, change, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--change", change])
    with pytest.raises(SystemExit):
        gpu.main()
    assert change in capsys.readouterr().err


def test_a_measurement_cut_short_is_made_again(gpu, tmp_path):
    arguments = ["--models", "60M", "--no-search", "--no-float8"]
    late = {"status": "out of time", "reason": "ended after 30 s"}
    out = tmp_path / "result.json"
    cut = gpu.run(out, *arguments, "--limit", "1000", machine=H100, step=lambda request: late, code=75)
    (row,) = cut["measurements"]
    assert row["status"] == "out of time"
    (row,) = gpu.run(out, *arguments, "--resume", machine=H100, step=lambda request: at(5.0))["measurements"]
    assert row["tokens_per_second_per_gpu"] == 5.0
    with pytest.raises(FileNotFoundError):  # no time, no measurement, no file
        gpu.run(tmp_path / "none.json", *arguments, "--minutes", "0", machine=H100, step=pytest.fail)


@pytest.mark.parametrize("peak", [None, 989e12])
def test_speed_by_hand(peak):
    gpu_step = load("gpu_step")
    config = gpu_step.load_config([], ["--training.global_batch_size", "4", "--training.sequence_length", "100"], 1)
    throughput = SimpleNamespace(flops_per_token=10**9, peak=peak)
    mesh = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    trainer = SimpleNamespace(throughput=throughput, mesh=mesh, shape=gpu_step.named_shape(config.model))
    # Windows of 400 tokens per step: 500,000, 400,000 and 250,000 tokens/s.
    answer = gpu_step.speed(config, trainer, [(1250, 1.0), (1000, 1.0), (1250, 2.0)])
    assert answer["tokens_per_second_per_gpu"] == 400_000
    assert answer["spread"] == pytest.approx(250_000 / 400_000)
    assert answer["milliseconds_per_step"] == 1.0
    assert answer.get("mfu") == (None if peak is None else pytest.approx(400_000 * 1e9 / 989e12, abs=1e-4))


def test_an_answer_is_not_kept_waiting_for_by_a_process_that_does_not_end(gpu, tmp_path, monkeypatch):
    """Taking NCCL and compiler processes down takes seconds; a GPU's minutes are few."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_step.py").write_text(
        "import os, pathlib, sys, time\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "path.with_suffix('.writing').write_text('{\"status\": \"measured\"}')\n"
        "os.replace(path.with_suffix('.writing'), path.with_suffix('.answer'))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    campaign = SimpleNamespace(environment=dict)
    assert gpu.Campaign.run_step(campaign, {}, 60.0) == ({"status": "measured"}, "")


def test_numbers_that_are_not_finite_are_seen():
    gpu_step = load("gpu_step")
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan")])
    whole = torch.tensor([7])  # a count is no number that could be infinite
    assert gpu_step.all_finite([good, whole, torch.ones(0)])
    assert not gpu_step.all_finite([good, bad])


def test_windows_hold_ten_steps_and_five_seconds():
    gpu_step = load("gpu_step")
    assert gpu_step.steps_per_window(0.1, None, on_gpu=True) == [13, 13, 12, 12]
    assert gpu_step.steps_per_window(9.0, None, on_gpu=True) == [3, 3, 2, 2]
    assert gpu_step.steps_per_window(9.0, 1, on_gpu=True) == [1]


def test_help_does_not_import_torch():
    code = f"import runpy, sys; sys.argv = ['gpu.py', '--minutes', 'x']; runpy.run_path({str(SCRIPT)!r})"
    run_python("-c", f"{code}; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules")
