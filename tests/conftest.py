"""Shared fixtures: the real inputs beside a checkout, and small prepared corpora."""

from __future__ import annotations

import copy
import gc
import json
import os
import platform
import sys
from collections import Counter
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from support import ROOT, read_metrics, tiny_flags

REAL_INPUTS = ROOT.parent / "shared" / "data"

# Tests never reach for the network, and a few threads per process keep two-process tests from fighting for cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    help_text = "print each failure as soon as it is known, for runs that may be ended before their summary"
    parser.addoption("--failures-at-once", action="store_true", help=help_text)


def pytest_configure(config):
    # With several workers the process that prints hears every report; the workers print nothing.
    if config.getoption("--failures-at-once") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce())


def cuda_works() -> bool:
    """Whether no earlier test has left a CUDA error behind, which stays until the process ends."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"this process ends: {error}", file=sys.stderr, flush=True)
        return False
    return True


def pytest_terminal_summary(terminalreporter):
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "triton", "torchao", "transformers"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    terminalreporter.write_line(f"ran with {', '.join(found)}")


class FailuresAtOnce:
    def pytest_runtest_logreport(self, report):
        if report.failed:
            print(f"\n=== {report.nodeid} ({report.when})\n{report.longreprtext[-6000:]}\n===", flush=True)


def pytest_collection_modifyitems(items):
    # Files with many slow tests come first: what is left for the last minutes is short.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and PyTorch sees none here"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not cuda_works():
        # Every further test of this process would fail as well; pytest-xdist starts another one in its place.
        os._exit(3)
    # Later collections pass over what earlier tests left alive: the compiler keeps millions of objects.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def compiler_of_its_own():
    """Files compile as if each ran alone: Dynamo remembers shapes and gives up at the ninth variant in one process."""
    if "torch._dynamo" in sys.modules:
        import torch

        torch._dynamo.reset()


@pytest.fixture(scope="session")
def real_inputs() -> Path:
    """A folder with a pretrained model, the Llama-3 tokenizer and text, which is not part of the project."""
    if not REAL_INPUTS.is_dir():
        pytest.skip(f"needs the real inputs in {REAL_INPUTS}")
    return REAL_INPUTS


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory) -> Path:
    """A folder with one text file of about 200 kB, the source text of a few standard modules."""
    import argparse
    import inspect
    import typing

    folder = tmp_path_factory.mktemp("corpus")
    text = "\n".join(inspect.getsource(module) for module in (argparse, inspect, typing))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def run_here(tmp_path, text_corpus):
    """Run a tiny job in this process; returns its `metrics.jsonl` rows. Keyword arguments change settings."""
    from train.config_sources import load_config
    from train.job import run_job
    from train.prepare import prepare

    def run(name: str = "run", **changes: object) -> list[dict]:
        config = load_config([], tiny_flags(tmp_path, text_corpus, name, **changes), world_size=1)
        prepare(config, say=lambda text: None)
        run_job(config)
        return read_metrics(tmp_path / name)

    return run


@pytest.fixture
def quick_workers(monkeypatch):
    """Streams' workers fork from a process that has torch imported, instead of importing it each as a spawned one does."""
    from train import streaming

    loader = streaming.StatefulDataLoader

    def forking(*arguments, num_workers: int, multiprocessing_context: str, **rest):
        return loader(*arguments, num_workers=num_workers, multiprocessing_context="forkserver", **rest)

    monkeypatch.setattr(streaming, "StatefulDataLoader", forking)


@pytest.fixture(scope="session")
def task_index():
    """lm-eval reads its thousands of task files once for all tests, not once for every folder of further tasks."""
    from lm_eval.tasks import _index

    read, contents = _index.load_yaml, {}

    def load_yaml(path, **how):
        key = (path, *sorted(how.items()))
        if not str(path).startswith(str(Path(_index.__file__).parent)):
            return read(path, **how)
        if key not in contents:
            contents[key] = read(path, **how)
        return copy.deepcopy(contents[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_index, "load_yaml", load_yaml)
        yield


@pytest.fixture
def configure(tmp_path):
    """A configuration with the byte tokenizer and shards under `tmp_path`; later flags win."""

    from train.config_sources import load_config

    def configuration(*flags: object, paths: list[Path] | None = None):
        plain = ["--data.dir", tmp_path / "data", "--tokenizer.kind", "bytes", "--training.sequence_length", 16]
        if paths is not None:
            plain += ["--data.source", "files", "--data.paths", json.dumps([str(path) for path in paths])]
        return load_config([], [str(flag) for flag in [*plain, *flags]])

    return configuration
