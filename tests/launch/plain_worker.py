"""A process as `train/main.py` is one to plain torchrun, without torch: what each rank does is said by an argument.

`plain_worker.py FOLDER ACTION...`, one action per rank: `fail` tells an error of its own and ends with 2, `wait` sleeps, `late`
suffers from the other's end and ends with 1. It writes its process id to FOLDER/RANK, and its exit to FOLDER/RANK.end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train.outcome import leave_at_once, stop_without_launcher, tell_torchrun, wait_for_torchrun

folder, actions = Path(sys.argv[1]), sys.argv[2:]
rank = os.environ["RANK"]
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda received, frame: leave_at_once(received))
stop_without_launcher()
(folder / rank).write_text(str(os.getpid()))
while not all((folder / other).exists() for other in ("0", "1")):
    time.sleep(0.02)
action = actions[int(rank)]
if action == "fail":
    message = f"newcompute: process {rank}: the ink is out\n  fill it"
    if not tell_torchrun(message):
        print(message, file=sys.stderr)
    raise SystemExit(2)
if action == "late":
    time.sleep(0.3)
    wait_for_torchrun()
    raise SystemExit(1)
time.sleep(600)
