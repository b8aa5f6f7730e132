"""Fixtures of models that are built and compiled in the test process."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo import convert_frame
from torch._dynamo.eval_frame import reset_code
from torch._dynamo.pgo import reset_code_state
from torch._dynamo.utils import counters

from parallel import mesh as meshes


@pytest.fixture(scope="module")
def mesh():
    mesh = meshes.start("cpu")
    yield mesh
    torch.distributed.destroy_process_group()


@pytest.fixture
def fresh_compiler():
    """Forget compiled blocks, not the golden functions, whose tracing takes a second for each variant."""
    for seen in {*convert_frame.input_codes.seen, *convert_frame.output_codes.seen}:
        code = seen()
        if code is not None and code.co_name != "golden_compiled":
            reset_code(code)
    reset_code_state()
    counters.clear()
