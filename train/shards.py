"""Token shards on disk: flat files of uint16 or uint32 ids and a manifest that says what they are.

A folder counts only with its `manifest.json`, which is written last. Documents lie one after another, each behind its
boundary token; rows are cut across them (concat and chunk), so no token is padding.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train import records
from train.corpus import DataError
from train.tokenizer import Tokenizer, difference, text_fingerprint

MANIFEST = "manifest.json"
PREPARE = "; run `newcompute prepare` again"
REMEDY = "; delete the folder and run `newcompute prepare` again"
FULL_HASH_LIMIT = 4 << 30
"""Up to this many bytes every shard's content is hashed when a run starts; beyond, sizes are checked."""


@dataclass
class ShardFile:
    __pydantic_config__ = records.STRICT
    name: str
    tokens: records.Count
    sha256: str


@dataclass
class Split:
    """One of "train" and "validation"."""

    __pydantic_config__ = records.STRICT
    documents: records.Count = 0
    tokens: records.Count = 0
    bytes: records.Count = 0
    """UTF-8 bytes of the text, for bits per byte."""
    files: list[ShardFile] = field(default_factory=list)


@dataclass
class Manifest:
    """What a folder of shards holds, and from what it was made."""

    __pydantic_config__ = records.STRICT
    source: dict[str, Any]
    inputs: str
    """Hash of the input: of the text (embedded), or of names, sizes and modification times (files)."""
    tokenizer: dict[str, Any]
    """kind, fingerprint, vocab_size, bos_id"""
    dtype: Literal["uint16", "uint32"]
    splits: dict[str, Split]
    skipped: dict[str, records.Count] = field(default_factory=dict)
    """Documents that could not be used and were left out, by reason."""
    replaced: records.Count = 0
    """Bytes that were not UTF-8 and became U+FFFD."""

    @property
    def fingerprint(self) -> str:
        """sha256 over tokenizer and contents: equal for equal tokens, wherever the folder lies."""
        content = {name: [file.sha256 for file in split.files] for name, split in self.splits.items()}
        # The boundary token is in the contents, and was not always in the tokenizer's fingerprint.
        tokenizer = text_fingerprint(self.tokenizer["fingerprint"])
        text = json.dumps([content, tokenizer, self.dtype], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def other_tokenizer(self, tokenizer: Tokenizer) -> str:
        """How a tokenizer differs from the one of these shards; empty where its ids are the same."""
        noted, bos_id = self.tokenizer["fingerprint"], self.tokenizer.get("bos_id", tokenizer.bos_id)
        return difference(
            f"{text_fingerprint(noted)}-{bos_id}", f"{text_fingerprint(tokenizer.fingerprint)}-{tokenizer.bos_id}"
        )

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(records.sealed(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """
        Raises:
            DataError: the manifest is not one that `prepare` wrote, or has been changed.
        """
        manifest = records.read(cls, folder / MANIFEST, DataError, PREPARE)
        if not isinstance(manifest.tokenizer.get("fingerprint"), str) or set(manifest.splits) != {
            "train",
            "validation",
        }:
            raise DataError(
                f"{folder / MANIFEST} cannot be read (its tokenizer or one of its splits is missing){PREPARE}"
            )
        for name, split in manifest.splits.items():
            if split.tokens != sum(file.tokens for file in split.files):
                raise DataError(f"{folder / MANIFEST} cannot be read (the tokens of {name} do not add up){PREPARE}")
        return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check that every shard lies in the folder and has its size, before anything is mapped.

    Raises:
        DataError: naming the first shard that is missing, elsewhere or cut off.
    """
    item = np.dtype(manifest.dtype).itemsize
    for file in (file for split in manifest.splits.values() for file in split.files):
        path = records.file_inside(folder, file.name, DataError, REMEDY)
        if not path.is_file():
            raise DataError(f"token shard {path} is missing{REMEDY}")
        size = path.stat().st_size
        if size != file.tokens * item:
            raise DataError(f"token shard {path} has {size} bytes, its manifest says {file.tokens * item}{REMEDY}")


def verify(folder: Path, manifest: Manifest) -> None:
    """Check every shard's size, and its content where the corpus is small enough to hash at a start.

    Raises:
        DataError: naming the first shard that is missing, cut off or changed.
    """
    check_files(folder, manifest)
    files = [file for split in manifest.splits.values() for file in split.files]
    if sum(file.tokens for file in files) * np.dtype(manifest.dtype).itemsize > FULL_HASH_LIMIT:
        return
    for file in files:
        with open(folder / file.name, "rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                raise DataError(
                    f"token shard {folder / file.name} is not what its manifest says (sha256 differs){REMEDY}"
                )


def _mapped(path: Path, dtype: str, count: int) -> np.ndarray:
    """A file's numbers, read from the disk as they are looked at.

    PyTorch closes the file behind the map. numpy's maps keep each one open, and a mixture of thousands of sources would have more
    open files than most systems allow.
    """
    import torch

    return torch.from_file(str(path), shared=False, size=count, dtype=getattr(torch, dtype)).numpy()


class TokenFile:
    """All tokens of a split as one sequence, read through memory maps."""

    def __init__(self, folder: Path, manifest: Manifest, split: str):
        files = [file for file in manifest.splits[split].files if file.tokens]
        self._maps = [_mapped(folder / file.name, manifest.dtype, file.tokens) for file in files]
        self._starts = np.cumsum([0] + [len(tokens) for tokens in self._maps])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy tokens [start, start + len(out)) into `out`."""
        done = 0
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < len(out):
            tokens = self._maps[part]
            begin = start + done - int(self._starts[part])
            count = min(len(out) - done, len(tokens) - begin)
            out[done : done + count] = tokens[begin : begin + count]
            done += count
            part += 1


class SplitWriter:
    """Appends documents to the shard files of one split; a file ends at a document's end once it is long enough."""

    def __init__(self, folder: Path, name: str, dtype: str, max_tokens: int, split: Split | None = None):
        self.folder, self.name, self.dtype, self.max_tokens = folder, name, dtype, max_tokens
        self.split = split or Split()
        self._file: Any = None

    def add(self, ids: np.ndarray, num_bytes: int) -> bool:
        """Write one document; True when this closed a file."""
        if self._file is None:
            self._shard = ShardFile(f"{self.name}-{len(self.split.files):05d}.bin", 0, "")
            self._hash = hashlib.sha256()
            self._file = open(self.folder / self._shard.name, "wb")  # noqa: SIM115 - closed in close_file
        data = ids.astype(self.dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._shard.tokens += len(ids)
        self.split.documents += 1
        self.split.tokens += len(ids)
        self.split.bytes += num_bytes
        if self._shard.tokens >= self.max_tokens:
            self.close_file()
            return True
        return False

    def close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._shard.sha256 = self._hash.hexdigest()
            self.split.files.append(self._shard)
