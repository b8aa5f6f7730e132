"""Tokenizer folders of every kind, exported: transformers' ids and lm-eval's contexts are those of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from models.hf import hf_config, write_json
from models.sizes import LlamaShape
from tests.evals.tokenizer_folders import FOLDERS, TEMPLATE, TEXTS, write_folder
from train.read_back import ReadBackError, check_tokenizer
from train.tokenizer import copy_chat_templates, load_tokenizer


@pytest.fixture(scope="module")
def lm():
    """lm-eval's model of a transformers model; each test puts its tokenizer into it."""
    from lm_eval.models.huggingface import HFLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512))
    tokenizer = AutoTokenizer.from_pretrained(bytes_folder())
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=64, batch_size=1)


def bytes_folder() -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    load_tokenizer("bytes").save_hf(folder)
    return folder


def exported(source: Path, out: Path):
    """The tokenizer of training, and the one that transformers reads from an export beside a Llama's configuration."""
    training = load_tokenizer("hf", str(source))
    training.save_hf(out)
    copy_chat_templates(source, out)
    shape = LlamaShape(16, 1, 2, 2, 16, vocab_size=training.vocab_size)
    write_json(out / "config.json", hf_config(shape, training.bos_id, [training.bos_id], "float32"))
    return training, AutoTokenizer.from_pretrained(out)


def file_ids(source: Path, text: str, bos: str) -> list[int]:
    """What `tokenizers` itself makes of the file, nothing cut, padded or added, and the first token no text of its own."""
    content = json.loads((source / "tokenizer.json").read_text()) | {"truncation": None, "padding": None}
    for token in content["added_tokens"]:
        token["special"] |= token["content"] == bos
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", FOLDERS)
def test_exported_ids_are_those_of_training_and_of_lm_eval(name, tmp_path, lm, monkeypatch):
    from lm_eval.models.utils import configure_pad_token

    source = write_folder(name, tmp_path / "source")
    training, tokenizer = exported(source, tmp_path / "out")
    check_tokenizer(tokenizer, training)
    settings = FOLDERS[name][1]
    bos = settings.get("bos_token", "</s>")
    boundary = Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id(bos)
    assert training.bos_id == tokenizer.bos_token_id == boundary
    for text in TEXTS:
        ids = file_ids(source, text, bos)
        assert training.encode_batch([text])[0].tolist() == ids
        assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == [boundary, *ids]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer([text], truncation=True)["input_ids"] == [[boundary, *ids]]
    assert len(tokenizer) <= training.vocab_size, "no token without a row in the model"
    assert not [path.name for path in (tmp_path / "out").iterdir() if "special_tokens" in path.name]

    monkeypatch.setattr(lm, "tokenizer", configure_pad_token(tokenizer))
    assert lm.prefix_token_id == boundary
    context, continuation = "the quick ", "brown fox"
    whole, first = file_ids(source, context + continuation, bos), file_ids(source, context.rstrip(), bos)
    assert lm._encode_pair(context, continuation) == ([boundary, *first], whole[len(first) :])
    for text in TEXTS[:4]:
        assert lm.tok_encode(text) == [boundary, *file_ids(source, text, bos)] or text.startswith(bos)
    prompts, mask = lm.tok_batch_encode([continuation])
    assert prompts.tolist() == [[boundary, *file_ids(source, continuation, bos)]]
    assert mask.all()


def test_a_tokenizer_without_a_boundary_is_refused(tmp_path):
    folder = write_folder("wordpiece", tmp_path / "source")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizerFast", "cls_token": "[CLS]"}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json names neither bos_token nor eos_token"):
        load_tokenizer("hf", str(folder))


@pytest.mark.parametrize(("key", "value"), [
    ("tokenizer_class", "GPT2Tokenizer"),
    ("split_special_tokens", False),
    ("bos_token", "</s>"),
])  # fmt: skip
def test_a_tokenizer_that_gives_other_ids_is_refused(key, value, tmp_path):
    source = write_folder("plain", tmp_path / "source")
    training, _ = exported(source, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    write_json(tmp_path / "out" / "tokenizer_config.json", settings | {key: value})
    with pytest.raises(ReadBackError, match=r"gives other ids .* for the text .* it has \[.*expected \[|has bos_token"):
        check_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "out"), training)


@pytest.mark.parametrize("form", ["key", "list", "files"])
def test_chat_templates_come_along(form, tmp_path):
    source = write_folder("plain", tmp_path / "source")
    settings = dict(FOLDERS["plain"][1])
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool", "template": "tool"}]
    if form == "files":
        (source / "chat_template.jinja").write_text(TEMPLATE)
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    else:
        settings["chat_template"] = TEMPLATE if form == "key" else named
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    load_tokenizer("hf", str(source)).save(tmp_path / "run")  # as a run keeps it
    _, tokenizer = exported(tmp_path / "run", tmp_path / "out")
    expected = TEMPLATE if form == "key" else {"default": TEMPLATE, "tool": "tool"}
    assert tokenizer.chat_template == expected
    if form == "key":
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert rendered == "hi"
