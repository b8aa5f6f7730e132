"""What `--model` may name, checked without loading anything."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
)
"""A Hugging Face folder with a tokenizer has one of these, or code that makes it."""


def is_local(reference: str) -> bool:
    """Whether a reference is meant as a path here: a Hub id is NAME or OWNER/NAME, and no folder here is its owner."""
    path = Path(reference)
    if path.exists() or path.is_absolute() or reference.startswith((".", "~")) or reference.endswith("/"):
        return True
    parts = path.parts
    return len(parts) > 2 or (len(parts) == 2 and (parts[0] == "outputs" or Path(parts[0]).is_dir()))


def check_reference(reference: str) -> None:
    """
    Raises:
        ValueError: a path to nothing.
    """
    if is_local(reference) and not Path(reference).exists():
        raise ValueError(
            f"{reference}: no such folder; expected a run, a checkpoint, a Hugging Face folder, or a Hub id"
        )


def check_tokenizer_files(folder: Path) -> None:
    """
    Raises:
        ValueError: a folder of a model without its tokenizer, of which transformers would say something else.
    """
    if any(folder.glob("*.py")) or any((folder / name).exists() for name in TOKENIZER_FILES):
        return
    raise ValueError(
        f"{folder}: there is no tokenizer in this folder, none of {', '.join(TOKENIZER_FILES)}: copy the model's into it"
    )
