"""The driver of a session on a GPU machine: what it leaves behind whatever happens, and a dry run of all its stages."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT

from benchmarks.gpu_session import marked
from benchmarks.gpu_stages import EFFECTS, stages

DRIVER = """
import signal, sys
sys.path.insert(0, {root!r})
from benchmarks import gpu_session
from benchmarks.gpu_stages import Stage

def stages(part, out, device):
    def shell(text):
        return ("bash", "-c", text)
    return {stages}

gpu_session.stages = stages
gpu_session.GRACE = 1.0
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
gpu_session.main()
"""


@pytest.fixture
def session(tmp_path):
    """Start a session of stages given as Python text; returns the process."""
    out = tmp_path / "out"

    def start(stages: str, *arguments: str, minutes: float = 5.0) -> subprocess.Popen:
        script = tmp_path / "driver.py"
        script.write_text(DRIVER.format(root=str(ROOT), stages=stages))
        command = [
            sys.executable,
            str(script),
            "--out",
            str(out),
            "--minutes",
            str(minutes),
            "--device",
            "cpu",
            *arguments,
        ]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    start.out = out
    yield start
    assert marked(f"{out}/summary.json|") == []  # nothing outlives a session


def summary(out: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((out / "summary.json").read_text())["stages"]}


def states(out: Path) -> dict[str, str]:
    return {name: row["state"] for name, row in summary(out).items()}


def test_each_stage_ends_in_a_state_with_its_last_lines(session):
    process = session("""[
        Stage("good", shell("echo fine; printf 'no newline'"), 20),
        Stage("broken", shell("echo says why >&2; exit 3"), 20),
        Stage("unfinished", shell("exit 75"), 20),
        Stage("too slow", shell("echo begins; setsid sleep 600 & sleep 600"), 1),
        Stage("greedy", shell("echo never"), 20, least=1000),
        Stage("missing", ("/no/such/command",), 20),
    ]""")
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert states(session.out) == {
        "good": "passed", "broken": "failed (3)", "unfinished": "out of time", "too slow": "out of time",
        "greedy": "no time", "missing": "failed (could not start)",
    }  # fmt: skip
    rows = summary(session.out)
    assert rows["good"]["tail"] == ["fine", "no newline"]
    assert rows["broken"]["tail"] == ["says why"]
    assert "missing: failed (could not start)" in shown
    log = (session.out / "log.txt").read_text()
    assert "good | fine\n" in log
    assert "too slow | begins\n" in log


def test_what_is_measured_waits_for_what_runs_beside(session, tmp_path):
    beside = "for i in 1 2 3 4 5; do echo beside >> order; sleep 0.2; done"
    process = session(f"""[
        Stage("tests", shell({f"cd {tmp_path}; {beside}"!r}), 20, beside=True),
        Stage("compile", shell("cd {tmp_path}; echo compile >> order"), 20, beside=True),
        Stage("speed", shell("cd {tmp_path}; echo speed >> order"), 20),
    ]""")
    process.communicate(timeout=60)
    assert process.returncode == 0
    order = (tmp_path / "order").read_text().split()
    assert order[-1] == "speed"
    assert order.index("compile") < len(order) - 2  # it did not wait for the tests
    assert order.count("beside") == 5


def test_a_session_that_is_asked_to_end_takes_its_stage_along(session):
    process = session("""[Stage("long", shell("trap 'echo ends; exit 1' TERM; echo begins; sleep 600 & wait"), 900)]""")
    log = session.out / "log.txt"
    while not log.exists() or b"begins" not in log.read_bytes():
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert states(session.out) == {"long": "interrupted"}
    assert summary(session.out)["long"]["tail"] == ["begins", "ends"]


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_any_moment_leaves_a_summary_that_resume_goes_on_from(session, tmp_path, seed):
    rng = random.Random(seed)
    # Each stage notes that it began and that it ended; one starts a process in a session of its own.
    note = f"echo {{0}} begins >> {tmp_path}/notes; {{1}} sleep 0.2; echo {{0}} ends >> {tmp_path}/notes"
    names = [f"stage {i}" for i in range(6)]
    texts = [note.format(name, "setsid sleep 300 &" if i == 2 else "") for i, name in enumerate(names)]
    planned = ", ".join(
        f"Stage({name!r}, shell({text!r}), 20, beside={i in (1, 2)})"
        for i, (name, text) in enumerate(zip(names, texts, strict=True))
    )

    def begun(name: str) -> int:
        return (tmp_path / "notes").read_text().splitlines().count(f"{name} begins")

    passed: dict[str, int] = {}  # how often each had begun when it had passed
    for _ in range(60):
        process = session(f"[{planned}]", "--resume")
        try:
            process.communicate(timeout=rng.uniform(0.05, 0.9))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        if (session.out / "summary.json").exists():
            found = states(session.out)
            assert {found[name] for name in passed} <= {"passed"}
            passed |= {name: begun(name) for name, state in found.items() if state == "passed" and name not in passed}
    assert process.returncode == 0, "no try was long enough"
    assert states(session.out) == dict.fromkeys(names, "passed")
    assert all(begun(name) == count for name, count in passed.items())  # nothing that had passed was run again


def test_other_sources_are_run_anew(session, tmp_path):
    one = f"""[Stage("one", shell("echo x >> {tmp_path}/runs"), 20)]"""
    session(one).communicate(timeout=60)
    refused = session(one)
    assert "has a summary: --resume goes on from it" in refused.communicate(timeout=60)[0]
    session(one, "--resume").communicate(timeout=60)
    assert (tmp_path / "runs").read_text().split() == ["x"]
    file = session.out / "summary.json"
    file.write_text(file.read_text().replace(summary(session.out)["one"]["sources"], "others"))
    # A session of other stages takes over what is there, and does not make it pass for the new sources.
    two = f"""[Stage("two", shell("echo y >> {tmp_path}/runs"), 20)]"""
    session(two, "--resume").communicate(timeout=60)
    session(one, "--resume").communicate(timeout=60)
    assert (tmp_path / "runs").read_text().split() == ["x", "y", "x"]
    earlier = json.loads(file.read_text())["earlier"]
    assert [row["sources"] == "others" for row in earlier] == [True, True, False]
    unknown = session(one, "--resume", "--only", "two")
    assert "'two' is none of one" in unknown.communicate(timeout=60)[0]


@pytest.mark.parametrize("part", [1, 2])
def test_a_stage_is_begun_only_where_it_can_come_to_something(tmp_path, part):
    for planned in (stages(part, tmp_path, device) for device in ("cuda", "cpu")):
        assert len({stage.name for stage in planned}) == len(planned)
        assert all(stage.least < stage.limit <= 180 for stage in planned)
        for stage in planned:  # results go to the folder of results
            outs = [
                Path(word) for before, word in zip(stage.command, stage.command[1:]) if before in ("--out", "--trace")
            ]
            assert all(out.parent in (tmp_path, Path("/tmp/session_cache")) for out in outs)


@pytest.mark.slow
def test_a_dry_run_of_all_stages(tmp_path):
    """As on a GPU machine: without the packages that it lacks, results in one folder, at most eight files of them."""
    first, second, blocked = tmp_path / "first", tmp_path / "second", tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(
        "import sys\nfor name in ('datasets', 'lm_eval', 'wandb'): sys.modules[name] = None\n"
    )
    environment = os.environ | {
        "DEVICE": "cpu", "PYTHON": sys.executable, "PYTHONPATH": str(blocked), "MINUTES": "15", "WHEELS": str(tmp_path),
        "EARLIER": str(first),
    }  # fmt: skip
    # Part 2 is on a fresh machine, which has of part 1 what that has left in its folder.
    for part, out in (("1", first), ("2", second)):
        parts = {"PART": part, "OUT": str(out), "SESSION_CACHE": f"{out}-cache"}
        done = subprocess.run(
            ["bash", "benchmarks/gpu_session.sh"],
            cwd=ROOT, env=environment | parts, capture_output=True, text=True, timeout=580,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    names = [stage.name for part in (1, 2) for stage in stages(part, second, "cpu")]
    assert states(second) == dict.fromkeys(names, "passed")
    assert "runs: passed before" in (second / "log.txt").read_text()
    left = {"summary.json", "log.txt", "smoke.json", "gpu.json", "transform_cost.json"}
    assert {file.name for file in first.iterdir()} == left | {"caches.tar.gz.0"}
    assert {file.name for file in second.iterdir()} == left | {"profile_60M.json.gz"}
    out = second
    assert not any("failed" in part for part in json.loads((out / "smoke.json").read_text())["parts"].values())
    measured = json.loads((out / "gpu.json").read_text())
    assert {row["status"] for row in measured["measurements"]} == {"measured", "skipped"}
    assert measured["profiles"]["debug"]["kernels"]
    cost = json.loads((out / "transform_cost.json").read_text())["rows"]
    assert [row["effect"] for row in cost] == ["bitflip_published", *EFFECTS]
    assert all(row["ratio_median"] > 0 for row in cost)
