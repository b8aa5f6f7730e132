"""Shares of a mixture, against exact fractions, for any number of sources and any weights."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.mixture import Shares, whole_weights

BOUND = Fraction(17, 10)
"""Rows that a source may be off by, after any number of rows."""
weights = st.floats(1e-12, 1e12) | st.sampled_from([1.0, 0.5, 1 / 3, 1e-300, 1e300, 1.618, 2.618]) | st.integers(1, 9)
many = st.lists(weights, min_size=1, max_size=40).map(lambda found: [float(weight) for weight in found])


def errors(shares: list[float], counts: list[int]) -> list[Fraction]:
    """How far counts are from the shares of their sum."""
    exact = [Fraction(share) for share in shares]
    total, rows = sum(exact), sum(counts)
    return [abs(count - rows * share / total) for count, share in zip(counts, exact, strict=True)]


@settings(max_examples=150, deadline=None)
@given(many, st.integers(0, 10**12))
def test_no_source_is_ever_off_by_more_than_the_bound(shares, rows):
    counts = Shares(shares).counts(rows)
    assert sum(counts) == rows
    assert max(errors(shares, counts)) < BOUND


@settings(max_examples=60, deadline=None)
@given(many, st.integers(0, 10**12))
def test_rows_are_numbered_as_they_are_counted(shares, first):
    """Row i is the next row of its source, so that each source's rows come once, in their own order."""
    order = Shares(shares)
    counts = order.counts(first)
    for i in range(first, first + 40):
        source, row = order.locate(i)
        assert row == counts[source]
        counts[source] += 1
    assert counts == order.counts(first + 40)


CASES = {
    "900, one with half": [0.5] + [0.5 / 899] * 899,
    "400 by Zipf's law": [1 / rank for rank in range(1, 401)],
    "1,100 equal": [1.0] * 1100,
    "3,000": [random.Random(0).lognormvariate(0, 2) for _ in range(3000)],
}


@pytest.mark.parametrize("shares", CASES.values(), ids=CASES)
def test_many_sources(shares):
    """A pattern of 1,024 rows cannot do this: most shares are less than a row of it."""
    order, largest, smallest = Shares(shares), max(shares), min(shares)
    for period in (1, 4, 100, 10_000):
        worst = max(errors(shares, order.counts(1024 * period)))
        assert worst < BOUND
        if period >= 4:
            assert worst < period / 2
    assert order.counts(1024)[shares.index(largest)] == pytest.approx(1024 * largest / sum(shares), abs=1.7)
    everyone = int(BOUND * Fraction(sum(shares)) / Fraction(smallest)) + 1
    assert min(order.counts(everyone)) >= 1


@pytest.mark.parametrize("shares", [[3.0, 1.0], [1.0, 1.0], [1.0] * 3, [0.7, 0.2, 0.1], [1.0] * 8, [1.0, 1 / 300]])
def test_few_sources_are_never_off_by_a_row(shares):
    """So they are spread evenly: any stretch of rows has each source's share of it."""
    order, counts = Shares(shares), [0] * len(shares)
    for i in range(1500):
        counts[order.locate(i)[0]] += 1
        assert max(errors(shares, counts)) < 1


@pytest.mark.parametrize(
    ("shares", "whole"),
    [([2.5], [1]), ([3.0, 1.0], [3, 1]), ([0.75, 0.25], [3, 1]), ([6.0, 2.0], [3, 1]), ([1.0, 2**-60], [2**60, 1])],
)
def test_only_proportions_matter(shares, whole):
    assert whole_weights(shares) == whole


def test_the_order_stays_as_it_is():
    """A checkpoint goes on in it: another order needs another fingerprint."""
    order = Shares([0.7, 0.2, 0.1])
    assert "".join(str(order.locate(i)[0]) for i in range(20)) == "01002000100100200010"
    assert [order.locate(10**15 + i) for i in range(3)] == [
        (0, 7 * 10**14),
        (1, 2 * 10**14),
        (0, 7 * 10**14 + 1),
    ]
