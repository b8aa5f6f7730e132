"""Runs that trace some of their steps: which steps, which processes, what is written, and that training does not change."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.profiler
from support import fork_python, losses, read_metrics, tiny_flags

from train import trace_text
from train.config import ProfilingConfig
from train.config_sources import ConfigError, load_config
from train.profiling import StepProfiler
from train.trace_summary import summarize

SHORT = {"training__steps": 8, "checkpoint__interval": 0, "validation__interval": 0}


def traced_steps(file: Path) -> list[int]:
    """The steps marked in a trace, read without the code under test."""
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [int(e["name"].partition("#")[2]) for e in events if e["name"].startswith("ProfilerStep#")]


def profiles(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "profiles").iterdir()) if (run / "profiles").exists() else []


# Runs


@pytest.mark.parametrize(
    ("trace_step", "trace_steps", "expected"),
    [(4, 3, [4, 5, 6]), (1, 2, [1, 2]), (2, 1, [2]), (8, 1, [8]), (7, 5, [7, 8])],
)
def test_the_steps_asked_for_are_traced(run_here, tmp_path, capsys, trace_step, trace_steps, expected):
    run_here(profiling__trace_step=trace_step, profiling__trace_steps=trace_steps, **SHORT)
    assert profiles(tmp_path / "run") == [f"trace-step-{trace_step:08}-rank-0.json.gz"]
    file = tmp_path / "run" / "profiles" / profiles(tmp_path / "run")[0]
    assert traced_steps(file) == expected
    assert trace_text.trace_text(summarize(file)) in capsys.readouterr().out


def test_each_traced_step_holds_one_forward_and_backward_of_the_model(run_here, tmp_path):
    run_here(profiling__trace_step=3, profiling__trace_steps=2, training__micro_batch_size=4, **SHORT)
    found = summarize(tmp_path / "run" / "profiles" / "trace-step-00000003-rank-0.json.gz")
    calls = {row.name: row.count for row in found.top}
    layers, micro_batches, steps = 2, 2, 2
    # Attention: a forward and a backward per layer and micro-batch, and no step more than the two.
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == layers * micro_batches * steps
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == layers * micro_batches * steps
    assert found.computing_ms + found.exposed_communication_ms + found.idle_ms == pytest.approx(found.ms)


def test_tracing_changes_no_loss(run_here):
    assert losses(run_here("plain", **SHORT)) == losses(run_here("traced", profiling__trace_step=2, **SHORT))


def test_without_a_step_to_trace_the_profiler_is_never_made(run_here, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("made")

    monkeypatch.setattr(torch.profiler, "profile", refuse)
    run_here(**SHORT)
    assert not (tmp_path / "run" / "profiles").exists()
    with pytest.raises(AssertionError, match="made"):
        run_here("other", profiling__trace_step=2, **SHORT)


def test_a_start_beyond_the_step_traces_nothing(run_here, tmp_path):
    first = SHORT | {"checkpoint__interval": 4}
    run_here(training__stop_after=4, **first)
    run_here(profiling__trace_step=3, **first)
    assert profiles(tmp_path / "run") == []


def test_a_resumed_run_counts_steps_from_the_run_s_beginning(run_here, tmp_path):
    first = SHORT | {"checkpoint__interval": 4}
    run_here(training__stop_after=4, **first)
    run_here(profiling__trace_step=5, profiling__trace_steps=2, **first)
    (name,) = profiles(tmp_path / "run")
    assert traced_steps(tmp_path / "run" / "profiles" / name) == [5, 6]


def test_memory_snapshots_on_a_cpu_are_refused_in_words(run_here, tmp_path, capsys):
    run_here(profiling__memory_step=3, **SHORT)
    assert "on CPU no snapshot is written" in capsys.readouterr().out
    assert profiles(tmp_path / "run") == []


def test_a_folder_that_cannot_be_written_costs_the_trace_and_not_the_run(run_here, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profiles").write_text("in the way")
    rows = run_here(profiling__trace_step=3, **SHORT)
    assert rows[-1]["step"] == 8
    assert "could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), RuntimeError("no trace")])
def test_a_trace_that_is_cut_short_leaves_no_file(run_here, tmp_path, capsys, monkeypatch, problem):
    def export(profile, path):
        Path(path).write_text("{")
        raise problem

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    rows = run_here(profiling__trace_step=3, **SHORT)
    assert rows[-1]["step"] == 8
    assert profiles(tmp_path / "run") == []
    assert str(problem) in capsys.readouterr().err


@pytest.mark.parametrize(("ranks", "written"), [("main", [0]), ("all", [0, 1])])
def test_two_processes_show_their_communication(tmp_path, text_corpus, ranks, written):
    flags = tiny_flags(
        tmp_path, text_corpus, profiling__trace_step=3, profiling__ranks=ranks, parallel__shard=2, **SHORT
    )
    fork_python(tmp_path, "launch/cli.py", "prepare", *flags)
    said = fork_python(tmp_path, "train/main.py", *flags, processes=2).stdout
    assert profiles(tmp_path / "run") == [f"trace-step-00000003-rank-{rank}.json.gz" for rank in written]
    for rank in written:
        file = tmp_path / "run" / "profiles" / f"trace-step-00000003-rank-{rank}.json.gz"
        found = summarize(file)
        assert (found.device, found.rank, found.world_size, found.steps) == ("cpu", rank, 2, [3, 4, 5])
        raw = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        transfers = [e for e in raw if e.get("ph") == "X" and e["name"].startswith("gloo:")]
        assert {row.name for row in found.communication} == {e["name"] for e in transfers}
        # The embedding and head and two blocks are gathered in each step, and their gradients reduced.
        assert sum(row.count for row in found.communication) >= 3 * 2 * 3
        longest = max(e["dur"] for e in transfers) / 1e3
        assert longest <= found.communication_ms + 1e-6 <= found.ms
        assert 0 < found.exposed_communication_ms <= found.communication_ms
        assert found.computing_ms + found.exposed_communication_ms + found.idle_ms == pytest.approx(found.ms)
        assert (trace_text.trace_text(found) in said) == (rank == 0)
    assert losses(read_metrics(tmp_path / "run"))[-1][0] == 8


# Memory snapshots and endings, with the allocator's history replaced: it needs a GPU


@pytest.fixture
def history(monkeypatch) -> list[str]:
    """What is done to the allocator's history, in order."""
    done: list[str] = []

    def dump(path):
        done.append("dump")
        Path(path).write_bytes(b"snapshot")

    def record(enabled="all", **_):
        done.append("on" if enabled else "off")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return done


