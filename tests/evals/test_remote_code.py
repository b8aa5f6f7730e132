"""No code of a model or a task runs unless --trust-remote-code asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evals.models import load_model
from evals.tasks import _metrics_from_the_hub
from models.hf import HFWeights
from train.tokenizer import ByteTokenizer

CODE = """
from pathlib import Path
import torch
from transformers import LlamaConfig, PreTrainedModel

Path({marker!r}).touch()

class Strange(PreTrainedModel):
    config_class = LlamaConfig
    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.post_init()
"""


@pytest.fixture
def strange(tmp_path) -> tuple[Path, Path]:
    """A folder whose model is Python code beside its weights, and the file that the code makes."""
    folder, marker = tmp_path / "strange", tmp_path / "was-run"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    (folder / "strange.py").write_text(CODE.format(marker=str(marker)))
    auto = {"AutoConfig": "strange.LlamaConfig", "AutoModelForCausalLM": "strange.Strange"}
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": auto}))
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    ByteTokenizer().save_hf(folder)
    return folder, marker


def test_a_model_with_code_is_refused_and_the_flag_named(strange, monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked on the terminal"))
    folder, marker = strange
    with pytest.raises(ValueError, match="give --trust-remote-code"):
        load_model(str(folder), "cpu")
    assert not marker.exists()


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for load in (HFWeights, lambda folder: load_model(str(folder), "cpu")):
        with pytest.raises(ValueError, match=r"no \.safetensors file \(there is pytorch_model\.bin\); pickled formats"):
            load(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", 3])
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(ValueError, match="no plain name of a file"):
        load_model(str(tmp_path), "cpu")


def test_metrics_that_are_scripts_on_the_hub_are_refused():
    from lm_eval.api.registry import get_metric

    with pytest.raises(ValueError, match=r"no_such_metric.*--trust-remote-code"), _metrics_from_the_hub(False):
        get_metric("no_such_metric")
    with _metrics_from_the_hub(False):
        assert get_metric("acc") is not None, "lm-eval's own metrics need no code from elsewhere"
