"""The libraries under a command keep quiet: what they say about themselves is not what a person asked for."""

from __future__ import annotations

import logging
import os
import sys
import warnings

SETTINGS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "LMEVAL_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables that libraries read as they are imported; those that are set already stay."""
LIBRARIES = ("transformers", "datasets", "evaluate", "lm_eval", "torch", "torchao", "matplotlib", "filelock", "httpx")


def quiet_libraries() -> None:
    """Switch off bars, remarks and warnings of the libraries; errors pass. To be called before they are imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)}|huggingface_hub|tokenizers|safetensors)\b")
    if "transformers" in sys.modules:  # it has read its variables already
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    hub = logging.getLogger("huggingface_hub.utils._http")
    if not any(isinstance(one, OneLineOfRetries) for one in hub.filters):
        hub.addFilter(OneLineOfRetries())


class OneLineOfRetries(logging.Filter):
    """Of the Hub's requests that fail and are tried again, one line is told, however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        if not self.told and "retry" in record.getMessage().lower():
            self.told = True
            print("newcompute: the Hugging Face Hub does not answer; trying again", file=sys.stderr, flush=True)
        return False
