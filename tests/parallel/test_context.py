"""Who holds which columns of a row under context parallelism."""

from __future__ import annotations

import pytest
import torch

from models.attention import attention_mask
from parallel.context import columns_of


@pytest.mark.parametrize(("size", "length"), [(2, 8), (4, 64), (3, 66)])
def test_every_column_once_and_equal_work(size, length):
    parts = [columns_of(rank, size, length) for rank in range(size)]
    assert sorted(torch.cat(parts).tolist()) == list(range(length))
    keys = torch.arange(length)
    work = [int(attention_mask(part, keys).sum()) for part in parts]
    assert len(set(work)) == 1, "pairs of a query and a key that it sees"


def test_head_and_tail_by_hand():
    assert columns_of(0, 2, 8).tolist() == [0, 1, 6, 7]
    assert columns_of(1, 2, 8).tolist() == [2, 3, 4, 5]
