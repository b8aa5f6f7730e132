"""The text of a training step: what stood in its rows, for a look at what made a loss leap or a gradient not finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train.data import open_data
from train.prepare import run_tokenizer
from train.run_folder import RunFolder


def rows_of_step(run: Path, step: int) -> Iterator[tuple[int, str]]:
    """(number in the training order, text) of each row of a step, counted from 1 as in the log.

    Raises:
        ValueError: the run's rows are not a function of their number: random or streamed.
        RunFolderError, DataError: it is no run, or its corpus is not there any more.
    """
    config = RunFolder(run).read_config()
    if config.data.streaming or config.data.all_sources[0].source == "random":
        kind = "a stream" if config.data.streaming else "random ids"
        raise ValueError(f"{run} trained on {kind}, which has no rows to look up")
    if step < 1:
        raise ValueError(f"--step {step}: steps are counted from 1")
    tokenizer = run_tokenizer(config)
    rows, _ = open_data(config, tokenizer, tokenizer.vocab_size, check=False)
    ids = np.empty(config.training.sequence_length + 1, dtype=np.int64)
    size = config.training.global_batch_size
    for row in range((step - 1) * size, step * size):
        rows.read(row, ids)
        yield row, tokenizer.decode(ids.tolist())