def make_profiler(folder: Path, done: int = 0, rank: int = 0, device: str = "cuda", **settings) -> StepProfiler:
    mesh = SimpleNamespace(rank=rank, is_main=rank == 0, device=torch.device(device))
    return StepProfiler(ProfilingConfig(**settings), folder, mesh, lambda text: None, done, 10)  # type: ignore[arg-type]


def test_a_memory_snapshot_is_of_its_step_alone(tmp_path, history):
    profiler = make_profiler(tmp_path, memory_step=3)
    profiler.start()
    seen = [(step, profiler.end_step(step), list(history)) for step in range(1, 6)]
    profiler.close()
    off = ["on", "dump", "off"]
    assert seen == [(1, False, []), (2, False, ["on"]), (3, True, off), (4, False, off), (5, False, off)]
    assert [file.name for file in tmp_path.iterdir()] == ["memory-step-00000003-rank-0.pickle"]


@pytest.mark.parametrize("settings", [{"rank": 1}, {"done": 3}, {"device": "cpu"}])
def test_other_processes_later_starts_and_cpus_keep_no_history(tmp_path, history, settings):
    profiler = make_profiler(tmp_path, memory_step=3, **settings)
    profiler.start()
    assert not any(profiler.end_step(step) for step in range(settings.get("done", 0) + 1, 6))
    assert history == []


def run_out_of_memory(profiler: StepProfiler) -> None:
    try:
        profiler.start()
        raise torch.OutOfMemoryError("CUDA out of memory")
    finally:
        profiler.close()


def test_a_step_that_runs_out_of_memory_leaves_its_snapshot(tmp_path, history):
    with pytest.raises(torch.OutOfMemoryError):
        run_out_of_memory(make_profiler(tmp_path, memory_step=1))
    assert history == ["on", "dump", "off"]
    assert [file.name for file in tmp_path.iterdir()] == ["memory-step-00000001-out-of-memory-rank-0.pickle"]


@pytest.mark.parametrize("ended", [0, 1, 2])
def test_a_run_that_ends_before_the_last_traced_step_leaves_nothing_behind(tmp_path, ended):
    said: list[str] = []
    profiler = make_profiler(tmp_path, device="cpu", trace_step=2)
    profiler.say = said.append
    profiler.start()
    for step in range(1, ended + 1):
        profiler.end_step(step)
    profiler.close()
    assert list(tmp_path.iterdir()) == []
    assert "no trace is written" in said[0]
    again = make_profiler(tmp_path, device="cpu", trace_step=1, trace_steps=1)  # the profiler was left as it was found
    again.start()
    torch.ones(3).add(1)
    assert again.end_step(1)
    again.close()
    (file,) = tmp_path.iterdir()
    assert traced_steps(file) == [1]


# Settings


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("trace_step", "21", "beyond the last step, 20"),
        ("memory_step", "21", "beyond the last step, 20"),
        ("trace_step", "-1", "at least 0"),
        ("trace_steps", "0", "greater than 0"),
        ("trace_steps", "101", "at most 100"),
        ("ranks", "some", "'main' or 'all'"),
        ("trace_stepp", "1", "trace_step"),
    ],
)
def test_nonsense_is_refused(tmp_path, text_corpus, key, value, words):
    with pytest.raises(ConfigError) as error:
        load_config([], [*tiny_flags(tmp_path, text_corpus), f"--profiling.{key}", value])
    assert f"profiling.{key}" in str(error.value)
    assert words in str(error.value)


def test_the_last_step_itself_may_be_traced(tmp_path, text_corpus):
    load_config(
        [], [*tiny_flags(tmp_path, text_corpus), "--profiling.trace_step", "20", "--profiling.memory_step", "20"]
    )
