"""Faults of real processes: which rank is named, what is written, and how everybody ends."""

import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest
from support import fork_script, quietly, read_metrics, tiny_flags

from train.config import FaultsConfig
from train.config_sources import load_config
from train.faults import DONE, ENDED, HURT, Group, Report, diagnose, groups_of, place_and_waiting, process_state
from train.watchdog import EXIT_ENDED, EXIT_HANG, Watchdog

FAULTY = str(Path(__file__).with_name("watched.py"))


class Ended:
    """A run of several processes that have all come to their end, but for a stopped one."""

    def __init__(self, folder: Path, codes: list[int | None], pids: list[int | None]):
        self.codes, self.pids = codes, pids
        read = [(folder / f"rank-{rank}.{end}") for rank in range(len(codes)) for end in ("out", "err")]
        self.said = "".join(file.read_text(encoding="utf-8") for file in read)
        self.errors = [(folder / f"rank-{rank}.err").read_text(encoding="utf-8") for rank in range(len(codes))]
        self.run = folder / "run"

    def file(self, pattern: str) -> str:
        (path,) = (self.run / "faults").glob(pattern)
        return path.read_text(encoding="utf-8")


@pytest.fixture
def faulty(tmp_path, text_corpus):
    """Run `watched.py` and wait until every process has ended but `stays`, which is then killed."""

    def run(fault: str, victim: int | str, processes: int, stays: int | None = None, at: int = 4, **changes) -> Ended:
        settings = {
            "faults__timeout": 2.0,
            "faults__start_timeout": 120.0,
            "checkpoint__interval": 0,
            "training__steps": 6,
        }
        flags = tiny_flags(tmp_path, text_corpus, **settings | {"parallel__shard": processes} | changes)
        quietly(load_config([], flags, world_size=processes))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        size = str(processes)
        environment = {"FAULT": fault, "VICTIM": str(victim), "AT": str(at)}
        if processes > 1:
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
            }
        started = []
        try:
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
                started.append(fork_script(tmp_path / f"rank-{rank}", FAULTY, *flags, **environment, **own))
            deadline = time.monotonic() + 60
            for rank, process in enumerate(started):
                if rank != stays:
                    process.join(max(0.0, deadline - time.monotonic()))
                    assert process.exitcode is not None, f"rank {rank} does not end"
            codes, pids = [process.exitcode for process in started], [process.pid for process in started]
        finally:
            for process in started:
                process.kill()
                process.join()
        return Ended(tmp_path, codes, pids)

    return run


def test_a_rank_whose_data_never_come_is_named_by_all(faulty):
    done = faulty("disk", 1, 4)
    assert done.codes == [EXIT_HANG] * 4
    diagnosis = done.file("*-diagnosis.txt")
    assert re.match(rf"rank 1 \(\S+, pid {done.pids[1]}\) hangs in data since \d+ s at step 4", diagnosis)
    assert "ranks 0, 2-3 wait in forward/backward (" in diagnosis
    assert done.said.count("hangs in data") == 1, "one process speaks for all"
    assert "stuck_disk" in done.file("*-rank-1.txt")
    for rank in (0, 2, 3):
        assert "stuck_disk" not in done.file(f"*-rank-{rank}.txt")
        assert "train_step" in done.file(f"*-rank-{rank}.txt")
        assert '"entries"' in done.file(f"*-gloo-rank-{rank}.json")


@pytest.mark.slow
def test_a_rank_that_hangs_inside_the_forward_is_told_from_those_that_wait_there(faulty):
    done = faulty("layer", 1, 2, at=3)
    assert done.codes == [EXIT_HANG] * 2
    assert re.match(r"rank 1 \(.*\) hangs in forward/backward since \d+ s at step 3", done.file("*-diagnosis.txt"))
    assert ": rank 0 waits in forward/backward (" in done.file("*-diagnosis.txt")
    assert "stuck_layer" in done.file("*-rank-1.txt")


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_rank_is_named_by_the_other(faulty, victim):
    done = faulty("stop", victim, 2, stays=victim)
    assert done.codes[1 - victim] == EXIT_HANG
    assert f"pid {done.pids[victim]}) is stopped (by SIGSTOP or a debugger)" in done.errors[1 - victim]
    assert done.file("*-diagnosis.txt").startswith(f"rank {victim} (")
    assert "train_step" in done.file(f"*-rank-{1 - victim}.txt")


