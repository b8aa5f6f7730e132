"""Train a model: `torchrun --nproc_per_node=8 train/main.py --config configs/llama3_8b.toml`.

Without torchrun it runs as one process. `--help` lists every setting.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

# torchrun puts train/ itself first on the path, and an editable install comes last, behind any other "models" package.
_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [_ROOT] + [entry for entry in sys.path if entry not in (_ROOT, str(Path(__file__).resolve().parent))]

from train.config_sources import EXIT_CONFIG, ConfigError, exit_with, help_text, load_config, split_arguments  # noqa: E402
from train.outcome import (  # noqa: E402
    EXIT_HANG,
    EXIT_OTHER,
    EXIT_PREEMPTED,
    OUTCOME_VARIABLE,
    leave_at_once,
    stop_without_launcher,
    tell_launcher,
)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, refuse what cannot work before anything starts, then run the job."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until the job takes them over (train/preemption.py)
        signal.signal(number, lambda *_: leave_at_once())
    stop_without_launcher()
    if "--help" in arguments or "-h" in arguments:
        print(__doc__ + "\n  --config FILE.toml (repeatable; later files win, flags win over files)\n" + help_text())
        return
    is_main = int(os.environ.get("RANK", 0)) == 0
    try:
        files, _, flags = split_arguments(arguments)
        config = load_config(files, flags, int(os.environ.get("WORLD_SIZE", 1)))
    except ConfigError as error:
        if tell_launcher(EXIT_CONFIG, str(error)):
            return
        if not is_main:
            time.sleep(15)  # all find the same; the first exit makes torchrun end the others, the speaker too
            raise SystemExit(EXIT_CONFIG) from None
        exit_with(error)

    from train.job import JobError, run_job

    try:
        try:
            run_job(config)
        finally:  # it is decided how this ends
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN if OUTCOME_VARIABLE in os.environ else signal.SIG_DFL)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the latest checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    except JobError as error:
        if tell_launcher(error.code, str(error)):
            return
        if not is_main and error.code == EXIT_PREEMPTED:
            raise SystemExit(error.code) from None  # the main process says it
        if not is_main:
            # Most errors are everyone's, and the first exit makes torchrun end the others: the main process speaks
            # first. What only this process met is said a little later; what another one did to it, at once.
            time.sleep({EXIT_CONFIG: 3, EXIT_OTHER: 0, EXIT_HANG: 0}.get(error.code, 15))
            error = type(error)(f"process {os.environ['RANK']}: {error}", error.code)
        exit_with(error, error.code)


if __name__ == "__main__":
    main()
