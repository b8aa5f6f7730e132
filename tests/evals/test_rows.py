"""The text of a step is what the step was trained on."""

from __future__ import annotations

import pytest

from evals.rows import rows_of_step
from launch.cli import main


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
