"""Token shards on disk: flat files of uint16 or uint32 ids and a manifest that says what they are.

A folder counts only with its `manifest.json`, which is written last. Documents lie one after another, each behind its
boundary token; rows are cut across them (concat and chunk), so no token is padding.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.corpus import DataError

MANIFEST = "manifest.json"
FULL_HASH_LIMIT = 4 << 30
"""Up to this many bytes every shard's content is hashed when a run starts; beyond, sizes are checked."""


@dataclass
class ShardFile:
    name: str
    tokens: int
    sha256: str


@dataclass
class Split:
    """One of "train" and "validation"."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of the text, for bits per byte."""
    files: list[ShardFile] = field(default_factory=list)


@dataclass
class Manifest:
    """What a folder of shards holds, and from what it was made."""

    source: dict[str, Any]
    inputs: str
    """Hash of the input: of the text (embedded), or of names, sizes and modification times (files)."""
    tokenizer: dict[str, Any]
    """kind, fingerprint, vocab_size, bos_id"""
    dtype: str
    splits: dict[str, Split]

    @property
    def fingerprint(self) -> str:
        """sha256 over tokenizer and contents: equal for equal tokens, wherever the folder lies."""
        content = {name: [file.sha256 for file in split.files] for name, split in self.splits.items()}
        text = json.dumps([content, self.tokenizer["fingerprint"], self.dtype], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """
        Raises:
            DataError: the manifest is not one that `prepare` wrote.
        """
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            splits = {
                name: Split(**{**split, "files": [ShardFile(**file) for file in split["files"]]})
                for name, split in content.pop("splits").items()
            }
            return cls(splits=splits, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / MANIFEST} cannot be read ({error}); run `newcompute prepare` again") from error


def verify(folder: Path, manifest: Manifest) -> None:
    """Check every shard's size, and its content where the corpus is small enough to hash at a start.

    Raises:
        DataError: naming the first shard that is missing, cut off or changed.
    """
    files = [file for split in manifest.splits.values() for file in split.files]
    item = np.dtype(manifest.dtype).itemsize
    remedy = "delete the folder and run `newcompute prepare` again"
    for file in files:
        path = folder / file.name
        if not path.exists():
            raise DataError(f"token shard {path} is missing; {remedy}")
        size = path.stat().st_size
        if size != file.tokens * item:
            raise DataError(f"token shard {path} has {size} bytes, its manifest says {file.tokens * item}; {remedy}")
    if sum(file.tokens for file in files) * item > FULL_HASH_LIMIT:
        return
    for file in files:
        with open(folder / file.name, "rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                raise DataError(
                    f"token shard {folder / file.name} is not what its manifest says (sha256 differs); {remedy}"
                )


class TokenFile:
    """All tokens of a split as one sequence, read through memory maps."""

    def __init__(self, folder: Path, manifest: Manifest, split: str):
        files = [file for file in manifest.splits[split].files if file.tokens]
        self._maps = [np.memmap(folder / file.name, manifest.dtype, "r") for file in files]
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
