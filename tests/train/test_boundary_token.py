"""The token between documents belongs to the tokenizer: changed after `prepare`, it is noticed wherever ids meet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import tiny_flags

from tests.evals.tokenizer_folders import write_folder
from train.checkpoint import CheckpointError, Commit
from train.config_sources import load_config
from train.export import export, open_trained
from train.job import JobError, run_job
from train.prepare import prepare
from train.shards import Manifest
from train.tokenizer import difference, load_tokenizer, text_fingerprint


@pytest.fixture
def config(tmp_path, text_corpus):
    write_folder("plain", tmp_path / "tokenizer")
    changes = {"tokenizer__kind": "hf", "tokenizer__path": tmp_path / "tokenizer", "validation__interval": 0}
    flags = tiny_flags(tmp_path, text_corpus, training__stop_after=5, training__document_mask="true", **changes)
    return load_config([], flags, world_size=1)


def change_boundary(folder: Path) -> None:
    """From <s>, id 0, to </s>, id 1."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": "</s>"}))


def said(config) -> tuple[str, Path]:
    lines: list[str] = []
    (folder,) = prepare(config, say=lines.append)
    return "\n".join(lines), folder


CHANGED = r"another boundary token \(id 0 then, 1 now"


def test_a_changed_boundary_is_refused_by_training_and_prepared_anew(config, tmp_path):
    _, folder = said(config)
    assert Manifest.read(folder).tokenizer["bos_id"] == 0
    change_boundary(tmp_path / "tokenizer")
    with pytest.raises(JobError, match=rf"was tokenised with {CHANGED}.*run `newcompute prepare` again"):
        run_job(config)
    message, folder = said(config)
    assert "was made with another boundary token (id 0 then, 1 now" in message
    manifest = Manifest.read(folder)
    assert manifest.tokenizer["bos_id"] == 1
    run_job(config)
    export(open_trained(tmp_path / "run"), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["bos_token_id"] == 1


def test_a_changed_boundary_is_refused_by_resume_and_by_export(config, tmp_path):
    said(config)
    run_job(config)
    change_boundary(tmp_path / "run" / "tokenizer")
    with pytest.raises(
        CheckpointError, match=rf"run/tokenizer holds {CHANGED}.* than .*step-00000005 was trained with"
    ):
        open_trained(tmp_path / "run")
    change_boundary(tmp_path / "tokenizer")
    said(config)
    with pytest.raises(JobError, match=rf"step-00000005 was trained with {CHANGED}"):
        run_job(config)


def test_an_interrupted_prepare_does_not_go_on_with_another_boundary(tmp_path):
    from train.prepare import _Tokenization

    folder = write_folder("plain", tmp_path / "tokenizer")
    source = load_config([], []).data.all_sources[0]
    before = _Tokenization(tmp_path, source, load_tokenizer("hf", str(folder)), "").identity
    change_boundary(folder)
    assert _Tokenization(tmp_path, source, load_tokenizer("hf", str(folder)), "").identity != before


def test_records_of_earlier_versions_are_compared_by_what_they_hold(config, tmp_path):
    """Manifests held the boundary token beside the fingerprint, markers of checkpoints did not hold it."""
    _, folder = said(config)
    manifest = Manifest.read(folder)
    new = manifest.tokenizer["fingerprint"]
    of_contents = manifest.fingerprint
    manifest.tokenizer["fingerprint"] = text_fingerprint(new)
    manifest.write(folder)
    assert Manifest.read(folder).fingerprint == of_contents, "runs on these shards go on"
    assert "is prepared" in said(config)[0]
    run_job(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000005"
    commit = Commit.read(checkpoint)
    assert commit.tokenizer == new
    replace(commit, tokenizer=text_fingerprint(new)).write(checkpoint)
    assert open_trained(tmp_path / "run").tokenizer is not None
    change_boundary(tmp_path / "tokenizer")
    with pytest.raises(JobError, match=rf"was tokenised with {CHANGED}"):
        run_job(config)


def test_differences_are_named():
    assert difference("a" * 64 + "-1", "a" * 64 + "-1") == difference("a" * 64, "a" * 64 + "-1") == ""
    assert "another boundary token (id 1 then, 2 now" in difference("a" * 64 + "-1", "a" * 64 + "-2")
    assert (
        difference("a" * 64, "b" * 64 + "-1") == "another tokenizer (fingerprint aaaaaaaaaaaa then, bbbbbbbbbbbb now)"
    )
