"""How far every layout is from one process: runs the cells of tests/parallel/cells.py and writes docs/layouts.md.

    python benchmarks/layouts.py                    # all, about ten minutes on two cores
    python benchmarks/layouts.py --only "TP 2"      # those whose name contains it; prints, writes nothing

Two or four gloo processes on this machine train a four-layer model for ten steps, in float32, and are compared with one
process, eager and unsharded, that begins from bit-identical weights.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "parallel")]

import torch  # noqa: E402
from cells import CELLS, Cell  # noqa: E402
from layouts import Record, difference, flags, run, run_on  # noqa: E402
from support import quietly, write_documents  # noqa: E402

from train.config_sources import load_config  # noqa: E402

HEAD = """# Layouts

Every layout is the same training. `python benchmarks/layouts.py` has written this page: {processes} train a four-layer
model for ten steps and are compared with one process that is neither sharded nor compiled ({version}, {day}).
Initial weights are the same bits in every row. *Loss* is the largest difference of a training or validation loss in nats;
*first gradient* and *any gradient* are the largest relative differences (2-norm) of a parameter's gradient at the first
step and at any of the ten: Adam divides by the size of a gradient, so that rounding grows from step to step. The limits
of the tests are in brackets (`tests/parallel/cells.py`).

float8 rows are compared with one process that uses the same recipe. There a scale belongs to what a device holds, its own
rows, so that layouts round differently, and ten steps of a tiny model at a high learning rate drift apart.

| layout | processes | loss | first gradient | any gradient |
|---|---|---|---|---|
"""


class Runs:
    """Runs cells, and one process for each way to compute."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.references: dict[str, Record] = {}
        write_documents(folder)

    def flags(self, name: str, changes: dict[str, object]) -> list[str]:
        return flags(self.folder, self.folder, name, data__paths=f'["{self.folder}/document-*.txt"]', **changes)

    def reference(self, of_both: dict[str, object]) -> Record:
        key = str(of_both)
        if key not in self.references:
            arguments = self.flags(f"reference-{len(self.references)}", of_both)
            with contextlib.redirect_stdout(io.StringIO()):
                quietly(load_config([], arguments, 1))
                self.references[key] = run(arguments)
        return self.references[key]

    def cell(self, cell: Cell) -> dict[str, object]:
        """One row of the table.

        Raises:
            AssertionError: the cell does not run, or starts from other weights.
        """
        expected = self.reference(cell.of_both)
        name = "".join(c if c.isalnum() else "-" for c in cell.name)
        found = run_on(cell.processes, self.folder, self.flags(name, cell.of_both | cell.changes))
        assert all(torch.equal(found.weights[name], weight) for name, weight in expected.weights.items())
        pairs = zip(expected.losses + expected.validation, found.losses + found.validation, strict=True)
        first, largest, where = difference(expected, found)
        return {
            "layout": cell.name,
            "processes": cell.processes,
            "loss": max(abs(a - b) for a, b in pairs),
            "first_gradient": first,
            "gradient": largest,
            "where": where,
            "settings": {**cell.of_both, **cell.changes},
            "limits": {"loss": cell.loss, "first_gradient": cell.first_gradient, "gradient": cell.gradient},
        }


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        limits = {key: "no limit" if limit is None else f"{limit:g}" for key, limit in row["limits"].items()}
        figures = (f"{row[key]:.0e} ({limits[key]})" for key in ("loss", "first_gradient", "gradient"))
        lines.append(f"| {row['layout']} | {row['processes']} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose name contains this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs, rows = Runs(Path(folder)), []
        for cell in CELLS:
            if options.only in cell.name:
                rows.append(runs.cell(cell))
                print(table(rows[-1:]), end="", flush=True)
    if options.only:
        return
    version, day = f"torch {torch.__version__}, gloo, CPU", date.today().isoformat()
    record = {"torch": torch.__version__, "machine": platform.machine(), "date": day, "rows": rows}
    (ROOT / "benchmarks" / "results" / "layouts.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = HEAD.format(processes="two or four processes", version=version, day=day) + table(rows)
    (ROOT / "docs" / "layouts.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
