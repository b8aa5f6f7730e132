"""Which source of a mixture gives row i: a pure function of (weights, i), with no table and no period.

The sources are the leaves of a binary tree (Huffman's, so that large shares are near the root). A node that has received
n rows has passed round(n a / (a + b)) of them to its left child, where a and b are the children's weights, and the rest
to the right one. Weights are whole numbers, so nothing is rounded anywhere else, and errors cannot add up over a run:

- After any number of rows, a source of share w has w n rows up to an error of 1/2 (1 + w / W1 + w / W2 + ...), where W1,
  W2, ... are the weights of the inner nodes on its path, without the root. In Huffman's tree they grow at least like the
  Fibonacci numbers, so no source is ever off by more than 1.7 rows. Equal shares are never off by a whole row.
- To look up a row takes as many steps as its source is deep: about log2(1 / w).

A fixed pattern of P rows, the obvious alternative, cannot do this: its quotas are whole numbers, so sources whose share
is below 1 / P are rounded to 0 or up to 1 in every period, and the error grows with the run.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in exactly the proportions of the weights."""
    exact = [Fraction(weight) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    divisor = math.gcd(*whole)
    return [weight // divisor for weight in whole]


class Shares:
    """The order in which sources give their rows.

    Args:
        weights: shares of the sources, positive, in any unit.
    """

    def __init__(self, weights: Sequence[float]):
        self.count = len(weights)
        # Nodes are numbered: first the sources, then the inner nodes in the order in which they are made.
        self._weights = whole_weights(weights)
        self._children: list[tuple[int, int]] = []
        queue = [(weight, source) for source, weight in enumerate(self._weights)]
        heapq.heapify(queue)
        while len(queue) > 1:
            right, left = heapq.heappop(queue), heapq.heappop(queue)
            self._children.append((left[1], right[1]))
            self._weights.append(left[0] + right[0])
            heapq.heappush(queue, (self._weights[-1], len(self._weights) - 1))

    def locate(self, i: int) -> tuple[int, int]:
        """(source, its row) of row i: a source's rows are numbered from 0 in the order in which they come."""
        node = len(self._weights) - 1
        while node >= self.count:
            left, right = self._children[node - self.count]
            passed = self._left(node, left, i)
            if self._left(node, left, i + 1) > passed:
                node, i = left, passed
            else:
                node, i = right, i - passed
        return node, i

    def counts(self, rows: int) -> list[int]:
        """How many of the first rows each source gives."""
        received = [0] * len(self._weights)
        received[-1] = rows
        for node in range(len(self._weights) - 1, self.count - 1, -1):
            left, right = self._children[node - self.count]
            received[left] = self._left(node, left, received[node])
            received[right] = received[node] - received[left]
        return received[: self.count]

    def _left(self, node: int, left: int, rows: int) -> int:
        """Rows that the left child has received when its parent has received `rows`: the nearest whole number."""
        whole = self._weights[node]
        return (2 * rows * self._weights[left] + whole) // (2 * whole)
