"""The command `newcompute`: plan, prepare, status, report, trace, rows, export, eval, calibrate, sweep-noise, generate."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

# An editable install comes last on the path, behind any other package named "models" or "train".
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").exists():
    sys.path.insert(0, str(_ROOT))

from train.outcome import installed_packages, missing_package  # noqa: E402

with installed_packages():
    from evals.quiet import quiet_libraries
    from launch.eval_commands import check_writable, warn_of_norms
    from launch.eval_options import add_parsers, positive
    from train.config_help import asked_for_help, help_page
    from train.config_sources import ConfigError, exit_with, load_config, split_arguments

CONFIG_COMMANDS = {
    "plan": "what a run would be, without running it: meshes, batches, parameters, FLOPs, memory, time",
    "prepare": "turn the configured text into token shards",
}
EXAMPLES = {
    "plan": "newcompute plan --config configs/llama3_8b.toml \\\n    --world-size 8 --gpu h100",
    "prepare": "newcompute prepare --config configs/clm_60m.toml",
    "status": "newcompute status outputs/*",
    "report": "newcompute report outputs/clean outputs/noisy --out pair.html",
    "export": "newcompute export --run outputs/quickstart --out model-hf",
    "eval": "newcompute eval --model outputs/quickstart --text notes.txt \\\n"
    "    --transforms configs/transforms/int8.toml",
    "calibrate": "newcompute calibrate --model outputs/quickstart \\\n    --text notes.txt --out ranges.safetensors \\\n"
    "    --transforms configs/transforms/optical_8bit.toml",
    "sweep-noise": "newcompute sweep-noise --model outputs/quickstart \\\n    --text notes.txt --out sweep.json \\\n"
    "    --transforms configs/transforms/bitflip_mantissa.toml \\\n    --key probability --values 1e-5,1e-4,1e-3",
    "generate": 'newcompute generate --model outputs/quickstart --prompt "def "',
    "trace": "newcompute trace outputs/quickstart/profiles/*.json.gz",
    "rows": "newcompute rows --run outputs/quickstart --step 100",
}
"""One command line for each command."""
PLAN_OPTIONS = """  --world-size N      processes (default 1; with --suggest 8)
  --suggest           search the layouts that fit, and rank them by estimated time
  --gpu NAME          plan for this GPU: h100, h200, a100, b200 (default: what the run would have here)
  --gpu-memory GIB    its memory (default: that of the device)
  --mfu X             share of its peak that arithmetic reaches (default 0.4)
