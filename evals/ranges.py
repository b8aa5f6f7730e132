"""Files of converters' ranges: of a calibration, or beside an export."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def read_ranges(file: Path) -> dict[str, Tensor]:
    """
    Raises:
        ValueError: it is no file of ranges.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} holds no ranges: {error}; newcompute calibrate writes such a file") from error


def write_ranges(file: Path, ranges: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of ranges, whole or not at all."""
    temporary = file.with_name(f".{file.name}.part")
    save_file(dict(ranges), temporary, dict(metadata))
    os.replace(temporary, file)
