"""Losses that leap out of the recent ones."""

from __future__ import annotations

import math
import statistics
from collections import deque

REMEMBERED = 100
FEWEST = 20
"""Losses without which a mean and a deviation say little; the first ones of a run fall steeply besides."""


class Spikes:
    """Flags a logged loss that is far above the last ones.

    Args:
        threshold: standard deviations above the mean from which a loss counts as a spike; 0: none does.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=REMEMBERED)

    def seen(self, loss: float) -> str:
        """Take note of a loss in nats; a sentence if it is a spike, and such a one does not raise the threshold of the next."""
        if not self.threshold or not math.isfinite(loss):
            return ""
        if len(self._losses) >= FEWEST:
            mean, deviation = statistics.fmean(self._losses), statistics.stdev(self._losses)
            if loss > mean + self.threshold * max(deviation, 1e-3 * abs(mean)):
                return f"loss {loss:.4f} is a spike: the last {len(self._losses)} logged ones are {mean:.4f} +- {deviation:.4f}"
        self._losses.append(loss)
        return ""
