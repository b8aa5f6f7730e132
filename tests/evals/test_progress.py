"""Bars on a terminal only, gone when they are done, and libraries that keep quiet under a command."""

from __future__ import annotations

import io
import logging
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support import run_python

from evals import progress
from evals.progress import bar, forwards, library_bars
from train.quiet import OneLineOfRetries


@pytest.fixture
def screen(monkeypatch) -> io.StringIO:
    """What a terminal would be sent."""
    sent = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=sent, force_terminal=True, width=80))
    return sent


class Model(torch.nn.Module):
    def forward(self, input_ids):
        return input_ids


def test_tokens_that_a_model_reads_are_counted(screen, capsys):
    model = Model()
    with forwards(model, "clean", lambda: 48):
        model(torch.zeros(2, 12))
        model(input_ids=torch.zeros(2, 12))
    assert "100%" in screen.getvalue()
    assert "clean" in screen.getvalue()
    assert not model._forward_hooks
    assert capsys.readouterr() == ("", ""), "standard output may be a pipe while a terminal shows the bar"


def test_a_pipe_sees_no_bar(capsys):
    model = Model()
    with forwards(model, "clean", lambda: pytest.fail("nobody needs the total")), bar("tasks", 3) as advance:
        model(torch.zeros(2, 12))
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_bars_of_a_library_are_ours_and_end_with_it(screen):
    library = types.SimpleNamespace(tqdm="its own")
    with library_bars("arc", library):
        assert list(library.tqdm([1, 2], desc="requests")) == [1, 2]
        quiet = library.tqdm(total=7, disable=True)
        quiet.update(3)
        library.tqdm(total=5).update(2)  # and is never closed, as where an error comes between
    assert library.tqdm == "its own"
    assert "arc: requests" in screen.getvalue()
    assert "40%" in screen.getvalue()
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 2, "the cursor is back"


def test_retries_of_the_hub_are_one_line(capsys):
    hub = logging.Logger("huggingface_hub.utils._http")
    hub.addFilter(OneLineOfRetries())
    shown = logging.StreamHandler(io.StringIO())
    hub.addHandler(shown)
    for attempt in range(1, 6):
        hub.warning("'timed out' thrown while requesting HEAD https://huggingface.co/x")
        hub.warning(f"Retrying in 1s [Retry {attempt}/5].")
    hub.error("it has gone")
    assert capsys.readouterr().err == "newcompute: the Hugging Face Hub does not answer; trying again\n"
    assert shown.stream.getvalue() == "it has gone\n"


TASKS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
"""
CHOICE = "output_type: multiple_choice\ndoc_to_choice: [a dog, a cat]\ndoc_to_target: 1\nmetric_list: [{metric: acc}]\n"
PERPLEXITY = "output_type: loglikelihood\ndoc_to_target: a cat\nmetric_list: [{metric: perplexity}]\n"
"""Its standard error is found by drawing samples, of which lm-eval tells."""


def in_a_pipe(model: Path, *arguments: str) -> str:
    """Standard output of an evaluation, of which it is all."""
    done = run_python("-m", "launch.cli", "eval", "--model", str(model), "--device", "cpu", *arguments)
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith(f"{model}\n")
    return done.stdout


def test_a_command_in_a_pipe_prints_its_result_and_nothing_else(real_inputs, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a small dog. " * 20)
    in_a_pipe(real_inputs / "stories260K", "--text", str(tmp_path / "text.txt"))


@pytest.mark.slow
def test_tasks_in_a_pipe_print_their_result_and_nothing_else(real_inputs, tmp_path):
    """lm-eval draws bars in several of its modules, and prints where it draws samples."""
    (tmp_path / "data.jsonl").write_text('{"q": "Once upon a time there was"}\n' * 40)
    for name, kind in (("choice", CHOICE), ("likelihood", PERPLEXITY)):
        task = TASKS.format(name=name, file=tmp_path / "data.jsonl") + kind
        (tmp_path / f"{name}.yaml").write_text(task)
    found = in_a_pipe(real_inputs / "stories260K", "--tasks", "choice,likelihood", "--include-path", str(tmp_path))
    assert "perplexity_stderr,none" in found
    assert found.split()[1:3] == ["tasks", "(lm-eval)"]


def test_loggers_that_are_made_quiet_stay_so_when_torch_is_imported():
    """torch sets the level of its own as it is imported, and torchao made it warn in the middle of an export."""
    check = "import torch, logging; print(logging.getLogger('torch.utils._pytree').isEnabledFor(logging.WARNING))"
    code = f"from evals.quiet import quiet_libraries; quiet_libraries(); {check}"
    assert run_python("-c", code).stdout.split() == ["False"]
