"""Reading DCP checkpoints safely, from a folder or a URL that fsspec knows, and checking them in the background.

`SafeReader` takes the place of DCP's readers: `.metadata` is decoded without running it (`train/checkpoint_metadata.py`),
each tensor is loaded with `weights_only`, and its bytes are checked against the CRC-32 sums that torch.save puts into its
zip records: a flipped bit is refused and never becomes a weight. That costs one more pass over bytes in memory.

A checksum beside the bytes cannot see two files exchanged. For that `hashes` records blake2b sums of a sample of the
parts and of `.metadata` at save time; whoever keeps them (the commit marker) gives them to `SafeReader` and `verify`.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from train.checkpoint_metadata import METADATA, DamagedCheckpoint, decode

LARGEST_METADATA = 2 << 30
"""Bytes; 70 billion parameters on 64 devices have about 50 MB."""


def open_folder(path: str | os.PathLike[str]) -> tuple[AbstractFileSystem, str]:
    """The file system of a local path or of a URL, and the path on it."""
    text = os.fspath(path)
    if "://" in text:
        return url_to_fs(text)
    return LocalFileSystem(), os.path.abspath(text)


def file_sizes(fs: AbstractFileSystem, root: str) -> dict[str, int]:
    """Bytes of every file in a folder by name; a link that leads out of the folder does not count as one.

    Raises:
        DamagedCheckpoint: there is no such folder.
    """
    fs.invalidate_cache(root)
    try:
        found = fs.ls(root, detail=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedCheckpoint(f"{root} is no folder of a checkpoint") from error
    sizes = {}
    for entry in found:
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if entry["type"] == "file" and not (isinstance(fs, LocalFileSystem) and _leads_out(root, name)):
            sizes[name] = int(entry["size"])
    return sizes


def _leads_out(root: str, name: str) -> bool:
    return Path(root, name).resolve().parent != Path(root).resolve()


class SafeReader(FileSystemReader):
    """DCP's storage reader for checkpoints that may be damaged or hostile; they hold tensors and nothing else.

    Args:
        path: the folder, or a URL of it.
        hashes: from `hashes` at save time; what is read and has one there is compared.

    Raises:
        DamagedCheckpoint: by the reading methods, naming the file and what is wrong with it. A storage that cannot be reached
            raises OSError.
    """

    def __init__(self, path: str | os.PathLike[str], hashes: Mapping[str, str] | None = None):
        super().__init__(path)
        self.path = path if "://" in os.fspath(path) else Path(path)
        self.hashes = dict(hashes or {})
        self._metadata: Metadata | None = None
        self._files, self._root = open_folder(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        sizes = file_sizes(self._files, self._root)
        where = f"{self.path}/{METADATA}"
        if METADATA not in sizes:
            raise DamagedCheckpoint(f"{where} is missing")
        if sizes[METADATA] > LARGEST_METADATA:
            raise DamagedCheckpoint(f"{where} has {sizes[METADATA]} bytes, which is no metadata of tensors")
        data = self._files.cat_file(f"{self._root}/{METADATA}")
        self._compare(METADATA, data, where)
        try:
            self._metadata = decode(data, sizes)
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{where} is damaged: {error}") from error
        return self._metadata

    def parts(self) -> list[tuple[MetadataIndex, _StorageInfo]]:
        """Every part of every tensor, in the order in which they lie in the files."""
        metadata = self._metadata or self.read_metadata()
        return sorted(metadata.storage_data.items(), key=lambda part: (part[1].relative_path, part[1].offset))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted = defaultdict(list)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise DamagedCheckpoint(
                    f"{item.storage_index.fqn} is asked for as an object; a checkpoint holds tensors"
                )
            wanted[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in wanted.items():
            items.sort(key=lambda item: self.storage_data[item.storage_index].offset)
            with self._open(name) as file:
                for item in items:
                    _, tensor = self.read_part(file, item.storage_index)
                    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths)):
                        tensor = tensor.narrow(dim, start, length)
                    target = planner.resolve_tensor(item).detach()
                    if target.size() != tensor.size():
                        raise DamagedCheckpoint(f"{item.storage_index.fqn} has another shape than is asked for")
                    target.copy_(tensor)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_part(self, file: Any, index: MetadataIndex) -> tuple[bytes, Tensor]:
        """The bytes of one part in its opened file, and the checked tensor on CPU that they are."""
        metadata = self._metadata or self.read_metadata()
        info, entry = metadata.storage_data[index], metadata.state_dict_metadata[index.fqn]
        where = f"{self.path}/{info.relative_path}: {index.fqn} at {info.offset}"
        file.seek(info.offset)
        data = file.read(info.length)
        if len(data) != info.length:
            raise DamagedCheckpoint(f"{where} is cut off")
        self._compare(part_key(info), data, where)
        tensor = _checked_tensor(data, where)
        sizes = next(chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset)
        if tensor.size() != sizes or tensor.dtype != entry.properties.dtype:
            expected = f"{entry.properties.dtype} of shape {list(sizes)}"
            raise DamagedCheckpoint(f"{where} is {tensor.dtype} of shape {list(tensor.shape)}, expected {expected}")
        return data, tensor

    def _open(self, name: str) -> Any:
        try:
            return self._files.open(f"{self._root}/{name}", "rb")
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{self.path}/{name} is missing") from error

    def _compare(self, key: str, data: bytes, where: str) -> None:
        if key in self.hashes and _hash(data) != self.hashes[key]:
            raise DamagedCheckpoint(f"{where} is not what was saved (its hash differs)")


def _checked_tensor(data: bytes, where: str) -> Tensor:
    """What torch.save wrote, if its sums agree and it is one plain tensor.

    The zip must hold its records as they are: a deflated one could expand to a thousand times its size. torch.load takes
    the length of a storage from the pickle beside it and reads that far, so the two are compared before a value is.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
            if len(records) != len(archive.infolist()) or len(records) > 32:
                raise DamagedCheckpoint(f"{where}: expected the records of one tensor")
            if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
                raise DamagedCheckpoint(f"{where} is compressed, which torch.save never does")
            broken = archive.testzip()
            if broken:
                raise DamagedCheckpoint(f"{where} is damaged (the checksum of {broken} differs)")
            if archive.read(records["byteorder"]).decode() != sys.byteorder:
                raise DamagedCheckpoint(f"{where} was written on a machine of another byte order")
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise DamagedCheckpoint(f"{where} is no plain tensor")
        if tensor.untyped_storage().nbytes() > records["data/0"].file_size:
            raise DamagedCheckpoint(f"{where} has fewer bytes than its tensor")
        return tensor
    except (DamagedCheckpoint, MemoryError):
        raise
    except Exception as error:  # damaged bytes make zipfile and torch.load raise nearly anything
        raise DamagedCheckpoint(f"{where} is damaged ({type(error).__name__}: {str(error)[:200]})") from error


