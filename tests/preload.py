"""What the processes of tests share: imported once, by the server that they are forked from (see support.py)."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # of the project, this checkout and no installed copy

import pyarrow.parquet  # noqa: F401
import rich.table  # noqa: F401
import tokenizers  # noqa: F401
import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed.checkpoint  # noqa: F401
import torchdata.stateful_dataloader  # noqa: F401

import train.distillation
import train.job
import train.trainer  # noqa: F401

# Collections of the processes pass over all of this, and do not copy its pages by marking them.
gc.freeze()