"""


def main(arguments: list[str] | None = None) -> None:
    """Run one command; errors of the user end with exit code 2 and a message."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in CONFIG_COMMANDS:
            _config_command(arguments[0], arguments[1:])
        elif not arguments:
            _parser().print_help(sys.stderr)
            raise SystemExit(2)
        else:
            options = _parser().parse_args(arguments)
            options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever reads, as in `| head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and missing_package(error):
            exit_with(ValueError(missing_package(error)))
        if isinstance(error, ConfigError) or _is_user_error(error):
            exit_with(_readable(error))
        raise


def _is_user_error(error: Exception) -> bool:
    if isinstance(error, ValueError | OSError):
        return True
    from train.checkpoint import CheckpointError
    from train.corpus import DataError
    from train.run_folder import RunFolderError

    return isinstance(error, CheckpointError | DataError | RunFolderError)


def _readable(error: Exception) -> Exception:
    if isinstance(error, OSError) and error.strerror:
        return OSError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="newcompute",
        description="Pretrain and evaluate language models on simulated hardware.",
        epilog="`newcompute COMMAND --help` shows a command's options and an example.\n\nTraining itself:\n"
        "  launch/local.sh 2 --config configs/quickstart.toml\n  python train/main.py --help       its settings",
        formatter_class=partial(argparse.RawTextHelpFormatter, max_help_position=15),
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in CONFIG_COMMANDS.items():
        commands.add_parser(name, help=text)
    _status_parser(commands)
    _report_parser(commands)
    _export_parser(commands)
    add_parsers(commands)
    _trace_parser(commands)
    _rows_parser(commands)
    _add_examples(commands)
    return parser


def _add_examples(commands: Any) -> None:
    """Give each command's own page what it does and its example, and the list of commands both."""
    for entry in commands._get_subactions():
        parser, example = commands.choices[entry.dest], EXAMPLES[entry.dest]
        parser.description, parser.epilog = entry.help, f"example:\n{textwrap.indent(example, '  ')}"
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        entry.help = f"{textwrap.fill(entry.help, 64)}\n{textwrap.indent(example, '  ')}"


def _status_parser(commands: Any) -> None:
    parser = commands.add_parser("status", help="where runs stand: step, time left, loss, throughput, checkpoints")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--json", action="store_true", help="print an array of objects, one for each run")
    parser.set_defaults(run=_status)


def _report_parser(commands: Any) -> None:
    parser = commands.add_parser("report", help="one HTML page of a run, or of several to compare")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; differences are to the first one")
    parser.add_argument(
        "--out", metavar="FILE.html", help="page to write (default: RUN/report.html, of several runs report.html here)"
    )
    parser.add_argument(
        "--sample",
        action="append",
        default=[],
        metavar="PROMPT",
        help="text to continue with each run's latest checkpoint; repeatable, kept in RUN/samples.jsonl",
    )
    parser.set_defaults(run=_report)


def _export_parser(commands: Any) -> None:
    parser = commands.add_parser("export", help="write a run's weights and tokenizer as a Hugging Face folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", dest="source", metavar="RUN", help="run folder or one of its checkpoints")
    source.add_argument("--model", metavar="DIR", help="with --packed: a Hugging Face folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--step", type=int, help="step to export (default: the latest complete one)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--packed",
        nargs="?",
        const="auto",
        choices=["auto", "torchao", "metal", "bitnet"],
        help="store the integers that quantising transforms round weights to, in a layout that transformers loads",
    )
    parser.add_argument(
        "--transforms",
        nargs="+",
        metavar="FILE.toml",
        help='with --packed: files of [[transforms]] tables (default "run": those it was trained with)',
    )
    parser.set_defaults(run=_export)


def _trace_parser(commands: Any) -> None:
    parser = commands.add_parser("trace", help="where a step's time goes, by a trace of the profiler")
    parser.add_argument("files", nargs="+", metavar="FILE", help="trace (.json or .json.gz), as in RUN/profiles")
    parser.add_argument("--top", type=positive, default=15, metavar="N", help="kernels or operators (default 15)")
    parser.add_argument("--json", action="store_true", help="print a JSON list with one object per trace")
    parser.set_defaults(run=_trace)


def _rows_parser(commands: Any) -> None:
    parser = commands.add_parser("rows", help="the text that a step was trained on")
    parser.add_argument("--run", required=True, dest="source", metavar="RUN", help="run folder")
    parser.add_argument("--step", required=True, type=positive, help="step, as in the log")
    parser.set_defaults(run=_rows)


def _config_command(command: str, arguments: list[str]) -> None:
    """`plan` and `prepare` take the same files and flags as a training run."""
    topic = asked_for_help(arguments)
    if topic is not None:
        own_options = f"\n\n{PLAN_OPTIONS}" if command == "plan" else ""
        about = f"newcompute {command}: {CONFIG_COMMANDS[command]}{own_options}"
        print(help_page(f"newcompute {command}", about, topic, EXAMPLES[command]))
        return
    if command == "plan":
        from train.plan import OPTIONS, print_plan

        files, options, flags = split_arguments([a for a in arguments if a != "--suggest"], OPTIONS)
        print_plan(files, flags, options, suggesting="--suggest" in arguments)
        return
    files, _, flags = split_arguments(arguments)
    config = load_config(files, flags)
    quiet_libraries()
    from train.prepare import prepare

    if not prepare(config):
        print("random data needs no preparation")


def _status(options: argparse.Namespace) -> None:
    from evals.status import print_status

    print_status(options.runs, options.json)


def _report(options: argparse.Namespace) -> None:
    from evals.report import write_report

    if options.out:
        check_writable(Path(options.out))
    print(write_report(options.runs, Path(options.out) if options.out else None, options.sample))


def _rows(options: argparse.Namespace) -> None:
    from evals.rows import rows_of_step

    for row, text in rows_of_step(Path(options.source), options.step):
        print(f"== row {row:,}\n{text}")


def _export(options: argparse.Namespace) -> None:
    quiet_libraries()
    if options.packed:
        _export_packed(options)
        return
    for name in ("model", "transforms"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: only with --packed; without, an export is of a run's plain weights")
    from train.export import export, open_trained

    trained = open_trained(Path(options.source), options.step)
    export(trained, Path(options.out), options.dtype)
    warn_of_norms(options.out)
    print(f"{trained.checkpoint} -> {options.out}")


def _export_packed(options: argparse.Namespace) -> None:
    if options.model is not None and options.step is not None:
        raise ValueError("--step: a Hugging Face folder has no steps, only a run (--run) has")
    from evals.chips import read_transforms
    from evals.packed import export_packed
    from train.export import open_trained

    reference = options.model
    if reference is None:
        reference = str(open_trained(Path(options.source), options.step).checkpoint)
    transforms = read_transforms(options.transforms or ["run"], reference)
    total = export_packed(reference, transforms, Path(options.out), options.packed, options.dtype)
    print(f"{reference} -> {options.out} ({total / 1e6:,.1f} MB of weights)")


def _trace(options: argparse.Namespace) -> None:
    from train.trace_summary import summarize
    from train.trace_text import comparison_text, trace_record, trace_text

    summaries = [summarize(Path(file)) for file in options.files]
    if options.json:
        print(json.dumps([trace_record(summary, options.top) for summary in summaries], indent=2))
        return
    print("\n\n".join(trace_text(summary, options.top) for summary in summaries))
    if len(summaries) > 1:
        print(f"\n{comparison_text(summaries)}")


if __name__ == "__main__":
    main()