def part_key(info: _StorageInfo) -> str:
    return f"{info.relative_path}@{info.offset}+{info.length}"


def hashes(path: str | os.PathLike[str], sample: int) -> dict[str, str]:
    """{".metadata": ..., "file@offset+length": ...}: blake2b sums (hex) of `.metadata` and of at most `sample` parts.

    Called by the main process once all have written. The parts are read back and checked as at a load.

    Raises:
        DamagedCheckpoint: what was written cannot be read back.
    """
    reader = SafeReader(path)
    found = {METADATA: _hash(reader._files.cat_file(f"{reader._root}/{METADATA}"))}
    for info, data in _sampled(reader, sample):
        found[part_key(info)] = _hash(data)
    return found


def verify(
    path: str | os.PathLike[str],
    files: Mapping[str, int] | None,
    sample: int = 64,
    hashes: Mapping[str, str] | None = None,
) -> None:
    """Check a checkpoint's files as far as is cheap: names and sizes, `.metadata`, and a fixed sample of the tensors' parts.

    Args:
        files: bytes of every file by name, as they were when it was committed.
        sample: parts to load; their checksums, and their hashes where `hashes` has them, must agree.
        hashes: from `hashes` at save time.

    Raises:
        DamagedCheckpoint: naming the first file that is missing or not as it was; OSError: the storage cannot be read.
    """
    there = file_sizes(*open_folder(path))
    for name, size in (files or {}).items():
        if name not in there:
            raise DamagedCheckpoint(f"{path}/{name} is missing")
        if there[name] != size:
            raise DamagedCheckpoint(f"{path}/{name} has {there[name]} bytes, it was saved with {size}")
    for _ in _sampled(SafeReader(path, hashes), sample):
        pass


def _sampled(reader: SafeReader, sample: int) -> Iterator[tuple[_StorageInfo, bytes]]:
    """Load parts at even distances over all files, the first and the last among them; gives their bytes."""
    parts = reader.parts()
    count = min(sample, len(parts))
    chosen = sorted({i * (len(parts) - 1) // max(1, count - 1) for i in range(count)})
    for index, info in (parts[i] for i in chosen):
        with reader._open(info.relative_path) as file:
            yield info, reader.read_part(file, index)[0]


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
