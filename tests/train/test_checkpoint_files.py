"""Safe reading of DCP checkpoints against DCP's own reader, and what it refuses."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from train.checkpoint_files import SafeReader, hashes, verify
from train.checkpoint_metadata import DamagedCheckpoint

TENSORS = {
    "a.weight": torch.randn(8, 4, generator=torch.Generator().manual_seed(1)),
    "b.weight": torch.randn(8, 4, generator=torch.Generator().manual_seed(2)).t(),
    "step": torch.tensor(3.0),
    "moment": torch.arange(7, dtype=torch.bfloat16),
}


def save(path: Path | str, tensors: dict = TENSORS) -> Path | str:
    writer = FsspecWriter(path) if "://" in str(path) else dcp.FileSystemWriter(path, single_file_per_rank=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    return path


def load(path: Path | str, reader: dcp.StorageReader) -> dict[str, torch.Tensor]:
    state = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.fixture(params=["local", "memory"])
def path(request, tmp_path) -> Path | str:
    if request.param == "local":
        return save(tmp_path / "step-00000001")
    url = "memory://checkpoints/step-00000001"
    fsspec.filesystem("memory").store.clear()
    return save(url)


def test_reads_what_dcp_reads(path):
    mine = SafeReader(path).read_metadata()
    theirs = dcp.FileSystemReader(path) if isinstance(path, Path) else FsspecReader(path)
    expected = theirs.read_metadata()
    assert mine.state_dict_metadata == expected.state_dict_metadata
    assert mine.storage_data == expected.storage_data
    assert mine.planner_data == expected.planner_data
    found = load(path, SafeReader(path, hashes(path, 64)))
    for name, value in load(path, theirs).items():
        assert torch.equal(found[name], value)
        assert torch.equal(value, TENSORS[name]), name


def test_verification_passes_and_names_what_is_wrong(path):
    fs, root = fsspec.core.url_to_fs(str(path))
    files = {Path(entry["name"]).name: entry["size"] for entry in fs.ls(root, detail=True)}
    known = hashes(path, 2)
    assert len(known) == 3, "two parts and .metadata"
    verify(path, files, 64, known)
    verify(path, None)
    with pytest.raises(DamagedCheckpoint, match=r"__1_0\.distcp is missing"):
        verify(path, files | {"__1_0.distcp": 3})
    with pytest.raises(DamagedCheckpoint, match=r"has \d+ bytes, it was saved with 3"):
        verify(path, files | {"__0_0.distcp": 3})
    data = bytearray(fs.cat_file(f"{root}/__0_0.distcp"))
    place = bytes(data).index(TENSORS["moment"].view(torch.uint8).numpy().tobytes())
    data[place + 3] ^= 1
    fs.pipe_file(f"{root}/__0_0.distcp", bytes(data))
    with pytest.raises(DamagedCheckpoint, match=r"moment .* is damaged \(the checksum of archive/data/0 differs\)"):
        verify(path, files)


def test_exchanged_files_are_told_by_their_hashes(tmp_path):
    one, two = save(tmp_path / "one"), save(tmp_path / "two", {name: value + 1 for name, value in TENSORS.items()})
    known = hashes(one, 64)
    (one / "__0_0.distcp").write_bytes((two / "__0_0.distcp").read_bytes())
    verify(one, None)  # each checksum is that of its own bytes
    with pytest.raises(DamagedCheckpoint, match="is not what was saved"):
        verify(one, None, 64, known)


@pytest.fixture
def metadata(tmp_path):
    """A checkpoint and its metadata; call the second with the changed one to write it."""
    path = save(tmp_path / "folder" / "step")
    found = pickle.loads((path / ".metadata").read_bytes())
    return path, found, lambda: (path / ".metadata").write_bytes(pickle.dumps(found))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "\x00", "link"])
def test_files_outside_the_folder_are_refused(metadata, name):
    path, found, write = metadata
    (path.parent / "secret").write_bytes((path / "__0_0.distcp").read_bytes())
    (path / "link").symlink_to(path.parent / "secret")
    next(iter(found.storage_data.values())).relative_path = name
    write()
    with pytest.raises(DamagedCheckpoint, match=r"no plain name of a file|link, which is missing"):
        SafeReader(path).read_metadata()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 10**9}, "has only"),
        ({"offset": -1}, "expected a number from 0"),
        ({"length": 50}, "cannot be in 50 bytes"),
        ({"offset": 2}, "share bytes"),
        ({"transform_descriptors": ["stream.zstd/1"]}, "compressed or encrypted"),
    ],
)
def test_places_that_contradict_the_files_are_refused(metadata, change, message):
    path, found, write = metadata
    info = sorted(found.storage_data.values(), key=lambda info: info.offset)[0]
    vars(info).update(change)
    write()
    with pytest.raises(DamagedCheckpoint, match=message):
        SafeReader(path).read_metadata()


def test_a_shape_that_no_file_can_hold_is_refused(metadata):
    path, found, write = metadata
    entry = found.state_dict_metadata["a.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size([1 << 40, 4])
    write()
    with pytest.raises(DamagedCheckpoint, match="cannot be in"):
        SafeReader(path).read_metadata()


def test_opcodes_that_dcp_does_not_write_are_refused(tmp_path):
    path = save(tmp_path / "step")
    for attack in (
        b"\x80\x04r\xff\xff\xff\xff.",
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f.",
        b"cos\nsystem\n(S'true'\ntR.",
    ):
        (path / ".metadata").write_bytes(attack)
        with pytest.raises(DamagedCheckpoint):
            SafeReader(path).read_metadata()


def test_a_storage_that_claims_more_than_its_bytes_is_refused(metadata):
    """torch.load takes a storage's length from the pickle: without a check it reads beyond the file's bytes."""
    path, found, write = metadata
    info = next(value for key, value in found.storage_data.items() if key.fqn == "a.weight")
    data = (path / "__0_0.distcp").read_bytes()
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data[info.offset : info.offset + info.length])) as old,
        zipfile.ZipFile(out, "w") as new,
    ):
        for record in old.infolist():
            content = old.read(record)
            if record.filename.endswith("data/0"):
                content = content[:4]
            new.writestr(record.filename, content)
        new.writestr("archive/padding", bytes(info.length))
    info.offset, info.length = len(data), len(out.getvalue())
    (path / "__0_0.distcp").write_bytes(data + out.getvalue())
    write()
    with pytest.raises(DamagedCheckpoint, match=r"fewer bytes than its tensor|is damaged"):
        verify(path, None)
