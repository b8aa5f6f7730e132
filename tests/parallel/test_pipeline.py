"""Which stage holds what: the split by cost against all splits there are, and who holds which stages."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from models.llama import Llama
from models.sizes import SIZES, LlamaShape, layer_parameters
from parallel.pipeline import EMBEDDING_COST_PER_FEATURE, cut, split_layers, stages_of_rank

LENGTH = 2048


def costs(shape: LlamaShape, counts: list[int]) -> list[int]:
    """Forward FLOPs per token of each stage, written out anew."""
    block = 2 * layer_parameters(shape) + 4 * LENGTH * shape.num_heads * shape.head_dim
    found = [count * block for count in counts]
    found[0] += EMBEDDING_COST_PER_FEATURE * shape.dim
    found[-1] += 2 * shape.dim * shape.padded_vocab_size
    return found


@pytest.mark.parametrize("size", ["debug", "60M", "200M", "1.1B"])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_no_split_has_a_cheaper_worst_stage(size, num_stages):
    shape = SIZES["clm"][size]
    layers = split_layers(shape, LENGTH, num_stages)
    assert [i for stage in layers for i in stage] == list(range(shape.num_layers))
    best = min(
        max(costs(shape, [b - a for a, b in pairwise([0, *cuts, shape.num_layers])]))
        for cuts in combinations(range(1, shape.num_layers), num_stages - 1)
    )
    assert max(costs(shape, [len(stage) for stage in layers])) == best


def test_the_head_counts():
    """60M: the head costs as much as several blocks, so its stage has fewer."""
    first, second = split_layers(SIZES["clm"]["60M"], LENGTH, 2)
    assert len(second) < len(first)


def test_405b_over_eight_devices():
    stages = split_layers(SIZES["llama3"]["405B"], 8192, 16)
    assert sum(map(len, stages)) == 126
    assert {len(stage) for stage in stages} <= {7, 8}


@pytest.mark.parametrize(
    ("schedule", "kind"), [("interleaved_1f1b", ScheduleInterleaved1F1B), ("zbv", ScheduleZBVZeroBubble)]
)
def test_stages_are_where_the_schedule_looks_for_them(schedule, kind):
    """A stage's rank as torch's own stage objects compute it."""
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    style = "v" if schedule == "zbv" else "loop"
    expected = generate_stage_to_rank_mapping(4, 8, style)
    for rank in range(4):
        mine = stages_of_rank(rank, 4, 2, schedule)
        assert [expected[stage] for stage in mine] == [rank, rank]


def test_a_stage_is_the_models_own_modules():
    with torch.device("meta"):
        model = Llama(SIZES["clm"]["debug"], context=8)
    first, last = cut(model, range(0, 3), True, False), cut(model, range(3, 4), False, True)
    assert first.model.layers["1"] is model.model.layers["1"]
    assert last.lm_head is model.lm_head
    assert first.lm_head is None
    assert first.model.norm is None
    assert last.model.embed_tokens is None
    names = {name for part in (first, last) for name, _ in part.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
    first.register_forward_hook(lambda *call: None)
    assert not last._forward_hooks
    assert len(model.model.layers) == 4
