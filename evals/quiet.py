"""The libraries under an evaluation keep quiet: what they say about themselves is not what a person asked for."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from train.quiet import quiet_libraries as quiet_hugging_face

SETTINGS = {"LMEVAL_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
"""Environment variables that libraries read as they are imported; those that are set already stay."""
LIBRARIES = ("transformers", "datasets", "evaluate", "lm_eval", "torch", "torchao", "matplotlib")
ALONE = ("torch.utils._pytree",)
"""Loggers below them to name as well, since torch sets the level of its own as it is imported. This one scolds torchao."""


def quiet_libraries() -> None:
    """Switch off bars, remarks and warnings of the libraries; errors pass. To be called before they are imported."""
    quiet_hugging_face()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in (*LIBRARIES, *ALONE):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)}|huggingface_hub|tokenizers|safetensors)\b")
    if "transformers" in sys.modules:  # it has read its variables already
        sys.modules["transformers"].utils.logging.disable_progress_bar()