@pytest.mark.parametrize(("victim", "processes"), [(0, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_by_the_others(faulty, victim, processes):
    done = faulty("kill", victim, processes, faults__timeout=60.0)
    others = [rank for rank in range(processes) if rank != victim]
    assert [done.codes[rank] for rank in others] == [EXIT_ENDED] * len(others)
    for rank in others:
        # A process that is only just dying still runs, for a moment.
        said = rf"rank {victim} \(.*\) (has ended without a word|does not answer)"
        assert re.search(said, done.errors[rank]), done.errors[rank]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_of_one_rank_reaches_the_other(faulty, victim):
    done = faulty("throw", victim, 2, faults__timeout=60.0)
    assert done.codes[1 - victim] == EXIT_ENDED
    said = rf"rank {victim} \(.*\) ended in forward/backward at step 4: ValueError: the ink is out"
    assert re.search(said, done.errors[1 - victim])
    assert re.match(said, done.file("*-diagnosis.txt"))
    assert "in faulty_step" in done.file(f"*-rank-{victim}.txt")
    assert "the ink is out" in done.errors[victim]
    assert "faulty_step" not in done.file(f"*-rank-{1 - victim}.txt")
    assert "in train_step" in done.file(f"*-rank-{1 - victim}.txt")


@pytest.mark.slow
def test_a_hang_before_the_first_step(faulty):
    done = faulty("load", 0, 2, faults__start_timeout=3.0)
    assert done.codes == [EXIT_HANG] * 2
    assert re.match(r"rank 0 \(.*\) hangs in load since \d+ s, in stuck_load", done.file("*-diagnosis.txt"))


def test_one_process_ends_itself(faulty):
    done = faulty("disk", 0, 1)
    assert done.codes == [EXIT_HANG]
    assert re.match(r"rank 0 \(.*\) hangs in data since \d+ s at step 4", done.file("*-diagnosis.txt"))
    assert "stuck_disk" in done.file("*-rank-0.txt")


@pytest.mark.slow
def test_long_loading_and_validation_are_no_hang(faulty):
    """Loading takes 4 s and each validation batch 0.8 s, of several; one rank waits for the other all that time."""
    done = faulty("patience", 1, 2, validation__steps=5, validation__interval=3)
    assert done.codes == [0, 0]
    assert not (done.run / "faults").exists()
    assert len([row for row in read_metrics(done.run) if "val_loss" in row]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "victim", "processes"), [("slow disk", 1, 2), ("slow layer", 3, 4)])
def test_a_slow_rank_is_named(faulty, fault, victim, processes):
    done = faulty(fault, victim, processes, faults__slow_rank=1.5, faults__timeout=60.0, training__steps=8)
    assert done.codes == [0] * processes
    rows = read_metrics(done.run)
    logged = [row for row in rows if "step_time_spread" in row]
    assert len(logged) == 8
    last = logged[4:]  # the first rows were read ahead while the run started
    assert {row["slowest_rank"] for row in last} == {victim}
    assert all(row["step_time_spread"] > 1.5 for row in last)
    events = [row["message"] for row in rows if row.get("event") == "slow_rank"]
    assert events
    assert all(message.startswith(f"rank {victim} (") for message in events)


# The line itself, from what ranks may tell


def reports(*changes: dict) -> dict[int, Report]:
    base = {"host": "a", "phase": "forward/backward", "step": 7, "quiet": 60.0, "limit": 50.0}
    return {rank: Report(**{"rank": rank, "pid": 10 + rank} | base | change) for rank, change in enumerate(changes)}


def test_who_is_named():
    wait = {"waiting": "all_reduce"}
    assert diagnose(reports(wait, {"phase": "data"}, wait)).startswith(
        "rank 1 (a, pid 11) hangs in data since 60 s at step 7"
    )
    assert diagnose(reports({"step": 6, "phase": "save"}, wait)).startswith("rank 0 (a, pid 10) hangs in save")
    assert diagnose(reports(wait, {}, wait)).startswith("rank 1 (a, pid 11) hangs in forward/backward")
    assert "cannot be told" in diagnose(reports(wait, wait))
    assert "cannot be told" in diagnose(reports({}, {}))
    assert diagnose(reports(wait, {}, wait), silent=[2]).startswith("rank 2 (a, pid 12) does not answer")
    ended = {"state": ENDED, "message": "KeyError: 'x'"}
    assert (
        diagnose(reports(wait, {}, ended), silent=[1])
        == "rank 2 (a, pid 12) ended in forward/backward at step 7: KeyError: 'x'"
    )
    assert "all others have come to their end" in diagnose(reports({"state": DONE}, wait))
    assert diagnose(reports({"state": HURT}, {})).startswith("rank 1 ")


def test_the_flight_recorder_tells_the_one_that_others_wait_for():
    """Ranks 0 and 1 shard together, 2 and 3 too, all reduce over pairs; 3 has not begun what 2 waits for, nor 1 what 3 owes."""

    def recorded(**groups: Group) -> dict:
        return {"waiting": "wait_tensor", "groups": groups}

    told = diagnose(
        reports(
            recorded(shard01=Group(5), pair02=Group(9, 9, "all_reduce")),
            recorded(shard01=Group(5), pair13=Group(9, 9, "all_reduce")),
            recorded(shard23=Group(5, 5, "all_gather"), pair02=Group(8)),
            recorded(shard23=Group(4), pair13=Group(8)),
        )
    )
    assert told.startswith("rank 3 (")


def test_entries_of_the_flight_recorder_are_summed_up_by_group():
    def entry(group: str, number: int, state: str = "completed", p2p: bool = False) -> dict:
        return {
            "process_group": [group, ""], "collective_seq_id": number, "is_p2p": p2p, "retired": False, "state": state,
            "profiling_name": "nccl:all_reduce",
        }  # fmt: skip

    entries = [
        entry("0", 1),
        entry("0", 2, "started"),
        entry("0", 3, "scheduled"),
        entry("1", 1),
        entry("0", 9, p2p=True),
    ]
    assert groups_of(entries) == {"0": Group(3, 2, "all_reduce"), "1": Group(1)}


def test_reports_survive_the_store():
    report = Report(3, "a", 5, "save", 9, groups={"0": Group(1, 1, "all_reduce")})
    assert Report.from_json(report.to_json()) == report


def test_states_of_processes_here():
    assert process_state(socket.gethostname(), os.getpid()) == "runs"
    assert process_state(socket.gethostname(), 2**22 + 1) == "ended"
    assert process_state("elsewhere", os.getpid()) == ""


def test_place_of_a_thread():
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    assert thread.ident is not None
    place, waiting = place_and_waiting(thread.ident)
    event.set()
    thread.join()
    assert place
    assert waiting == ""


def test_time_in_which_the_process_itself_was_suspended_is_no_hang(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("train.watchdog.time.monotonic", lambda: now[0])
    watchdog = Watchdog(FaultsConfig(timeout=100.0), tmp_path)
    watchdog.beat("data", 1)
    watchdog._update()
    for _ in range(10):
        now[0] += 3600.0
        watchdog._update()
    assert watchdog.mine.quiet <= 10 * 2 * watchdog.interval
    watchdog.beat("data", 2)
    watchdog._update()
    assert watchdog.mine.quiet == 0.0


def test_limits(tmp_path):
    watchdog = Watchdog(FaultsConfig(timeout=100.0, start_timeout=900.0), tmp_path)
    limits = []
    for phase, step in (("load", None), ("data", 11), ("log", 11), ("data", 12), ("save", 12), ("data", 13)):
        watchdog.beat(phase, step)
        watchdog._update()
        limits.append(watchdog.mine.limit)
    assert limits == [900.0, 900.0, 900.0, 100.0, 900.0, 100.0]
