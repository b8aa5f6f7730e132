"""The command line as a user meets it: help without torch, plans, and every bad input with its message."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from support import ROOT, fork_python, run_python, tiny_flags

from launch.cli import EXAMPLES, _parser, main
from train.config_sources import load_config, split_arguments


@pytest.mark.parametrize(
    "arguments",
    [["train/main.py", "--help"], ["-m", "launch.cli", "--help"], ["-m", "launch.cli", "plan", "--help"],
     ["-m", "launch.cli", "prepare", "--help", "transforms.optical"], ["-m", "launch.cli", "eval", "--help"]],
)  # fmt: skip
def test_help_does_not_import_torch(arguments):
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pydantic" in imported or "argparse" in imported
    assert not imported & {"torch", "transformers", "datasets", "lm_eval", "numpy"}


def test_every_command_has_a_line_and_an_example(capsys):
    for arguments in (["--help"], *([name, "--help"] for name in EXAMPLES)):
        with pytest.raises(SystemExit) if arguments[0] not in ("plan", "prepare") else nullcontext():
            main(arguments)
        out = capsys.readouterr().out
        names = EXAMPLES if arguments == ["--help"] else arguments[:1]
        assert all(EXAMPLES[name].splitlines()[0] in out for name in names), arguments
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "newcompute COMMAND --help" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_command_lines_that_parse(name):
    words = shlex.split(EXAMPLES[name].replace("\\\n", " "))
    assert words[:2] == ["newcompute", name]
    if name in ("plan", "prepare"):
        files, _, flags = split_arguments(words[2:], ["--world-size", "--gpu"])
        load_config([str(ROOT / file) for file in files], flags)
    else:
        _parser().parse_args(words[1:])
    assert all((ROOT / word).exists() for word in words if word.startswith("configs/"))


def test_a_missing_package_says_how_to_install():
    """`-S` leaves out site-packages: what a system's Python without the packages sees."""
    for script in ("train/main.py", "launch/cli.py", "launch/elastic.py"):
        done = subprocess.run([sys.executable, "-S", script, "status"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "is not installed" in done.stderr
        assert "make setup" in done.stderr
        assert "Traceback" not in done.stderr


def test_local_sh_keeps_the_folder_it_is_called_from(tmp_path):
    (tmp_path / "mine.toml").write_text("[training]\nstepz = 3\n")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(ROOT / "launch" / "local.sh"), "1", "--config", "mine.toml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "mine.toml: training.stepz = 3" in done.stderr
    for wrong in ([], ["--config", "mine.toml"], ["0"]):
        done = subprocess.run([command[0], *wrong], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr[:6]) == (2, "usage:")


def test_plan_shows_the_published_arithmetic(capsys):
    main(["plan", "--config", str(ROOT / "configs" / "clm_60m.toml"), "--world-size", "8"])
    out = capsys.readouterr().out
    assert "7,075 steps" in out
    assert "82,101,120; without input embedding 63,226,752" in out
    assert "8 processes = replicate 8" in out


GPUS_OF = {"llama3_70b": 64, "llama3_405b": 512}


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_plans_and_fits(config, capsys):
    main(["plan", "--config", str(config), "--world-size", str(GPUS_OF.get(config.stem, 8)), "--gpu", "h100"])
    out = capsys.readouterr().out
    assert "iB per device" in out
    assert "(estimate); fits 80 GiB" in out


@pytest.mark.parametrize(
    "flags", [[], ["--config", str(ROOT / "configs" / "quickstart.toml"), "--world-size", "2"], ["--run.device", "cpu"]]
)
def test_a_plan_for_a_cpu_speaks_of_no_gpu(flags, capsys, monkeypatch):
    monkeypatch.setattr("train.plan.gpu_here", lambda: "")
    main(["plan", *flags])
    out = capsys.readouterr().out
    assert "device       CPU" in out
    assert "this machine has" in out
    assert "not estimated on a CPU" in out
    assert "float32" in out
    for word in ("NVLink", "80 GiB", "0.0 seconds", "tokens/s/GPU", "MFU", "TFLOP"):
        assert word not in out, word
    assert ("none given" in out) == ("--config" not in flags)


@pytest.mark.parametrize(
    ("flags", "here", "device"),
    [
        (["--gpu", "a100"], "", "one A100, as the options say"),
        (["--mfu", "0.3"], "", "one H100, as the options say"),
        ([], "NVIDIA H200", "one H200: this machine has an NVIDIA H200"),
        (
            [],
            "NVIDIA GeForce RTX 4090",
            "assumed: one H100; there are no figures of this machine's NVIDIA GeForce RTX 4090",
        ),
        (["--model.name", "llama3"], "", "assumed: one H100; there is no GPU here, and 9."),
        (["--run.device", "cpu"], "NVIDIA H200", 'CPU (run.device = "cpu"'),
        (["--run.device", "cuda"], "", "assumed: one H100; there is no GPU here"),
    ],
)
def test_a_plan_says_which_device_it_is_for(flags, here, device, capsys, monkeypatch):
    monkeypatch.setattr("train.plan.gpu_here", lambda: here)
    main(["plan", "--data.source", "random", *flags])
    out = capsys.readouterr().out
    assert f"device       {device}" in out
    assert ("not estimated on a CPU" in out) == device.startswith("CPU")


def test_a_plan_says_what_shape_it_is(capsys):
    main(["plan", "--data.source", "random", "--model.size", "60M", "--model.shape.dim", "768", "--gpu", "h100"])
    assert "model        clm 60M, custom shape (dim): dim 768, 22 layers" in capsys.readouterr().out


def test_a_plan_with_assumptions_of_its_own(capsys):
    main(
        [
            "plan",
            "--config",
            str(ROOT / "configs" / "llama3_8b.toml"),
            "--world-size",
            "8",
            "--gpu",
            "a100",
            "--gpu-memory",
            "40",
        ]
    )
    out = capsys.readouterr().out
    assert "DOES NOT FIT 40 GiB" in out
    assert "on 8 A100 (estimate)" in out
    assert "of 312 TFLOP/s" in out


def test_suggestions_are_a_table_and_toml(capsys, tmp_path):
    config = str(ROOT / "configs" / "llama3_8b.toml")
    main(["plan", "--suggest", "--config", config])
    out = capsys.readouterr().out
    assert "for 8 x H100 with 80 GiB" in out
    (tmp_path / "layout.toml").write_text(out.partition("as TOML:")[2])
    main(["plan", "--config", config, "--config", str(tmp_path / "layout.toml"), "--world-size", "8"])
    assert "(estimate); fits 80 GiB" in capsys.readouterr().out


BAD_INPUTS = {
    "unknown key": (
        ["--training.stepz", "5"],
        "flag --training.stepz: training.stepz = 5\n      unknown key; did you mean training.steps?",
    ),
    "wrong type": (["--training.steps", "many"], 'training.steps = "many"\n      expected a whole number'),
    "missing file": (
        ["--config", "no/such.toml"],
        "no/such.toml\n      cannot read this file: No such file or directory",
    ),
    "batch that does not divide": (
        ["--training.micro_batch_size", "3"],
        "not a multiple of 1 data-parallel processes x training.micro_batch_size 3 = 3; the nearest that is: 9",
    ),
    "world size that does not divide": (
        ["--parallel.shard", "3"],
        "3 does not divide the 1 running processes; the nearest that does: 1",
    ),
    "no such step": (["--checkpoint.resume", "7"], "checkpoint.resume = 7: there is no such step"),
    "no GPU": (["--run.device", "cuda"], 'run.device = "cuda", but PyTorch sees no CUDA GPU here'),
    "missing text": (["--data.paths", '["no/such/*.txt"]'], "data.paths: no such folder: no/such (seen from"),
    "missing tokenizer": (
        ["--tokenizer.kind", "hf", "--tokenizer.path", "./tok"],
        "tokenizer: no such folder: tok (seen from",
    ),
    "no tokenizer file": (
        ["--tokenizer.kind", "tiktoken", "--tokenizer.path", "no/tokenizer.model"],
        "cannot read the tiktoken file no/tokenizer.model",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_ends_with_exit_code_2_and_a_message(name, tmp_path, text_corpus):
    flags, message = BAD_INPUTS[name]
    done = fork_python(tmp_path, "train/main.py", *tiny_flags(tmp_path, text_corpus), *flags, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "a run that cannot start leaves no folder"


def test_two_processes_say_it_once(tmp_path, text_corpus):
    flags = tiny_flags(tmp_path, text_corpus, training__global_batch_size=7)
    done = run_python("train/main.py", *flags, processes=2, check=False)
    assert done.returncode != 0
    assert done.stderr.count("not a multiple of 2 data-parallel processes; the nearest that is: 8") == 1
    last = [line for line in done.stderr.splitlines() if line.strip("= ")][-1]
    assert "not a multiple of 2 data-parallel processes" in last, "torchrun's table ends with our message"
    assert "exitcode  : 75" not in done.stderr


def test_empty_text_file_is_named(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--data.dir", str(tmp_path / "data"), "--tokenizer.kind", "bytes", "--data.source", "files",
              "--data.paths", f'["{tmp_path}/*.txt"]'])  # fmt: skip
    assert stopped.value.code == 2
    assert f"there is no text to train on in {tmp_path / 'empty.txt'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--mfu", "7"], "expected a share above 0 and at most 1"),
        (["plan", "--world-size", "0"], "expected a positive number"),
        (["plan", "--gpu", "tpu"], "expected one of h100, h200, a100, b200"),
        (["plan", "--gpu-memory", "-1"], "expected a positive number"),
        (
            ["plan", "--model.init_from", "hf:{inputs}/stories260K", "--training.sequence_length", "999"],
            "context of 512",
        ),
        (["plan", "--model.init_from", "hf:outputs/none"], "no such folder: outputs/none (seen from"),
        (["export", "--run", "no/such/run", "--out", "x"], "neither a run folder"),
        (["generate", "--model", "{inputs}/stories260K", "--temperature", "-1"], "at least 0"),
        (["generate", "--model", "{inputs}/stories260K", "--device", "cuda"], "PyTorch sees no CUDA GPU here"),
        (["eval", "--model", "{inputs}/stories260K", "--text", __file__, "--context", "0"], "at least 1"),
        (["eval", "--model", "{inputs}/stories260K", "--text", __file__, "--context", "9999"], "at most 512 tokens"),
    ],
)
def test_bad_options_of_the_commands_are_refused(arguments, message, real_inputs, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(inputs=real_inputs) if "{" in argument else argument for argument in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_damaged_model_file_is_named(real_inputs, tmp_path, capsys):
    import shutil

    shutil.copytree(real_inputs / "stories260K", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--model", str(tmp_path / "model")])
    assert stopped.value.code == 2
    assert str(tmp_path / "model") in capsys.readouterr().err


@pytest.mark.slow  # the watchdog's tests have fast ones of processes that fail alone
def test_a_process_that_fails_alone_says_so(tmp_path, text_corpus):
    """The stream's second file is read by the second process only."""
    folder = tmp_path / "text"
    folder.mkdir()
    good = '{"text": "' + "words and words " * 400 + '"}\n'
    (folder / "a.jsonl").write_text(good * 20)
    (folder / "b.jsonl").write_text("{broken\n")
    flags = tiny_flags(
        tmp_path, text_corpus, data__paths=f'["{folder}/*.jsonl"]', data__streaming="true", validation__interval=0
    )
    done = fork_python(tmp_path, "train/main.py", *flags, processes=2, check=False)
    assert done.returncode != 0
    assert "b.jsonl:1: expected a JSON object" in done.stderr
