"""Which effects act on which architectures, as the documentation says."""

from __future__ import annotations

import json

import pytest

from benchmarks import families
from benchmarks.common import RESULTS

COMMITTED = json.loads((RESULTS / "families.json").read_text(encoding="utf-8"))["families"]
QUICK = ("llama", "mixtral")


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families.FAMILIES]
)
def test_effects_act_on_a_family_as_the_table_says(family):
    found, listed = families.measure(family), COMMITTED[family]
    assert found.pop("share") == pytest.approx(listed["share"])
    assert found == {key: value for key, value in listed.items() if key != "share"}
    assert "does nothing" not in found.values()


def test_the_table_of_the_documentation_is_that_of_the_result():
    assert families.table(COMMITTED) in families.DOCS.read_text(encoding="utf-8")
