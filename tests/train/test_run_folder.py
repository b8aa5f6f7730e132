"""Who may continue a run, and what is cut from its metrics."""

from __future__ import annotations

import json

import pytest

import train.run_folder
from train.config_sources import load_config, to_toml
from train.run_folder import RunFolder, RunFolderError

BASE = ["--run.name", "test", "--training.steps", "200", "--data.sources", '[{source = "embedded"}]']


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """The folder of a run that was started with `BASE`."""
    config = load_config([], ["--run.dir", str(tmp_path), *BASE])
    run = RunFolder.of(config)
    run.write_config(config)
    return run


def check(folder: RunFolder, *flags: str) -> None:
    """Start the same run again, with more flags."""
    file = folder.path.parent / "again.toml"
    file.write_text(to_toml(load_config([], ["--run.dir", str(folder.path.parent), *BASE])))
    folder.check(load_config([str(file)], flags))


def refusal(folder: RunFolder, *flags: str) -> str:
    with pytest.raises(RunFolderError) as error:
        check(folder, *flags)
    return str(error.value)


# The configuration


def test_a_run_is_kept_under_its_directory_and_name(tmp_path, folder):
    assert folder.path == tmp_path / "test"
    assert folder.config_file == tmp_path / "test" / "config.toml"
    assert load_config([str(folder.config_file)]) == load_config([], ["--run.dir", str(tmp_path), *BASE])
    assert folder.read_config() == load_config([str(folder.config_file)])


def test_an_empty_folder_and_the_same_configuration_are_accepted(tmp_path, folder):
    check(RunFolder(tmp_path / "new"))
    check(folder)
    check(folder, "--run.seed", "1234", "--optimizer.lr", "1e-3")  # the defaults, spelt out


ALLOWED = [
    ["--training.steps", "500"],
    ["--training.tokens", "1e6"],
    ["--training.tokens_per_parameter", "20"],
    ["--training.stop_after", "50"],
    ["--training.micro_batch_size", "2"],
    ["--parallel.replicate", "1", "--parallel.shard", "-1"],
    ["--parallel.reshard_after_forward"],
    ["--compile.enabled", "false"],
    ["--activation_checkpointing.mode", "full"],
    ["--checkpoint.interval", "7", "--checkpoint.keep", "5", "--checkpoint.resume", "100"],
    ["--metrics.log_interval", "1", "--metrics.wandb"],
    ["--profiling.trace_step", "5", "--profiling.ranks", "all"],
    ["--run.device", "cpu", "--data.dir", "elsewhere"],
]


@pytest.mark.parametrize("flags", ALLOWED, ids=lambda flags: flags[0])
def test_length_layout_and_watching_may_change(folder, flags):
    check(folder, *flags)


REFUSED = {
    "run.seed": "5",
    "run.deterministic": "true",
    "model.size": "60M",
    "model.shape.dim": "256",
    "tokenizer.kind": "bytes",
    "data.sources": '[{source = "files", paths = ["a.txt"]}]',
    "training.global_batch_size": "16",
    "training.sequence_length": "128",
    "training.max_grad_norm": "0.5",
    "optimizer.lr": "0.1",
    "schedule.warmup_steps": "5",
    "schedule.name": "wsd",
    "precision.compute": "bfloat16",
    "validation.interval": "7",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_changes_the_result_may_not_change(folder, key):
    message = refusal(folder, f"--{key}", REFUSED[key])
    assert f"{folder.path} holds a run with another configuration" in message
    assert [line.strip().partition(":")[0] for line in message.splitlines() if " there, " in line] == [key]


def test_every_difference_is_listed_with_both_values(folder):
    message = refusal(folder, "--run.seed", "5", "--optimizer.lr", "0.5", "--training.steps", "300")
    assert "run.seed: 1234 there, 5 now" in message
    assert "optimizer.lr: 0.001 there, 0.5 now" in message
    assert "training.steps" not in message
    assert "Choose another run.name" in message


@pytest.mark.parametrize("content", ["[run", "[run]\nunknown = 1", "[run]\nseed = 'x'", "\xff"])
def test_an_unreadable_configuration_is_named(folder, content):
    folder.config_file.write_bytes(content.encode("latin-1"))
    assert str(folder.config_file) in refusal(folder)


def test_writing_is_all_or_nothing(folder, monkeypatch):
    before = folder.config_file.read_text()

    def fail(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(train.run_folder.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        folder.write_config(load_config([], ["--run.seed", "99"]))
    assert folder.config_file.read_text() == before


# Metrics


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = [
    {"step": 1, "loss": 5.0, "lr": 1e-5},
    {"step": 2, "loss": 4.0},
    {"step": 2, "val_loss": 4.2},
    {"step": 3, "loss": 3.5},
    {"step": 4, "loss": 3.0},
]


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (100, 5)])
def test_rows_beyond_the_checkpoint_are_cut_and_others_stay_as_they_are(folder, step, kept):
    folder.metrics_file.write_text(lines(*ROWS))
    folder.cut_metrics_after(step)
    assert folder.metrics_file.read_text() == lines(*ROWS[:kept])
    assert not list(folder.path.glob("*.tmp"))


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4', "{", '{"step"', '{"loss": 1.0}', "4", '"x"', "\n\n"])
def test_a_torn_last_line_is_dropped(folder, torn):
    folder.metrics_file.write_text(lines(*ROWS[:4]) + torn)
    folder.cut_metrics_after(10)
    assert folder.metrics_file.read_text() == lines(*ROWS[:4])


def test_a_whole_last_line_without_its_end_is_completed(folder):
    """Otherwise the next row would be written onto it."""
    folder.metrics_file.write_text(lines(*ROWS[:3]).rstrip("\n"))
    folder.cut_metrics_after(10)
    assert folder.metrics_file.read_text() == lines(*ROWS[:3])


def test_a_run_without_metrics_stays_without(folder):
    folder.cut_metrics_after(3)
    assert not folder.metrics_file.exists()
