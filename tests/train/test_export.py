"""Exported folders against transformers, the published model, and lm-eval without this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import quietly, tiny_flags

from models.llama import Llama
from train.config_sources import load_config
from train.export import TrainedModel, export, open_trained
from train.job import run_job
from train.read_back import ReadBackError, check_llama


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_corpus) -> Path:
    """A run of ten steps with a vocabulary that is padded inside (257 -> 384); exports only read it."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"training__stop_after": 10, "model__shape__head_dim": 16, "model__shape__max_context": 96}
    config = load_config([], tiny_flags(folder, text_corpus, **changes), world_size=1)
    quietly(config)
    run_job(config)
    return folder / "run"


def our_logits(run: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of our own model on a run's weights."""
    opened = open_trained(run)
    model = Llama(opened.shape, tokens.shape[1])
    state = opened.state_dict()
    for name, parameter in model.named_parameters():
        parameter.data[: len(state[name])] = state[name]
    return model(tokens)


def test_transformers_gives_our_logits_and_our_ids(trained, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(open_trained(trained), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.randint(0, 257, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.config.vocab_size == 257
        torch.testing.assert_close(model(tokens).logits, our_logits(trained, tokens), atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "héllo <|begin_of_text|>\n"
    assert tokenizer(text)["input_ids"] == [256, *text.encode()]
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mode & 0o077 == 0o666 & ~_umask() & 0o077


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_import_of_an_export_has_identical_weights(trained, run_here, tmp_path):
    export(open_trained(trained), tmp_path / "hf")
    shape = {f"model__shape__{key}": None for key in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")}
    run_here("again", model__init_from=f"hf:{tmp_path / 'hf'}", optimizer__lr=1e-30, training__steps=1,
             schedule__warmup_steps=0, optimizer__weight_decay=0.0, **shape)  # fmt: skip
    export(open_trained(tmp_path / "again"), tmp_path / "hf2")
    first, second = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "hf2" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_large_model_is_written_in_several_files(trained, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    import train.export as module

    export(open_trained(trained), tmp_path / "one")
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    export(open_trained(trained), tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    many = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_an_export_replaces_an_export_but_nothing_else(trained, tmp_path):
    out = tmp_path / "hf"
    export(open_trained(trained), out)
    export(open_trained(trained, step=5), out, dtype="bfloat16")
    assert json.loads((out / "newcompute.json").read_text())["step"] == 5
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and was not written by"):
        export(open_trained(trained), tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").exists()


def damaged(change):
    """`describe` of an export, and then a change of one of its JSON files."""
    import train.export as module

    usual = module.describe

    def describe(model, folder, dtype):
        usual(model, folder, dtype)
        file, changes = change
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | changes))

    return describe


@pytest.mark.parametrize(("change", "message"), [
    (("config.json", {"rms_norm_eps": 1e-3}), "computes other logits .* differ by .* allowed is 0.001"),
    (("config.json", {"num_key_value_heads": 4}), "does not find the model's weights.*mismatched_keys"),
    (("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}), "computes other logits"),
    (("config.json", {"num_hidden_layers": 1}), r"does not find the model's weights.*unexpected_keys"),
    (("tokenizer_config.json", {"split_special_tokens": False}), r"other ids .* for the text '.*it has \[.*expected \["),
    (("tokenizer_config.json", {"bos_token": "a"}), r"has bos_token 'a' with id 97"),
])  # fmt: skip
def test_an_export_that_transformers_reads_otherwise_is_refused(trained, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("train.export.describe", damaged(change))
    with pytest.raises((ValueError, RuntimeError), match=message):
        export(open_trained(trained), tmp_path / "hf")
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_a_weight_that_is_written_wrongly_is_refused(trained, tmp_path, monkeypatch):
    import train.export as module

    usual = module.write_safetensors

    def swapped(folder, groups, shape, dtype):
        def other(group):
            q = "model.layers.1.self_attn.q_proj.weight"
            return {name: tensor.flip(0) if name == q else tensor for name, tensor in group.items()}

        return usual(folder, map(other, groups), shape, dtype)

    monkeypatch.setattr(module, "write_safetensors", swapped)
    with pytest.raises(ReadBackError, match="computes other logits"):
        export(open_trained(trained), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_are_compared_as_closely_as_others(trained, tmp_path, dtype, monkeypatch):
    import train.read_back as module

    errors, usual = [], module.compare

    def compare(found, expected, tolerance):
        errors.append(float((found - expected).abs().max()))
        usual(found, expected, tolerance)

    monkeypatch.setattr(module, "compare", compare)
    export(open_trained(trained), tmp_path / "hf", dtype)
    assert max(errors) < 1e-4
    monkeypatch.setattr("train.export.TrainedModel.read", lambda self, names, usual=TrainedModel.read: {
        name: tensor * 1e6 for name, tensor in usual(self, names).items()})  # fmt: skip
    if dtype == "float16":
        with pytest.raises(ReadBackError, match="differ by nan"):
            export(open_trained(trained), tmp_path / "hf2", dtype)


def test_weights_are_read_in_parts_for_the_comparison(trained, monkeypatch, tmp_path):
    export(open_trained(trained), tmp_path / "hf")
    opened, shares = open_trained(trained), []

    def read(names):
        shares.append(names)
        return opened.read(names)

    monkeypatch.setattr("train.read_back.SHARD_BYTES", 40_000)
    check_llama(tmp_path / "hf", opened.shape, read)
    assert len(shares) > 2
    assert sorted(name for names in shares for name in names) == sorted(opened.state_dict())


def test_an_export_declares_the_context_of_the_shape_and_is_evaluated_at_that_of_training(trained, tmp_path):
    from evals.models import load_model

    export(open_trained(trained), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"] == 96
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["model_max_length"] == 96
    assert load_model(str(tmp_path / "hf"), "cpu").context == load_model(str(trained), "cpu").context == 64


def test_a_continued_model_keeps_its_context_and_its_chat_template(trained, run_here, tmp_path):
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    export(open_trained(trained), tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(template)
    shape = {f"model__shape__{key}": None for key in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")}
    run_here("again", model__init_from=f"hf:{tmp_path / 'hf'}", training__steps=1, schedule__warmup_steps=0, **shape)
    export(open_trained(tmp_path / "again"), tmp_path / "hf2")
    assert json.loads((tmp_path / "hf2" / "config.json").read_text())["max_position_embeddings"] == 96
    assert (tmp_path / "hf2" / "chat_template.jinja").read_text() == template


@pytest.mark.slow  # lm-eval's import and its thousands of task files; test_tasks.py runs such a task in this process
def test_stock_lm_eval_runs_on_the_folder_without_this_project(trained, tmp_path):
    from evals.held_out_task import write_task

    export(open_trained(trained), tmp_path / "hf")
    write_task(trained, tmp_path / "task", limit=3)
    block = (
        "import sys, runpy\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'train', 'models', 'parallel', 'transforms', 'evals', 'launch'}:\n"
        "            raise ImportError('this project is not installed here: ' + name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "runpy.run_module('lm_eval', run_name='__main__')\n"
    )
    model = f"pretrained={tmp_path / 'hf'},dtype=float32,max_length=64"
    arguments = ["--model", "hf", "--model_args", model, "--device", "cpu"]
    arguments += [
        "--tasks",
        "held_out",
        "--include_path",
        str(tmp_path / "task"),
        "--output_path",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", block, *arguments], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results*.json")
    bits = json.loads(report.read_text())["results"]["held_out"]["bits_per_byte,none"]
    # The same text by hand: every document behind BOS, in windows of the context.
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    nats = total = 0
    for line in (tmp_path / "task" / "held_out.jsonl").read_text().splitlines():
        data = json.loads(line)["text"].encode()
        ids = torch.tensor([256, *data])
        for start in range(0, len(data), 64):
            window = ids[start : start + 65] if start + 65 <= len(ids) else ids[-65:]
            new = min(64, len(data) - start)
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(
                    model(window[None, :-1]).logits[0], window[1:], reduction="none"
                )
            nats += losses[-new:].sum().item()
        total += len(data)
    assert bits == pytest.approx(nats / total / 0.6931471805599453, rel=1e-4)


def test_an_earlier_export_is_whole_until_the_new_one_is_there(tmp_path, monkeypatch):
    """Removing a large export takes time: a run that is killed meanwhile leaves no half of one."""
    import train.export as module

    out = tmp_path / "hf"
    for content in ("first", "second"):
        with module.export_folder(out) as folder:
            (folder / module.PROVENANCE).write_text(content)
    assert (out / module.PROVENANCE).read_text() == "second"
    removed = []
    monkeypatch.setattr(module.shutil, "rmtree", lambda path, **options: removed.append(path))
    with module.export_folder(out) as folder:
        (folder / module.PROVENANCE).write_text("third")
    assert out not in removed
    assert (out / module.PROVENANCE).read_text() == "third"
