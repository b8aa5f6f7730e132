"""Text from models: the published continuation, and a run against its export."""

from __future__ import annotations

import pytest

from evals.generate import generate
from evals.models import load_model
from launch.cli import main


def test_greedy_text_of_the_pretrained_model_is_the_published_one(real_inputs, capsys):
    folder = real_inputs / "stories260K"
    main(["generate", "--model", str(folder), "--prompt", "", "--max-new-tokens", "256", "--temperature", "0"])
    assert capsys.readouterr().out.strip() == (folder / "greedy.txt").read_text().strip()


def test_a_run_and_its_export_continue_alike(run_here, tmp_path):
    run_here(training__stop_after=5)
    main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "hf")])
    run, exported = load_model(str(tmp_path / "run"), "cpu"), load_model(str(tmp_path / "hf"), "cpu")
    checkpoint = load_model(str(tmp_path / "run" / "checkpoints" / "step-00000005"), "cpu")
    text = generate(run, "def f", 20)
    assert text.startswith("def f")
    assert len(text) > len("def f")
    assert generate(exported, "def f", 20) == text == generate(checkpoint, "def f", 20)


def test_temperature_draws_from_the_seed(real_inputs):
    model = load_model(str(real_inputs / "stories260K"), "cpu")
    first = generate(model, "Once", 30, temperature=1.0, seed=1)
    assert first == generate(model, "Once", 30, temperature=1.0, seed=1)
    assert first != generate(model, "Once", 30, temperature=1.0, seed=2)


def test_a_run_without_a_checkpoint_says_so(run_here, tmp_path, capsys):
    run_here(checkpoint__interval=0, training__stop_after=1)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--model", str(tmp_path / "run"), "--prompt", "x"])
    assert stopped.value.code == 2
    assert "no complete checkpoint" in capsys.readouterr().err
