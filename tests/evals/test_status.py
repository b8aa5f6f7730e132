"""`newcompute status` against what runs wrote: real ones, torn ones, and hand-written ones whose figures are known."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time

import pytest
from support import ROOT, read_metrics

from evals.runs import planned, read_run
from evals.status import lines, status_of
from launch.cli import main
from models.sizes import SIZES, flops_per_token
from train.config_sources import load_config
from train.run_folder import RunFolder


def row(step, at, **figures):
    plain = {"loss": 5.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": step * 2048, "tokens_per_second": 800.0,
             "tokens_per_second_per_device": 200.0, "mfu": None, "data_wait": 0.0, "memory_gib": 1.0}  # fmt: skip
    return json.dumps({"step": step} | plain | figures | {"time": at}) + "\n"


@pytest.fixture
def folder(tmp_path):
    """A run folder with a configuration of 100 steps on 4 processes and no rows."""
    config = load_config([], ["--run.dir", str(tmp_path), "--run.name", "run", "--training.steps", "100",
                              "--run.device", "cpu", "--data.source", "random"])  # fmt: skip
    RunFolder.of(config).write_config(config)
    return tmp_path / "run"


def commit(folder, step, **changes):
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"x" * 1000)
    (path / "commit.json").write_text(json.dumps({"step": step, "data": {}} | changes))
    return path


def test_a_finished_run(run_here, tmp_path, capsys):
    rows = run_here()
    last = [r for r in rows if "loss" in r][-1]
    validation = [r for r in rows if "val_loss" in r][-1]
    capsys.readouterr()
    main(["status", str(tmp_path / "run"), "--json"])
    (status,) = json.loads(capsys.readouterr().out)
    assert (status["state"], status["step"], status["total_steps"], status["progress"]) == ("finished", 20, 20, 1.0)
    for key in ("loss", "bits_per_byte", "tokens", "mfu"):
        assert status[key] == last[key]
    assert (status["val_loss"], status["val_step"]) == (validation["val_loss"], 20)
    assert (status["processes"], status["eta_seconds"]) == (1, 0.0)
    assert (status["checkpoint"]["step"], status["checkpoint"]["verified"]) == (20, False)
    assert status["checkpoint"]["bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / "step-00000020").iterdir()
    )
    main(["status", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "step         20 of 20 (100.0%)" in out
    assert f"{last['loss']:.4f}, {last['bits_per_byte']:.4f} bits per byte" in out
    assert "no figure for a CPU" in out
    assert "checkpoint   step 20" in out


def test_the_lock_and_the_last_row_tell_whether_it_lives(folder):
    lock = RunFolder(folder)
    (folder / "metrics.jsonl").write_text(row(1, 1000.0) + row(2, 1010.0))
    assert status_of(read_run(folder), 1020.0).state == "not running"
    lock.lock()
    try:
        os.utime(folder / ".lock", (1015.0, 1015.0))
        assert status_of(read_run(folder), 1020.0).state == "starting"  # the rows are those of an earlier job
        os.utime(folder / ".lock", (900.0, 900.0))
        assert status_of(read_run(folder), 1020.0).state == "running"
        late = status_of(read_run(folder), 1010.0 + 601.0)
        assert late.state == "silent"
        assert "usually every 10 s" in late.explanation
    finally:
        lock.unlock()
    assert status_of(read_run(folder), 1020.0).state == "not running"


def test_taking_the_lock_stamps_it_and_a_refused_job_does_not(folder):
    first, second = RunFolder(folder), RunFolder(folder)
    before = time.time() - 60
    first.lock()
    assert (folder / ".lock").stat().st_mtime > before
    os.utime(folder / ".lock", (900.0, 900.0))
    with pytest.raises(Exception, match="in use by another job"):
        second.lock()
    assert read_run(folder).started == 900.0
    first.unlock()


def test_a_look_at_the_lock_does_not_refuse_a_job(folder, monkeypatch):
    RunFolder(folder).lock()
    looking = open(folder / ".lock")  # noqa: SIM115
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("train.run_folder.time.sleep", lambda seconds: looking.close())
    job = RunFolder(folder)
    job.lock()
    assert read_run(folder).in_use
    job.unlock()


def test_time_left_leaves_out_the_hours_in_which_it_did_not_run(folder):
    rows = [row(step, 1000.0 + 2 * step) for step in range(10, 31, 2)]
    rows += [row(step, 9000.0 + 2 * step) for step in range(32, 51, 2)]
    (folder / "metrics.jsonl").write_text("".join(rows))
    status = status_of(read_run(folder), 9101.0)
    assert status.seconds_per_step == pytest.approx(2.0)
    assert status.eta_seconds == pytest.approx(100.0)
    assert status.processes == 4
    assert "50 of 100 (50.0%), 2 s per step, would take 1 min 40 s more" in "\n".join(lines(status, 9101.0))


def test_torn_and_foreign_lines_are_passed_over(folder):
    good = row(1, 1000.0) + row(2, 1001.0, loss=None, grad_norm=None)
    bad = '[1]\n"x"\n{}\n{"step": "3", "loss": 1}\n{"step": true, "loss": 1}\n{"step": -1, "loss": 1}\nnull\n'
    bad += "[" * 100_000 + '\n{"step": 3, "loss": NaN}\n{"step": 4, "loss": ' + "9" * 400 + ', "lr": "x"}\n'
    (folder / "metrics.jsonl").write_bytes(good.encode() + bad.encode() + b'\xff\xfe\n{"step": 5, "loss": 4.0, "gra')
    run = read_run(folder)
    assert [(r["step"], r["loss"]) for r in run.rows] == [(1, 5.0), (2, None), (3, None), (4, None)]
    assert status_of(run, 1002.0).loss is None
    assert "\n  loss         -" in "\n".join(lines(status_of(run, 1002.0), 1002.0))


def test_folders_with_next_to_nothing(tmp_path, capsys):
    started = tmp_path / "started"
    RunFolder(started).lock()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.toml").write_text('[nonsense]\nkey = "value"\n')
    main(["status", str(started), str(foreign), "--json"])
    first, second = json.loads(capsys.readouterr().out)
    assert (first["state"], first["step"], first["total_steps"], first["checkpoint"]) == ("not running", 0, None, None)
    assert "config.toml cannot be read" in second["problems"][0]
    for paths in ([started], [foreign], [started, foreign]):
        main(["status", *map(str, paths)])
    assert "checkpoint   none complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "there is no such folder"), ("empty", "is not a run folder")]
)
def test_what_is_no_run_is_refused(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as error:
        main(["status", str(tmp_path / name)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_checkpoints_are_told_apart(folder):
    commit(folder, 10, permanent=True, time=500.0, files={"a": 7, "b": 5})
    (commit(folder, 20, time=600.0) / "verified.json").write_text('{"time": 601.0}')
    (folder / "checkpoints" / "step-00000030").mkdir()
    (folder / "checkpoints" / "step-00000040.superseded").mkdir()
    run = read_run(folder)
    found = [(c.step, c.complete, c.permanent, c.verified) for c in run.checkpoints]
    assert found == [(10, True, True, False), (20, True, False, True), (30, False, False, False)]
    assert run.checkpoints[0].size == 12
    assert run.checkpoints[1].size > 1000
    status = status_of(run, 720.0)
    assert (status.checkpoint["step"], status.checkpoint["age_seconds"], status.checkpoint["verified"]) == (
        20,
        120,
        True,
    )
    assert status.unverified_steps == [10]


def test_checkpoints_elsewhere(tmp_path):
    import fsspec

    config = load_config(
        [], ["--run.dir", str(tmp_path), "--data.source", "random", "--checkpoint.dir", "memory://elsewhere"]
    )
    RunFolder.of(config).write_config(config)
    files = fsspec.filesystem("memory")
    files.pipe("/elsewhere/step-00000010/commit.json", b'{"step": 10, "time": 5.0, "files": {"x": 3}}')
    files.pipe("/elsewhere/step-00000010/verified.json", b"{}")
    (saved,) = read_run(tmp_path / "run").checkpoints
    assert (saved.step, saved.verified, saved.size, saved.time) == (10, True, 3, 5.0)


def test_a_storage_that_does_not_answer_is_told(tmp_path):
    config = load_config(
        [], ["--run.dir", str(tmp_path), "--data.source", "random", "--checkpoint.dir", "nonsense://x:y@z/a"]
    )
    RunFolder.of(config).write_config(config)
    status = status_of(read_run(tmp_path / "run"), 0.0)
    assert "cannot be read" in status.problems[0]
    assert "x:y" not in json.dumps([status.problems, status.checkpoint_folder])


def test_throughput_is_compared_with_the_printed_plan(tmp_path, capsys):
    flags = ["--run.dir", str(tmp_path), "--data.source", "random", "--training.global_batch_size", "64"]
    files = [str(ROOT / "configs" / "llama3_1b.toml")]
    config = load_config(files, flags, world_size=8)
    RunFolder.of(config).write_config(config)
    folder = RunFolder.of(config).path
    flops = flops_per_token(SIZES["llama3"]["1B"], config.training.sequence_length)
    rate = 20_000.0
    mfu = round(rate * flops / 989e12, 4)
    line = row(10, 1.0, tokens_per_second=8 * rate, tokens_per_second_per_device=rate, mfu=mfu)
    (folder / "metrics.jsonl").write_text(line)
    main(["plan", "--config", files[0], *flags, "--world-size", "8"])
    printed = float(re.search(r"([\d,]+) tokens/s/GPU", capsys.readouterr().out)[1].replace(",", ""))
    run = read_run(folder)
    assert planned(run).tokens_per_second == pytest.approx(printed, abs=0.5)
    status = status_of(run, 2.0)
    assert status.of_plan == pytest.approx(rate / printed, rel=1e-4)
    assert "H100 or H200" in status.plan_explanation


def test_events_do_not_move_the_terminal(folder):
    event = {"step": 3, "event": "spike", "message": "loss \x1b[2J 9.0", "time": 100.0}
    (folder / "metrics.jsonl").write_text("".join([row(3, 99.0), *[json.dumps(event) + "\n"] * 7]))
    text = "\n".join(lines(status_of(read_run(folder), 160.0), 160.0))
    assert "\x1b" not in text
    assert text.count("step 3, 1 min ago: spike: loss  [2J 9.0") == 5
    assert "the last 5 of 7 events" in text


def test_no_torch_is_imported(run_here, tmp_path):
    run_here(training__steps=5)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launch.cli", "status", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "finished" in done.stdout
    assert not {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & {"torch", "transformers"}
    assert read_metrics(tmp_path / "run")
