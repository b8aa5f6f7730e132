"""Train a model: `torchrun --nproc_per_node=8 train/main.py --config configs/llama3_8b.toml`.

Without torchrun it runs as one process. `--help` lists the sections of settings, and `--help SECTION` its settings.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

# torchrun puts train/ itself first on the path, and an editable install comes last, behind any other "models" package.
_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [_ROOT] + [entry for entry in sys.path if entry not in (_ROOT, str(Path(__file__).resolve().parent))]

from train.outcome import (  # noqa: E402
    EXIT_INTERRUPTED,
    EXIT_OTHER,
    EXIT_PREEMPTED,
    EXIT_SETUP,
    NOTICE,
    OUTCOME_VARIABLE,
    installed_packages,
    leave_at_once,
    missing_package,
    peer_has_ended,
    stop_without_launcher,
    stopped_with_peer,
    tell_launcher,
    tell_torchrun,
    under_plain_torchrun,
    wait_for_torchrun,
)

with installed_packages():
    from train.config_help import asked_for_help, help_page
    from train.config_sources import ConfigError, load_config, split_arguments
    from train.quiet import quiet_libraries
    from train.redaction import redact

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, refuse what cannot work before anything starts, then run the job."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for number in SIGNALS:  # until the job takes them over (train/preemption.py)
        signal.signal(number, lambda received, frame: leave_at_once(received))
    stop_without_launcher()
    try:
        topic = asked_for_help(arguments)
        if topic is not None:
            try:
                print(help_page("python train/main.py", __doc__, topic), flush=True)
            except BrokenPipeError:  # whoever reads, as in `| head`, has enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        files, _, flags = split_arguments(arguments)
        config = load_config(files, flags, int(os.environ.get("WORLD_SIZE", 1)))
    except ConfigError as error:
        if not tell_launcher(EXIT_SETUP, str(error)):
            _fail(str(error), EXIT_SETUP, patience=15)  # imports take some processes longer than others
        return
    quiet_libraries()
    with installed_packages():
        from train.job import JobError, run_job
    try:
        try:
            run_job(config)
        finally:  # it is decided how this ends
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN if OUTCOME_VARIABLE in os.environ else _end)
    except JobError as error:
        # Those that stop because they were asked to say the same; one of them is enough.
        silent = error.code in (EXIT_PREEMPTED, EXIT_INTERRUPTED) and os.environ.get("RANK", "0") != "0"
        if tell_launcher(error.code, "" if silent else str(error)):
            return
        if error.of_peer:
            print(redact(f"newcompute: {error}"), file=sys.stderr, flush=True)
            wait_for_torchrun()
        _fail(str(error), error.code, NOTICE / 2 if error.code != EXIT_OTHER else 0, said=error.of_peer)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and missing_package(error):
            _fail(missing_package(error), EXIT_SETUP, 0)
        traceback.print_exc()  # a defect
        _fail(f"{type(error).__name__}: {error}", EXIT_OTHER, 0, said=not under_plain_torchrun())


def _fail(message: str, code: int, patience: float, said: bool = False) -> NoReturn:
    """End with an exit code and, unless it has been `said`, a message.

    Most errors are everyone's, and the first exit makes torchrun end the others. So one process (of a node, with torchrun)
    speaks and ends first. What only another one has met is said after `patience` seconds in which nobody has ended it.
    """
    rank = int(os.environ.get("RANK", 0))
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0 if under_plain_torchrun() else rank == 0
    asked_to_stop = code in (EXIT_PREEMPTED, EXIT_INTERRUPTED)
    if not first and asked_to_stop:
        # Other launchers end the first as soon as this one has ended, maybe in the middle of its message.
        until = time.monotonic() + (NOTICE if under_plain_torchrun() else 1.0)
        while time.monotonic() < until and not peer_has_ended():
            time.sleep(0.1)
        raise SystemExit(0 if peer_has_ended() else code)  # the first has ended with the code
    if not first:
        time.sleep(patience)
    message = redact(f"newcompute: {f'process {rank}: ' if rank else ''}{message}")
    told = tell_torchrun(message) and not asked_to_stop  # torchrun that was signalled itself shows no table
    if not told and not said:
        print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)


def _end(number: int, frame: FrameType | None) -> None:
    """Die of a signal, as without a handler; with 0 where torchrun sends it because another process has failed."""
    if stopped_with_peer():
        os._exit(0)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main()
