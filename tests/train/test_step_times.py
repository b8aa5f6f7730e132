"""Who is slow, from every rank's own work; runs with a rank that is slow are in test_watchdog.py."""

from dataclasses import dataclass

import pytest

from train.step_times import LOGS_IN_A_ROW, StepTimes


@dataclass
class Place:
    world_size: int

    def gather_objects(self, value):
        return [f"node-{rank}" for rank in range(self.world_size)]


def times(world_size: int, threshold: float = 1.3) -> StepTimes:
    return StepTimes([], Place(world_size), threshold)  # type: ignore[arg-type]


def test_data_and_blocks_count_and_a_rank_is_named_once_after_several_logs():
    watched = times(4)
    table = [[0.0, 0.2, 4.0], [0.0, 0.2, 4.0], [0.3, 0.1, 4.0], [0.0, 0.2, 4.0]]
    said = []
    for _ in range(LOGS_IN_A_ROW + 2):
        assert watched.judge(table) == {"step_time_spread": pytest.approx(2.0), "slowest_rank": 2}
        said.append(watched.slow)
    assert [bool(text) for text in said] == [False, False, True, False, False]
    assert said[2].startswith(
        "rank 2 (node-2) is slow: its own work takes 0.400 s per step (0.300 s of it waiting for data)"
    )


def test_a_streak_that_breaks_begins_anew():
    watched = times(2)
    slow, even = [[0.0, 0.2, 1.0], [0.0, 0.5, 1.0]], [[0.0, 0.2, 1.0], [0.0, 0.2, 1.0]]
    for table in (slow, slow, even, slow, slow):
        watched.judge(table)
        assert not watched.slow
    watched.judge(slow)
    assert watched.slow.startswith("rank 1 ")


def test_milliseconds_and_a_threshold_of_zero_name_nobody():
    for watched, scale in ((times(2), 1e-3), (times(2, threshold=0.0), 1.0)):
        for _ in range(LOGS_IN_A_ROW):
            figures = watched.judge([[0.0, scale, 1.0], [0.0, 5 * scale, 1.0]])
            assert figures == {"step_time_spread": pytest.approx(5.0), "slowest_rank": 1}
            assert not watched.slow


def test_stages_with_unequal_numbers_of_blocks_are_compared_by_the_block():
    figures = times(2).judge([[0.0, 0.6, 6.0], [0.0, 0.2, 2.0]])
    assert figures["step_time_spread"] == pytest.approx(1.0)
