"""Charts: what is left of a long curve, round ticks, and coordinates that lead back to the values."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from evals.charts import LIMIT, SIDE, Chart, Curve, Mark, decimate, draw, path, rarest, ticks, value_range
from evals.formats import duration, redact, short


def test_a_long_curve_keeps_its_ends_spikes_and_gaps():
    values: list[float | None] = [float((i * 7919) % 101) for i in range(20_000)]
    values[4321], values[15_000], values[777] = 1e6, -1e6, None
    points = list(enumerate(values))
    kept = decimate(points)
    assert len(kept) <= LIMIT
    assert set(kept) <= set(points)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert {points[0], points[-1], (4321, 1e6), (15_000, -1e6), (777, None)} <= set(kept)


def test_a_short_curve_stays_whole():
    points = [(i, float(i)) for i in range(LIMIT)]
    assert decimate(points) == points
    assert decimate([]) == []


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 7075), (2.31, 10.9), (-3e-5, 4e-5), (5.0001, 5.0002), (0, 1e12)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    margin = (high - low) * 1e-6
    assert all(low - margin <= tick <= high + margin for tick in found)
    distance = found[1] - found[0]
    assert re.fullmatch(r"[125](\.0+)?e[+-]\d+", f"{distance:.6e}".replace("0.", "."))
    assert all(b - a == pytest.approx(distance) for a, b in pairwise(found))


def test_coordinates_lead_back_to_the_values():
    points = [(0, 3.0), (10, None), (20, 1.5), (30, 1.0), (40, None)]
    curve = Curve(0, "a", points)
    low, high = value_range(Chart("loss", "Loss", "", [curve]))
    d = path(points, (0, 40), (low, high))
    assert d.count("M") == 2
    assert "h0" in d.partition("L")[0]  # the lonely first point is a dot
    places = [tuple(map(float, pair)) for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", d)]
    back = [(40 * x / SIDE, high - y / SIDE * (high - low)) for x, y in places]
    assert [x for x, _ in back] == pytest.approx([0, 20, 30], abs=0.01)
    assert [y for _, y in back] == pytest.approx([3.0, 1.5, 1.0], abs=0.001)


def test_constant_and_missing_values_can_be_drawn():
    assert "Nothing finite" in draw(Chart("lr", "Rate", "", [Curve(0, "a", [(1, None)])]), (0, 1), [])
    one = draw(Chart("lr", "Rate", "", [Curve(0, "a", [(1, 0.0)])], from_zero=True), (0, 1), [])
    assert 'class="dots' in one
    assert "nan" not in one


def test_frequent_events_do_not_hide_rare_ones():
    kinds = ["saved"] * 500 + ["spike"] + ["saved"] * 500
    marks = [Mark(0, i, kind) for i, kind in enumerate(kinds)]
    found = rarest(marks, kinds)
    assert len(found) == 40
    assert marks[500] in found
    assert marks[-1] in found


def test_numbers_for_people():
    assert [short(v) for v in (0, 950, 12_000, 1.5e6, 0.004)] == ["0", "950", "12k", "1.5M", "0.004"]
    assert [duration(s) for s in (0.25, 59.6, 61, 3599, 7_260, 90_000)] == [
        "0.25 s", "1 min", "1 min 1 s", "59 min", "2 h 1 min", "1 d 1 h"]  # fmt: skip


def test_addresses_lose_their_secrets():
    assert redact("s3://key:pass@bucket/x") == "s3://***@bucket/x"
    assert redact("https://h/x?a=1&X-Amz-Signature=abc&b=2") == "https://h/x?a=1&X-Amz-Signature=***&b=2"
    assert redact('dir = "gs://bucket/run@2"') == 'dir = "gs://bucket/run@2"'
