"""lm-eval through `newcompute eval`, on a local task, offline."""

from __future__ import annotations

import json

import pytest

from evals.held_out_task import write_task
from launch.cli import main


def test_a_local_task_runs_offline_and_lands_in_the_json(run_here, task_index, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    run_here(training__stop_after=10)
    _, task = write_task(tmp_path / "run", tmp_path / "task", limit=1)
    out = tmp_path / "eval.json"
    by_file = ["eval", "--model", str(tmp_path / "run"), "--tasks", str(task), "--out", str(out)]
    main(by_file)
    result = json.loads(out.read_text())
    bits = result["tasks"]["held_out"]["bits_per_byte,none"]
    # Ten steps of training: better than the 8 bits of knowing nothing, far from good.
    assert 4.0 < bits < 8.0
    assert result["transforms"] == []
    main([*by_file[:4], "held_out", "--include-path", str(tmp_path / "task"), "--out", str(out)])
    assert json.loads(out.read_text())["tasks"]["held_out"]["bits_per_byte,none"] == pytest.approx(bits)
