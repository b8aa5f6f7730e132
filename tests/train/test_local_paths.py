"""Which names are paths and which may be the Hub's, and what is said of a path that leads nowhere."""

from __future__ import annotations

import pytest

from train.local_paths import is_local, nothing_at, refuse_missing


@pytest.mark.parametrize("name", ["./tok", "../tok", "/tok", "~/tok", "outputs/x", "data/x", "a/b/c", "here/x", "x y"])
def test_paths(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_local(name)
    with pytest.raises(ValueError, match="no such folder"):
        refuse_missing(name)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.1-8B", "EleutherAI/pythia-70m", "user/name_1.0"])
def test_names_that_the_hub_may_know(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_local(name)
    refuse_missing(name)


def test_what_is_said_of_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    assert nothing_at("text") == "'text' is a folder: name files in it, as in 'text/**/*.txt'"
    assert nothing_at("text/*.txt") == f"no file matches 'text/*.txt' (seen from {tmp_path})"
    assert nothing_at("texts/*.txt") == f"no such folder: texts (seen from {tmp_path})"
    assert nothing_at("text/a.txt") == f"no such file: text/a.txt (seen from {tmp_path}; {tmp_path / 'text'} is there)"
