"""The text of a step is what the step was trained on."""

from __future__ import annotations

import json

import pytest

from evals.rows import rows_of_step
from evals.runs import read_run
from evals.status import status_of
from launch.cli import main
from train import records
from train.export import open_trained
from train.row_counts import tokens_trained
from train.run_folder import RunFolder


def test_rows_are_those_that_were_trained_on(run_here, tmp_path, monkeypatch):
    from train.trainer import Trainer

    seen, train_step = {}, Trainer.train_step

    def noting(self, rows):
        seen[self.step + 1] = [bytes(i for i in row.tolist() if i < 256).decode("utf-8", "replace") for row in rows]
        return train_step(self, rows)

    monkeypatch.setattr(Trainer, "train_step", noting)
    run_here(training__steps=3, schedule__warmup_steps=0)
    for step in (1, 3):
        found = list(rows_of_step(tmp_path / "run", step))
        assert [number for number, _ in found] == list(range(8 * (step - 1), 8 * step))
        assert [text for _, text in found] == seen[step]


def test_rows_and_tokens_are_right_after_resumes_with_other_batch_sizes(run_here, tmp_path, monkeypatch):
    """Three run folders, each with another batch, each from the middle of the one before; one step is trained twice."""
    from train.trainer import Trainer

    seen, train_step = {}, Trainer.train_step

    def noting(self, rows):
        name = self.config.run.name
        seen.setdefault(name, dict(seen.get(before.get(name), {})))[self.step + 1] = [
            bytes(i for i in row.tolist() if i < 256).decode("utf-8", "replace") for row in rows
        ]
        return train_step(self, rows)

    monkeypatch.setattr(Trainer, "train_step", noting)
    before = {"b": "a", "c": "b"}
    shared = {"training__steps": 9, "schedule__warmup_steps": 0, "checkpoint__interval": 2, "checkpoint__keep": 9}
    run_here("a", **shared, training__global_batch_size=4, training__stop_after=4)
    for name, size, step, stop in (("b", 12, 2, 5), ("c", 6, 4, 6), ("c", 6, 6, 7)):
        resume = str(tmp_path / before[name] / "checkpoints" / f"step-{step:08d}")
        run_here(name, **shared, training__global_batch_size=size, training__stop_after=stop, checkpoint__resume=resume)
    sizes, rows = {"a": [4] * 4, "b": [4, 4, 12, 12, 12], "c": [4, 4, 12, 12, 6, 6, 6]}, 0
    for name, steps in sizes.items():
        path, rows = tmp_path / name, 0
        for step, size in enumerate(steps, start=1):
            found = list(rows_of_step(path, step))
            assert [number for number, _ in found] == list(range(rows, rows + size)), (name, step)
            assert [text for _, text in found] == seen[name][step], (name, step)
            rows += size
        opened = open_trained(path)
        length = opened.config.training.sequence_length
        assert tokens_trained(opened.commit.data, opened.commit.step, length) == rows * length
        assert opened.commit.data["rows_consumed"] == rows
        assert status_of(read_run(path), now=0.0).tokens == rows * length
        assert [row["tokens"] for row in RunFolder(path).metrics() if "loss" in row][-1] == rows * length


def test_a_run_without_a_record_is_believed_only_where_it_is_certain(run_here, tmp_path):
    """An earlier version trained on rows [(step - 1) B, step B), or in a resumed run on those and an offset."""
    length = {"training__steps": 6, "schedule__warmup_steps": 0, "checkpoint__interval": 3}
    run_here("old", **length)
    path = tmp_path / "old"
    (path / "rows.json").unlink()
    commit = path / "checkpoints" / "step-00000006" / "commit.json"
    record = json.loads(commit.read_text())
    del record[records.SEAL], record["data"]["stretches"]
    commit.write_text(json.dumps(record | {"data": record["data"] | {"rows_consumed": 40}}))
    metrics = path / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] > 3 or "loss" not in row))
    assert [number for number, _ in rows_of_step(path, 6)] == list(range(32, 40))
    with pytest.raises(ValueError, match="--step 2: what steps up to 3 trained on is not recorded"):
        list(rows_of_step(path, 2))
    for folder in (path / "checkpoints").iterdir():
        (folder / "commit.json").unlink()
    with pytest.raises(ValueError, match="does not say which rows its steps had"):
        list(rows_of_step(path, 6))


def test_rows_of_another_corpus_are_refused(run_here, tmp_path):
    run_here("a", training__steps=1, schedule__warmup_steps=0)
    file = tmp_path / "a" / "rows.json"
    record = json.loads(file.read_text())
    del record[records.SEAL]
    file.write_text(json.dumps(record | {"fingerprint": "another"}))
    with pytest.raises(ValueError, match=r"is not the one that .* trained on"):
        list(rows_of_step(tmp_path / "a", 1))


def test_a_length_in_tokens_counts_what_other_batches_had(run_here, tmp_path):
    shared = {"training__tokens": 40 * 64, "training__steps": None, "schedule__warmup_steps": 0}
    run_here("a", **shared, training__global_batch_size=4, training__stop_after=4, checkpoint__interval=4)
    run_here("b", **shared, training__global_batch_size=8, checkpoint__resume=str(tmp_path / "a"))
    run = read_run(tmp_path / "b")
    assert (run.step, run.total_steps, run.tokens) == (7, 7, 40 * 64)


def test_the_command_prints_them_and_refuses_what_has_none(run_here, tmp_path, capsys):
    run_here(training__steps=1, schedule__warmup_steps=0)
    main(["rows", "--run", str(tmp_path / "run"), "--step", "1"])
    assert capsys.readouterr().out.count("== row ") == 8
    run_here(
        "random",
        training__steps=1,
        schedule__warmup_steps=0,
        data__source="random",
        data__paths=None,
        validation__interval=0,
    )
    with pytest.raises(SystemExit) as end:
        main(["rows", "--run", str(tmp_path / "random"), "--step", "1"])
    assert end.value.code == 2
    assert "random ids, which has no rows" in capsys.readouterr().err
