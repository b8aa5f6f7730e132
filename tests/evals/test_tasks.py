"""lm-eval through `newcompute eval`, on a local task, offline."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from evals.held_out_task import write_task
from evals.models import load_model
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
    assert bits == pytest.approx(bits_by_hand(tmp_path / "run", tmp_path / "task" / "held_out.jsonl"), rel=1e-6)
    assert result["transforms"] == []
    main([*by_file[:4], "held_out", "--include-path", str(tmp_path / "task"), "--out", str(out)])
    assert json.loads(out.read_text())["tasks"]["held_out"]["bits_per_byte,none"] == pytest.approx(bits)


@torch.no_grad()
def bits_by_hand(run: Path, file: Path) -> float:
    """Every document behind one BOS, in windows of the context, bits per byte of all documents."""
    model = load_model(str(run), "cpu").model
    nats = total = 0.0
    for line in file.read_text().splitlines():
        data = json.loads(line)["text"].encode()
        ids = torch.tensor([256, *data])
        for start in range(0, len(data), 64):
            window = ids[start : start + 65] if start + 65 <= len(ids) else ids[-65:]
            losses = F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none")
            nats += losses[-min(64, len(data) - start) :].double().sum().item()
        total += len(data)
    return nats / total / math.log(2)
