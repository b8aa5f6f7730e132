"""Which rows each step trained on, also where a run was resumed with other batch sizes. Torch-free.

A step number alone says nothing: step 100 of a run that went on with another batch at step 50 begins at another row than
100 batches. Every checkpoint's data state therefore carries the stretches of steps with equal batches, back to the
beginning of training, through any number of resumes and run folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train import records


@dataclass(frozen=True)
class Stretch:
    """Steps after each other that trained on batches of one size; it lasts until the next one, or goes on."""

    __pydantic_config__ = records.STRICT
    step: records.Count
    """Steps before it."""
    row: records.Count
    """Rows before it."""
    tokens: records.Count
    """Tokens before it."""
    rows_per_step: records.Count
    tokens_per_step: records.Count


class RowCounts:
    """Rows and tokens of all steps so far, and of those to come with the batch as it is.

    Args:
        stretches: in the order of training, at least one. The first begins at step 0, or where the record begins.
    """

    def __init__(self, stretches: Sequence[Stretch]):
        self.stretches = list(stretches)

    @classmethod
    def beginning(cls, rows_per_step: int, sequence_length: int) -> RowCounts:
        """The counts of a run from its first step on."""
        return cls([Stretch(0, 0, 0, rows_per_step, rows_per_step * sequence_length)])

    def resumed(self, step: int, rows_per_step: int, sequence_length: int) -> RowCounts:
        """The counts of a run that goes on after `step` with batches of this size."""
        kept = [stretch for stretch in self.stretches if stretch.step < step]
        last, tokens_per_step = kept[-1] if kept else None, rows_per_step * sequence_length
        if last is not None and (last.rows_per_step, last.tokens_per_step) == (rows_per_step, tokens_per_step):
            return RowCounts(kept)
        here = Stretch(step, self.rows(step), self.tokens(step), rows_per_step, tokens_per_step)
        return RowCounts([*kept, here])

    def rows(self, step: int) -> int:
        """Rows that the steps up to and including `step` trained on."""
        stretch = self._before(step)
        return stretch.row + (step - stretch.step) * stretch.rows_per_step

    def tokens(self, step: int) -> int:
        """Tokens that the steps up to and including `step` trained on."""
        stretch = self._before(step)
        return stretch.tokens + (step - stretch.step) * stretch.tokens_per_step

    def rows_of(self, step: int) -> range:
        """Numbers, in the order of training, of the rows that a step (counted from 1) trained on."""
        return range(self.rows(step - 1), self.rows(step))

    def _before(self, step: int) -> Stretch:
        """
        Raises:
            ValueError: the record begins later.
        """
        if step < self.first_step:
            raise ValueError(
                f"what steps up to {self.first_step} trained on is not recorded: an earlier version trained them"
            )
        return next(stretch for stretch in reversed(self.stretches) if stretch.step <= step)

    @property
    def unchanged_since(self) -> tuple[int, int]:
        """Steps and tokens before the batch became what it is now."""
        return self.stretches[-1].step, self.stretches[-1].tokens

    @property
    def first_step(self) -> int:
        """Steps before the record begins: 0, unless an earlier version trained them."""
        return self.stretches[0].step


@dataclass(frozen=True)
class RowRecord:
    """`rows.json` of a run folder: what its steps trained on."""

    __pydantic_config__ = records.STRICT
    fingerprint: str
    """Of the rows and their order, as in a checkpoint's data state."""
    stretches: list[Stretch]


@dataclass(frozen=True)
class DataState:
    """Where training stands in the data: all that a checkpoint needs to keep."""

    __pydantic_config__ = records.STRICT
    epoch: records.Count
    seed: records.Count
    rows_consumed: records.Count
    fingerprint: str
    stretches: list[Stretch] | None = None
    """How the rows were consumed; None: saved by an earlier version, which did not say."""

    @classmethod
    def of(cls, record: dict[str, Any], error: type[Exception]) -> DataState:
        """
        Raises:
            error: the record is none.
        """
        import json

        return records.parse(cls, json.dumps(record), "the checkpoint's record of its data", error)

    def counts(self, step: int, rows_per_step: int, sequence_length: int) -> RowCounts:
        """The counts of a run that goes on from this state after `step` with batches of this size."""
        if self.stretches:
            return RowCounts(self.stretches).resumed(step, rows_per_step, sequence_length)
        if not step:
            return RowCounts.beginning(rows_per_step, sequence_length)
        tokens = self.rows_consumed * sequence_length
        return RowCounts([Stretch(step, self.rows_consumed, tokens, rows_per_step, rows_per_step * sequence_length)])


def tokens_trained(state: dict[str, Any], step: int, sequence_length: int) -> int:
    """Tokens that a checkpoint was trained on, from its data state.

    Raises:
        ValueError: the state is none.
    """
    saved = DataState.of(state, ValueError)
    return RowCounts(saved.stretches).tokens(step) if saved.stretches else saved.rows_consumed * sequence_length
