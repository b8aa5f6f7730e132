"""The text of a training step: what stood in its rows, for a look at what made a loss leap or a gradient not finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evals.runs import Run, read_run
from train.data import open_data
from train.prepare import run_tokenizer
from train.run_folder import opened


def rows_of_step(path: Path, step: int) -> Iterator[tuple[int, str]]:
    """(number in the training order, text) of each row of a step, counted from 1 as in the log.

    Raises:
        ValueError: the run's rows are not a function of their number (random or streamed), or the run does not say which
            ones the step had.
        RunFolderError, DataError: it is no run, or its corpus is not there any more.
    """
    config = opened(path).read_config()
    if config.data.streaming or config.data.all_sources[0].source == "random":
        kind = "a stream" if config.data.streaming else "random ids"
        raise ValueError(f"{path} trained on {kind}, which has no rows to look up")
    if step < 1:
        raise ValueError(f"--step {step}: steps are counted from 1")
    run = read_run(path)
    numbers = _rows_of(run, step)
    tokenizer = run_tokenizer(config)
    rows, _ = open_data(config, tokenizer, tokenizer.vocab_size, check=False)
    # A single source has had the same order in all versions, a mixture has not.
    if run.rows_fingerprint != rows.fingerprint and (run.rows_fingerprint or len(config.data.all_sources) > 1):
        raise ValueError(
            f"the corpus in {config.data.dir} is not the one that {path} trained on (its text, tokens or order of rows differ)"
        )
    ids = np.empty(config.training.sequence_length + 1, dtype=np.int64)
    for row in numbers:
        rows.read(row, ids)
        yield row, tokenizer.decode(ids.tolist())


def _rows_of(run: Run, step: int) -> range:
    if run.counts is None:
        problems = "".join(f"\n  {problem}" for problem in run.problems)
        raise ValueError(f"{run.path} does not say which rows its steps had{problems}")
    try:
        return run.counts.rows_of(step)
    except ValueError as error:
        raise ValueError(f"--step {step}: {error}") from error
