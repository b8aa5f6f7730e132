"""The `.metadata` of a DCP checkpoint, read without running anything that it says.

DCP (torch.distributed.checkpoint) writes it with pickle, and Python's unpickler calls whatever a file names. Here the
opcodes are those that DCP's own files contain, the names stand for inert records, and what comes out is built anew from
checked values. pickle's Python implementation is used since the one in C cannot be limited to some opcodes (one of the
others makes it allocate 64 GiB); that takes about three times as long.

Allowing torch's classes to a plain `pickle.Unpickler.find_class` was rejected: pickle can also set attributes on a class.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA = ".metadata"
LARGEST_SIZE = 1 << 48
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DCP = "torch.distributed.checkpoint"
_RECORDS = {
    (f"{_DCP}.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
    )
} | {(f"{_DCP}.filesystem", "_StorageInfo")}


class DamagedCheckpoint(ValueError):
    """A checkpoint's file is missing, cut off or changed, or holds what no checkpoint of ours does."""


@dataclass(frozen=True)
class _Kind:
    """A class that a pickle names."""

    name: str


class _Record:
    """An instance of such a class, with the state that the pickle gives it."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str):
        self.kind, self.state = kind, None


def _size(dims: Any) -> tuple[Any, ...]:
    return tuple(dims)


def _text(*parts: Any) -> str:
    return "/".join(map(str, parts))


_CALLS = {  # what stands for a call: a torch.Size, a layout by its name, a memory format by its number, a path
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _text,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _text,
    **{
        (module, name): _text
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}
_OPCODES = [
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"),
]


class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _Kind(name)
        if (module, name) in _CALLS:
            return _CALLS[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise DamagedCheckpoint(f"it names {module}.{name}, which no checkpoint needs; nothing of it was run")

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        if not isinstance(kind, _Kind) or arguments != ():
            raise DamagedCheckpoint("it makes an object that no checkpoint needs")
        self.append(_Record(kind.name))  # type: ignore[attr-defined]

    def load_build(self) -> None:
        state, record = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if not isinstance(record, _Record):
            raise DamagedCheckpoint("it gives a state to what has none")
        record.state = state

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if function not in _CALLS.values() or not isinstance(arguments, tuple):
            raise DamagedCheckpoint("it calls what no checkpoint needs")
        self.stack[-1] = function(*arguments)  # type: ignore[attr-defined]

    dispatch: ClassVar[Any] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES
    } | {
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
    }


def decode(data: bytes, sizes: dict[str, int]) -> Metadata:
    """DCP's `Metadata` out of the bytes of its file.

    Args:
        sizes: bytes of every file beside it; parts that would lie elsewhere or beyond are refused.

    Raises:
        DamagedCheckpoint: it is not what DCP writes for tensors alone, or contradicts itself or `sizes`.
    """
    try:
        found = _Unpickler(io.BytesIO(data)).load()
    except DamagedCheckpoint:
        raise
    except Exception as error:  # damaged bytes make an unpickler raise nearly anything
        raise DamagedCheckpoint(f"it cannot be read ({type(error).__name__}: {str(error)[:200]})") from error
    table = _state(found, "Metadata")
    tensors = {_name(key): _tensor(key, entry) for key, entry in _dict(table, "state_dict_metadata").items()}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for key, entry in _dict(table, "storage_data").items():
        index = _index(key)
        if index in storage:
            _refuse(f"{index.fqn} has two parts at {list(index.offset or ())}")
        storage[index] = _info(entry, index.fqn, sizes)
    _check_parts(tensors, storage)
    _check_ranges(storage)
    version = table.get("version")
    names = {name: (name,) for name in tensors}  # what DCP's planner records for a flat state dict
    version = version if isinstance(version, str) else None
    return Metadata(tensors, planner_data=names, storage_data=storage, storage_meta=StorageMeta(), version=version)


def _refuse(what: str) -> NoReturn:
    raise DamagedCheckpoint(what)


def _state(record: Any, kind: str) -> dict[str, Any]:
    if not isinstance(record, _Record) or record.kind != kind or not isinstance(record.state, dict):
        found = record.kind if isinstance(record, _Record) else type(record).__name__
        _refuse(f"expected a {kind}, found {found}")
    return record.state


def _dict(table: dict[str, Any], key: str) -> dict[Any, Any]:
    value = table.get(key)
    if not isinstance(value, dict):
        _refuse(f"its {key} is missing")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        _refuse(f"expected the name of a tensor, found a {type(value).__name__}")
    return value


def _count(value: Any, what: str, limit: int = LARGEST_SIZE) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        number = value if type(value) is int and abs(value) < 1 << 100 else type(value).__name__
        _refuse(f"{what}: expected a number from 0 to {limit}, found {number}")
    return value


def _dims(value: Any, what: str) -> torch.Size:
    if not isinstance(value, tuple) or len(value) > 16:
        _refuse(f"{what}: expected a shape, found a {type(value).__name__}")
    return torch.Size([_count(dim, what) for dim in value])


def _tensor(name: str, entry: Any) -> TensorStorageMetadata:
    if isinstance(entry, _Record) and entry.kind == "BytesStorageMetadata":
        _refuse(f"{name} is no tensor but an object, which would have to be unpickled; a run saves none")
    table = _state(entry, "TensorStorageMetadata")
    properties = table.get("properties")
    state = properties.state if isinstance(properties, _Record) and properties.kind == "TensorProperties" else None
    if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
        _refuse(f"{name} has no type")
    size = _dims(table.get("size"), name)
    chunks = table.get("chunks")
    if not isinstance(chunks, list) or not chunks:
        _refuse(f"{name} has no parts")
    parts = [_chunk(name, chunk, size) for chunk in chunks]
    _check_tiling(name, size, parts)
    return TensorStorageMetadata(TensorProperties(dtype=state[0]), size, parts)


def _chunk(name: str, entry: Any, size: torch.Size) -> ChunkStorageMetadata:
    table = _state(entry, "ChunkStorageMetadata")
    offsets, sizes = _dims(table.get("offsets"), name), _dims(table.get("sizes"), name)
    if not len(offsets) == len(sizes) == len(size) or any(o + s > d for o, s, d in zip(offsets, sizes, size)):
        _refuse(f"{name} of shape {list(size)} has a part of shape {list(sizes)} at {list(offsets)}")
    return ChunkStorageMetadata(offsets, sizes)


def _check_tiling(name: str, size: torch.Size, parts: list[ChunkStorageMetadata]) -> None:
    """Parts that lie apart and have together as many elements as the tensor cover it."""
    if sum(math.prod(part.sizes) for part in parts) != math.prod(size):
        _refuse(f"{name} of shape {list(size)}: its parts have another number of elements")
    filled = sorted((part for part in parts if math.prod(part.sizes)), key=lambda part: tuple(part.offsets))
    if not size or any(part.sizes[1:] != size[1:] for part in filled):
        return  # cut along several dimensions: the sum alone is checked
    ends = [0, *(part.offsets[0] + part.sizes[0] for part in filled)]
    if any(part.offsets[0] != end for part, end in zip(filled, ends)):
        _refuse(f"{name} of shape {list(size)}: its parts overlap")


def _index(key: Any) -> MetadataIndex:
    table = _state(key, "MetadataIndex")
    name, index = _name(table.get("fqn")), table.get("index")
    return MetadataIndex(
        name, _dims(table.get("offset"), name), None if index is None else _count(index, f"{name}'s part")
    )


def _info(entry: Any, name: str, sizes: dict[str, int]) -> _StorageInfo:
    table = _state(entry, "_StorageInfo")
    file = table.get("relative_path")
    if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
        shown = repr(file[:100]) if isinstance(file, str) else type(file).__name__
        _refuse(f"{name} would lie in {shown}, which is no plain name of a file in its folder")
    if table.get("transform_descriptors"):
        _refuse(f"{name} is compressed or encrypted, which a run's checkpoints never are")
    if file not in sizes:
        _refuse(f"{name} lies in {file}, which is missing")
    offset, length = _count(table.get("offset"), name), _count(table.get("length"), name)
    if offset + length > sizes[file]:
        _refuse(f"{name} lies at {offset} to {offset + length} of {file}, which has only {sizes[file]} bytes")
    return _StorageInfo(file, offset, length)


def _check_parts(tensors: dict[str, TensorStorageMetadata], storage: dict[MetadataIndex, _StorageInfo]) -> None:
    """Every part has its place in a file, long enough for it, and every place its part."""
    count = 0
    for name, tensor in tensors.items():
        count += len(tensor.chunks)
        for chunk in tensor.chunks:
            info = storage.get(MetadataIndex(name, chunk.offsets))
            if info is None:
                _refuse(f"{name}'s part at {list(chunk.offsets)} is in no file")
            if math.prod(chunk.sizes) * tensor.properties.dtype.itemsize > info.length:
                _refuse(f"{name}'s part of shape {list(chunk.sizes)} cannot be in {info.length} bytes of a file")
    if count != len(storage):
        _refuse(f"{count} parts of tensors, but {len(storage)} places in files")


def _check_ranges(storage: dict[MetadataIndex, _StorageInfo]) -> None:
    """No two tensors share bytes: a damaged offset cannot give one the values of another."""
    ranges = sorted((info.relative_path, info.offset, info.length, index.fqn) for index, info in storage.items())
    for (file, offset, length, name), (other, following, _, second) in pairwise(ranges):
        if file == other and following < offset + length:
            _refuse(f"{name} and {second} share bytes of {file}")
