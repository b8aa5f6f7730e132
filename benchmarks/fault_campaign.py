"""Runs that are killed, stopped, hung, starved of disk and damaged, by seed: every one has to end well, or say why not.

    python benchmarks/fault_campaign.py [--seeds 0-62]

A seed chooses a scenario of `tests/campaign.py` (seed modulo their number), the processes, the phase and the step. Each run
is started again as a scheduler would until it ends; its losses are compared with an undisturbed run on as many processes,
bit for bit. Without `--seeds`, writes `docs/fault-campaign.md` and `benchmarks/results/fault_campaign.json`; exit code 1 if
any seed came to anything else than it has to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from campaign import SCENARIOS, STEPS, Campaign, Row  # noqa: E402

SEEDS = range(63)
HEAD = """# Fault campaign

`python benchmarks/fault_campaign.py` has written this page (torch {torch}, gloo, CPU, {day}): {count} seeded runs of {steps}
steps on 2 and 4 processes (FSDP2), a checkpoint every 3 steps, asynchronously. *Exit codes* are those of each start in
turn (-9: the process was killed and the others ended with it; 75: asked to stop, saved; 5: a process hung; 4: nothing to go
on from, or no disk); the last start has to end with 0. *Difference* is the largest one of a training or validation loss
to an undisturbed run on as many processes, in nats. In no run was a committed step lost. {failed} of {count} came to
anything else than they have to.

| seed | scenario | processes | what happened | exit codes | difference |
|---|---|---|---|---|---|
"""


def line(row: Row) -> str:
    codes = ", ".join(map(str, row.codes))
    difference = "-" if row.largest_difference != row.largest_difference else f"{row.largest_difference:g}"
    problem = f" **{row.problem.splitlines()[0][:200]}**" if row.problem else ""
    what = "; ".join(row.happened)
    return f"| {row.seed} | {row.scenario} | {row.processes} | {what}{problem} | {codes} | {difference} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", metavar="A-B", help="only these; writes nothing")
    options = parser.parse_args()
    seeds = SEEDS
    if options.seeds:
        first, _, last = options.seeds.partition("-")
        seeds = range(int(first), int(last or first) + 1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder))
        for seed in seeds:
            start = time.monotonic()
            rows.append(campaign.run(seed))
            print(f"{line(rows[-1])} {time.monotonic() - start:.0f} s", flush=True)
            if rows[-1].problem:
                print(rows[-1].problem, flush=True)
    failed = [row.seed for row in rows if row.problem]
    print(f"{len(rows)} runs, {len(SCENARIOS)} scenarios, {len(failed)} not as they have to be: {failed}")
    if not options.seeds:
        day = datetime.now(UTC).date().isoformat()
        record = {"torch": torch.__version__, "date": day, "rows": [asdict(row) for row in rows]}
        results = ROOT / "benchmarks" / "results" / "fault_campaign.json"
        text = json.dumps(record, indent=1).replace("NaN", "null")
        results.write_text(text + "\n", encoding="utf-8")
        head = HEAD.format(torch=torch.__version__, day=day, count=len(rows), steps=STEPS, failed=len(failed))
        page = head + "\n".join(map(line, rows)) + "\n"
        (ROOT / "docs" / "fault-campaign.md").write_text(page, encoding="utf-8")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
