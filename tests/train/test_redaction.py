"""Secrets stay out of logs, stored configurations and metrics."""

from __future__ import annotations

import json

import pytest

from launch.cli import main
from train.config_sources import ConfigError, load_config
from train.redaction import find_secret, redact

HUB = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx"
AWS = "AKIA" + "ABCDEFGHIJKLMNOP"
SECRETS = {
    f"s3://{AWS}:wJalrXUtnFEMI@bucket/runs": "s3://***@bucket/runs",
    "https://user:pass@host/a?b=1": "https://***@host/a?b=1",
    f"login with {HUB} failed": "login with *** failed",
    "GET https://h/x?X-Amz-Signature=abc123&y=2": "GET https://h/x?X-Amz-Signature=***&y=2",
    "Authorization: Bearer abcdefghijklmnop1234": "Authorization: Bearer ***",
    "WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567": "WANDB_API_KEY=***",
    '{"aws_secret_access_key": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"}': '{"aws_secret_access_key": "***"}',
}


@pytest.mark.parametrize(("text", "clean"), SECRETS.items())
def test_secrets_become_stars(text, clean):
    assert redact(text, {}) == clean
    assert find_secret({"a": [text]})
    assert redact(clean, {}) == clean


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/runs/step-00000100",
        "--tokenizer.path /data/llama3/tokenizer.model --training.tokens 1e9",
        "the tokenizer has 128256 ids; fingerprint 9f86d081884c7d659a2feaa0c55ad015",
        "a long token: 17 of 20",
        "HuggingFaceFW/fineweb-edu@main",
    ],
)
def test_ordinary_text_stays(text):
    assert redact(text, {}) == text
    assert not find_secret(text)


def test_values_of_the_environment_are_found_wherever_they_stand():
    environment = {"MY_SERVICE_TOKEN": "correct-horse-battery", "HOME": "/home/somebody", "SHORT_TOKEN": "abc"}
    assert (
        redact("got correct-horse-battery from /home/somebody, abc", environment) == "got *** from /home/somebody, abc"
    )


def test_a_configuration_with_a_secret_is_refused_without_showing_it(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text(f'[checkpoint]\ndir = "s3://{AWS}:wJalrXUtnFEMI@bucket/x"\n[data]\ndataset = "{HUB}"\n')
    with pytest.raises(ConfigError) as refused:
        load_config([str(file)], ["--no.such", HUB])
    text = str(refused.value)
    assert "checkpoint.dir" in text
    assert "data.dataset" in text
    assert "set the environment" in text
    assert not any(secret in text for secret in (AWS, "wJalrXUtnFEMI", HUB))


def test_a_run_prints_and_stores_no_secret(tmp_path, run_here, capsys, monkeypatch):
    """A value of the environment in the command line, and in an event."""
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    monkeypatch.setattr("sys.argv", ["train/main.py", "correct-horse-battery", HUB])
    run_here(training__steps=2, schedule__warmup_steps=1, validation__interval=0)
    assert "train/main.py *** ***" in capsys.readouterr().out
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"correct-horse-battery" not in path.read_bytes(), path
            assert HUB.encode() not in path.read_bytes(), path


def test_events_are_stored_and_shown_without_secrets(tmp_path, capsys):
    from train.metrics import Recorder

    recorder = Recorder(load_config([], [], 1), tmp_path, True, 10, 1)
    recorder.event(3, "checkpoint", f"PUT https://h/x?token={HUB}&x: 403")
    recorder.close()
    [row] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["message"] == "PUT https://h/x?token=***&x: 403"
    assert HUB not in capsys.readouterr().out


def test_errors_of_the_command_show_none(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--model", f"no/such-{HUB}", "--text", __file__])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert "no/such-" in shown.err
    assert HUB not in shown.out + shown.err
