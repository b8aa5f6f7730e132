"""The check before a run: what it finds on a sound machine, on a broken one, and how reports become a verdict."""

from __future__ import annotations

import re

import pytest
import torch
from cluster import Node, rendezvous
from support import run_python

import launch.preflight as preflight


def report(rank: int, **changes: object) -> dict:
    figures = {"tflops": 600.0, "memory_gbs": 2500.0, "link_gbs": 200.0, "all_reduce_gbs": 300.0, "time": 1000.0}
    place = {"rank": rank, "node": f"node{rank // 2}", "device": "GPU", "kind": "cuda", "problems": []}
    return place | figures | changes


@pytest.mark.slow
def test_two_nodes_that_are_sound_pass(tmp_path):
    options = rendezvous(2)
    flags = ["launch/preflight.py", "--run.dir", str(tmp_path / "runs"), "--run.device", "cpu"]
    nodes = [Node(tmp_path, name, *options, *flags) for name in ("first", "second")]
    try:
        assert [node.wait() for node in nodes] == [0, 0], nodes[0].said() + nodes[1].said()
    finally:
        for node in nodes:
            node.kill()
    tables = "".join((tmp_path / f"{name}.out").read_text() for name in ("first", "second"))
    rows = re.findall(r"\b([0-3]) +│ cpu .* good ", tables)
    assert rows == ["0", "1", "2", "3"], tables
    assert list((tmp_path / "runs").iterdir()) == [], "its files are removed"


def test_a_disk_that_cannot_be_written_is_named_and_ends_with_2(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_python(
        "launch/preflight.py", "--run.dir", str(tmp_path / "file" / "runs"), "--run.device", "cpu", check=False
    )
    assert done.returncode == 2
    assert re.search(r"process 0: .*file/runs: Not a directory", done.stderr)


def test_the_known_product_is_right_and_a_wrong_one_is_noticed(monkeypatch):
    problems: list[str] = []
    preflight.check_product(torch.device("cpu"), problems)
    assert problems == []
    # The closed form against a product in whole numbers.
    size, at = 512, torch.arange(512)
    a, b = (at[:, None] + at) % 7 - 3, (at[:, None] + at) % 5 - 2
    real = torch.Tensor.__matmul__

    def erring(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        product = real(x, y)
        assert torch.equal(product, (a @ b).float() if x.dtype != torch.int64 else product)
        if x.dtype != torch.int64:
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", erring)
    preflight.check_product(torch.device("cpu"), problems)
    assert problems == [f"a matrix product has 1 wrong numbers of {size * size:,}"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"tflops": 400.0}, "node1, process 3: 400 TFLOP/s, where the median is 600"),
        ({"link_gbs": 20.0}, "node1, process 3: 20 link GB/s, where the median is 200"),
        ({"device": "older GPU"}, "node1, process 3: older GPU, where the others have GPU"),
        ({"time": 1090.0}, r"node1, process 3: its clock is \+90.0 s off"),
        ({"problems": ["uncorrected ECC errors: 2"]}, "node1, process 3: uncorrected ECC errors: 2"),
    ],
)
def test_the_bad_device_is_named(changes, found):
    problems, remarks = preflight.judge([report(0), report(1), report(2), report(3, **changes)])
    assert len(problems) == 1
    assert re.search(found, problems[0])
    assert remarks == []


def test_sound_devices_differ_a_little_and_slow_processes_on_cpu_are_only_mentioned():
    assert preflight.judge([report(0), report(1, tflops=560.0), report(2, time=1001.0)]) == ([], [])
    problems, remarks = preflight.judge([report(rank, kind="cpu", tflops=1.0 if rank else 0.1) for rank in range(3)])
    assert problems == []
    assert len(remarks) == 1
    assert "process 0" in remarks[0]


def test_a_silent_process_is_named():
    store = torch.distributed.HashStore()
    assert preflight.gather(store, 2, deadline=0.0)["problems"] == ["has not reported within 120 s"]
    store.set("device/1", '{"rank": 1, "problems": []}')
    assert "did not come back" in preflight.gather(store, 1, deadline=0.0)["problems"][0]


def test_errors_that_the_driver_counts_are_read(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(
        '#!/bin/sh\ncase "$*" in *ecc*) echo 3;; *hw_thermal*) echo Active;; *brake*) exit 1;; *) echo "Not Active";; esac\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert preflight.driver_problems("1234") == ["uncorrected ECC errors: 3", "thermal slowdown: Active"]
