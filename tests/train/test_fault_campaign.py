"""A few seeds of the fault campaign; `benchmarks/fault_campaign.py` runs all."""

from __future__ import annotations

import pytest
from campaign import SCENARIOS, Campaign

NAMES = [scenario.name for scenario in SCENARIOS]
FAST = ["killed in a save"]  # signals, damaged files and full disks have fast tests of their own


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("campaign"))


@pytest.mark.parametrize(
    "seed",
    [pytest.param(i, id=name, marks=[] if name in FAST else [pytest.mark.slow]) for i, name in enumerate(NAMES)],
)
def test_a_run_under_faults_ends_as_an_undisturbed_one(campaign, seed):
    row = campaign.run(seed)
    assert not row.problem, row
    assert row.happened
