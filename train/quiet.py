"""Hugging Face's libraries keep quiet in a run: their bars and remarks are not what a person asked for. Errors pass."""

from __future__ import annotations

import logging
import os
import sys

SETTINGS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}
"""Environment variables that the libraries read as they are imported; what is set already stays."""
LIBRARIES = ("transformers", "datasets", "filelock", "fsspec", "httpx")
RETRIES = ("huggingface_hub.utils._http", "datasets.utils.file_utils")
"""Loggers that tell of requests to the Hub that are tried again."""


def quiet_libraries() -> None:
    """Switch off bars and remarks of Hugging Face's libraries; to be called before they are imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in RETRIES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        if not any(isinstance(one, OneLineOfRetries) for one in logger.filters):
            logger.addFilter(OneLineOfRetries())


class OneLineOfRetries(logging.Filter):
    """Of requests that fail and are tried again, the first is told in a line of our own, however many there are."""

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
