"""Pack what torch.compile and Triton have compiled, for another machine of the same GPU and versions.

    python benchmarks/keep_caches.py FOLDER OUT.tar.gz      FOLDER holds inductor/ and triton/

The archive is written in pieces of 15 MiB, OUT.tar.gz.0 and so on (`cat OUT.tar.gz.* | tar -xz` unpacks them). More than
three pieces are not written: compiling again then costs less than carrying them.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

PIECE, MOST = 15 << 20, 3
NEEDLESS = {".lock", ".ttir", ".ttgir", ".llir", ".ptx", ".source", ".tmp"}
"""Triton reads the machine code and what describes it; of the stages before that it takes those that are there."""


def pack(folder: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=4) as archive:
        for room in ("inductor", "triton"):
            for path in sorted((folder / room).rglob("*")):
                if path.is_file() and path.suffix not in NEEDLESS:
                    archive.add(path, str(path.relative_to(folder)))
    return packed.getvalue()


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    for old in out.parent.glob(f"{out.name}.*"):
        old.unlink()
    data = pack(folder)
    if len(data) > MOST * PIECE:
        raise SystemExit(
            f"nothing is kept: {len(data) / 2**20:.1f} MiB of compiled code are more than {MOST * PIECE >> 20}"
        )
    for number, begin in enumerate(range(0, len(data), PIECE)):
        out.with_name(f"{out.name}.{number}").write_bytes(data[begin : begin + PIECE])
    print(f"kept {len(data) / 2**20:.1f} MiB of compiled code")


if __name__ == "__main__":
    main()
