"""Whatever happens to a checkpoint's files: the values that were saved, or a CheckpointError; and nothing in them is run."""

from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from damage import contents_of, damages, edits, fuzz, write_to
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from models.sizes import LlamaShape
from train import records
from train.checkpoint import CheckpointError, Commit, checkpoint_names, find_checkpoint, read_tensors
from train.checkpoint_files import hashes

TENSORS = {
    "model.a.weight": torch.arange(24.0).reshape(6, 4),
    "model.b.weight": -torch.arange(24.0).reshape(6, 4),
    "norm.weight": torch.linspace(0, 1, 5),
    "optimizer.norm.weight.step": torch.tensor(7.0),
    "optimizer.norm.weight.exp_avg": torch.linspace(0, 3, 5).bfloat16(),
}
SHAPE = LlamaShape(8, 2, 2, 1, 16, 300)


def metadata_of(folder: Path, cut: int = 3) -> Metadata:
    """Write what two ranks would: matrices cut into two parts, of which each writes one."""
    tensors, storage = {}, {}
    files = {rank: io.BytesIO() for rank in range(2)}
    for name, value in TENSORS.items():
        places = [(0, cut), (cut, len(value))] if value.dim() == 2 else [(0, len(value) if value.dim() else 0)]
        chunks = []
        for rank, (start, stop) in enumerate(places):
            part = value[start:stop].clone() if value.dim() else value
            offsets = torch.Size([start, *[0] * (value.dim() - 1)]) if value.dim() else torch.Size([])
            begin = files[rank].tell()
            torch.save(part, files[rank])
            chunks.append(ChunkStorageMetadata(offsets, part.shape))
            info = _StorageInfo(f"__{rank}_0.distcp", begin, files[rank].tell() - begin)
            storage[MetadataIndex(name, offsets, rank)] = info
        tensors[name] = TensorStorageMetadata(TensorProperties(value.dtype), value.shape, chunks)
    folder.mkdir(parents=True)
    for rank, file in files.items():
        (folder / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    return Metadata(tensors, {name: (name,) for name in tensors}, storage, StorageMeta(folder), "1.0.0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> dict[str, bytes]:
    """The files of one whose parts all have their hash in the marker."""
    folder = tmp_path_factory.mktemp("good") / "step-00000005"
    (folder.parent).mkdir(exist_ok=True)
    metadata = metadata_of(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    found = hashes(folder, 64)
    assert len(found) == 8, "seven parts and .metadata"
    data = {"epoch": 0, "seed": 1, "rows_consumed": 40, "fingerprint": "f"}
    commit = Commit(5, data, asdict(SHAPE), "tokenizer", hashes=found)
    (folder / "commit.json").write_text(records.sealed(asdict(commit)))
    return contents_of(folder)


def load(folder: Path) -> tuple[Commit, LlamaShape, dict[str, torch.Tensor]]:
    assert find_checkpoint(folder.parent, "auto") == folder
    commit = Commit.read(folder)
    names = checkpoint_names(folder)
    optimizer = {name: value.shape for name, value in TENSORS.items() if name.startswith("optimizer.")}
    return commit, commit.llama_shape(), read_tensors(folder, names | optimizer)


def assert_whole(found: tuple, commit: Commit) -> None:
    assert found[0] == commit
    assert found[1] == SHAPE
    assert found[2].keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(found[2][name], value.float()), name


def without_hashes(checkpoint: dict[str, bytes]) -> dict[str, bytes]:
    record = json.loads(checkpoint["commit.json"]) | {"hashes": {}}
    del record[records.SEAL]
    return checkpoint | {"commit.json": records.sealed(record).encode()}


def test_the_undamaged_checkpoint_loads(checkpoint, tmp_path):
    for name, files in {"a": checkpoint, "b": without_hashes(checkpoint)}.items():
        folder = write_to(tmp_path / name / "step-00000005", files)
        assert_whole(load(folder), Commit.read(folder))


def test_damage_is_refused_or_harmless(checkpoint, tmp_path):
    folder = tmp_path / "step-00000005"
    commit = Commit.read(write_to(folder, checkpoint))

    @fuzz(200)
    @given(damages(checkpoint))
    def check(files):
        write_to(folder, files)
        if "commit.json" not in files:
            assert find_checkpoint(tmp_path, "auto") is None
            return
        try:
            found = load(folder)
        except CheckpointError:
            return
        assert_whole(found, commit)

    check()


def test_a_flip_in_what_holds_values_is_refused_without_hashes(checkpoint, tmp_path):
    """The checksums in the files alone: a load gives the right values or none."""
    folder = tmp_path / "step-00000005"
    plain = without_hashes(checkpoint)
    shapes = {name: value.shape for name, value in TENSORS.items()}

    @fuzz(200)
    @given(st.data())
    def check(data):
        name = data.draw(st.sampled_from(["__0_0.distcp", "__1_0.distcp", ".metadata"]))
        bit = data.draw(st.integers(0, len(plain[name]) * 8 - 1))
        damaged = bytearray(plain[name])
        damaged[bit // 8] ^= 1 << bit % 8
        write_to(folder, plain | {name: bytes(damaged)})
        try:
            found = read_tensors(folder, shapes)
        except CheckpointError:
            return
        for key, value in TENSORS.items():
            assert torch.equal(found[key], value.float()), key

    check()


class Payload:
    """Touches a file when a pickle of it is loaded."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_pickles_are_not_run(checkpoint, tmp_path):
    folder, marker = tmp_path / "step-00000005", tmp_path / "was-run"
    plain = without_hashes(checkpoint)
    good = pickle.loads(plain[".metadata"])

    @fuzz(60)
    @given(st.data())
    def check(data):
        calls = [(os.system, f"touch {marker}"), (open, str(marker), "w"), (exec, f"open({str(marker)!r}, 'w')")]
        payload = Payload(*data.draw(st.sampled_from(calls)))
        metadata = pickle.loads(plain[".metadata"])
        files = dict(plain)
        where = data.draw(
            st.sampled_from(["whole", "planner", "name", "size", "path", "offset", "meta", "bytes", "tensor"])
        )
        info = next(iter(metadata.storage_data.values()))
        if where == "planner":
            metadata.planner_data = {"x": payload}
        elif where == "name":
            metadata.state_dict_metadata["x"] = payload
        elif where == "size":
            metadata.state_dict_metadata["norm.weight"].size = payload
        elif where in ("path", "offset"):
            setattr(info, {"path": "relative_path", "offset": "offset"}[where], payload)
        elif where == "meta":
            metadata.storage_meta.checkpoint_id = payload
        elif where == "bytes":  # an object among the tensors, which DCP would unpickle
            metadata.state_dict_metadata["norm.weight"] = BytesStorageMetadata()
        elif where == "tensor":
            out = io.BytesIO()
            torch.save(payload, out)
            begin = len(files["__0_0.distcp"])
            files["__0_0.distcp"] += out.getvalue()
            place = MetadataIndex("norm.weight", torch.Size([0]))
            metadata.storage_data[place] = _StorageInfo("__0_0.distcp", begin, len(out.getvalue()))
        protocol = data.draw(st.integers(0, 5))
        files[".metadata"] = pickle.dumps(payload if where == "whole" else metadata, protocol)
        write_to(folder, files)
        with pytest.raises(CheckpointError):
            load(folder)
        assert not marker.exists()

    check()
    assert good.state_dict_metadata.keys() == TENSORS.keys(), "the original is what DCP reads"


def test_edited_markers(checkpoint, tmp_path):
    """Also where the seal is taken off: types and shapes are checked, not only the hash."""
    folder = tmp_path / "step-00000005"
    record = json.loads(checkpoint["commit.json"])
    del record[records.SEAL]

    @fuzz(120)
    @given(st.data())
    def check(data):
        changed = data.draw(edits(record))
        text = json.dumps(changed)
        if data.draw(st.integers(0, 9)) == 0:
            text = data.draw(
                st.sampled_from(["[" * 100_000, '{"step":' * 50_000, "1" * 10_000, "", "\x00", '{"step": 1e999}'])
            )
        write_to(folder, checkpoint | {"commit.json": text.encode("utf-8", "surrogatepass")})
        try:
            load(folder)
        except CheckpointError:
            return

    check()
