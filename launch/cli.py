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
    from train.config_help import asked_for_help, help_page
    from train.config_sources import ConfigError, exit_with, load_config, split_arguments
    from train.quiet import quiet_libraries

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
    "    --transforms configs/transforms/bitflip_mantissa.toml \\\n    --probabilities 1e-5,1e-4,1e-3",
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
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")  # its warnings are about how we call it
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
    _eval_parser(commands)
    _calibrate_parser(commands)
    _sweep_parser(commands)
    _generate_parser(commands)
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


def _eval_parser(commands: Any) -> None:
    parser = commands.add_parser("eval", help="perplexity and bits per byte of text files, and lm-eval tasks")
    parser.add_argument("--model", required=True, help="run, checkpoint, or Hugging Face folder")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text files")
    parser.add_argument(
        "--language",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="text in one language, as in de=german.txt; repeatable: what the transforms do to each, and the disparity",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="with --language: draw the damage to each")
    parser.add_argument("--tasks", default="", metavar="A,B", help="lm-eval tasks, by name or YAML file")
    parser.add_argument("--include-path", metavar="DIR", help="folder of further lm-eval task definitions")
    parser.add_argument("--limit", type=_positive, help="examples per task")
    parser.add_argument(
        "--transforms",
        nargs="+",
        metavar="FILE.toml",
        help='hardware effects: files of [[transforms]] tables, or "run" for those of the run',
    )
    _ranges_argument(parser)
    parser.add_argument("--mode", choices=["clean", "chip", "resample"], help="with --transforms (default chip)")
    _noise_arguments(parser)
    _forward_arguments(parser)
    parser.add_argument("--out", metavar="FILE.json", help="write the result as JSON")
    parser.set_defaults(run=_eval)


def _calibrate_parser(commands: Any) -> None:
    parser = commands.add_parser("calibrate", help="fit the ranges of converters on text, for eval --ranges")
    parser.add_argument("--model", required=True, help="run, checkpoint, or Hugging Face folder")
    _transforms_argument(parser, "[[transforms]] with tracked or learned ranges")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="text files to read")
    parser.add_argument("--tokens", type=_positive, help="tokens of each file, from its beginning (default 16384)")
    _forward_arguments(parser, batches=False)
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="file of ranges to write")
    parser.set_defaults(run=_calibrate)


def _sweep_parser(commands: Any) -> None:
    parser = commands.add_parser("sweep-noise", help="perplexity against the probability of bit errors, with a plot")
    parser.add_argument("--model", required=True, help="run, checkpoint, or Hugging Face folder")
    _transforms_argument(parser, "[[transforms]] whose probabilities above 0 are changed")
    parser.add_argument("--text", required=True, metavar="FILE", help="text file")
    parser.add_argument("--probabilities", required=True, metavar="P,P", help="as in 1e-6,1e-5,1e-4")
    parser.add_argument("--mode", default="chip", choices=["chip", "resample"])
    _ranges_argument(parser)
    _noise_arguments(parser)
    _forward_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FILE.json", help="result; the plot goes beside it as .png")
    parser.set_defaults(run=_sweep)


def _transforms_argument(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--transforms", nargs="+", required=True, metavar="FILE.toml", help=help)


def _ranges_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranges", metavar="FILE", help="ranges of converters, from newcompute calibrate")


def _noise_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chips", type=_positive, help="simulated chips, or passes with resample (default 5)")
    parser.add_argument("--first-chip", type=_count, metavar="N", help="number of the first; 0 trained (default 1)")
    parser.add_argument("--noise-seed", type=_count, metavar="N", help="default: that of the file's [noise], else 1234")


def _forward_arguments(parser: argparse.ArgumentParser, batches: bool = True) -> None:
    parser.add_argument(
        "--context", type=_positive, help="tokens per window (default: the model's context, at most 512)"
    )
    parser.add_argument("--stride", type=_positive, help="tokens between windows (default: the context, no overlap)")
    parser.add_argument(
        "--mask-every",
        type=_positive,
        metavar="K",
        help="masked encoders: mask every K-th token at a time, in K passes (default 7)",
    )
    if batches:
        parser.add_argument("--batch-size", type=_positive, default=8, help="windows or requests per forward")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    _trust_argument(parser)


def _trust_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model or a task brings along"
    )


def _generate_parser(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue a prompt")
    parser.add_argument("--model", required=True, help="run, checkpoint, or Hugging Face folder")
    parser.add_argument("--prompt", default="", help="text to continue; empty starts from BOS")
    parser.add_argument("--max-new-tokens", type=_positive, default=128)
    parser.add_argument("--temperature", type=_temperature, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    _trust_argument(parser)
    parser.set_defaults(run=_generate)


def _trace_parser(commands: Any) -> None:
    parser = commands.add_parser("trace", help="where a step's time goes, by a trace of the profiler")
    parser.add_argument("files", nargs="+", metavar="FILE", help="trace (.json or .json.gz), as in RUN/profiles")
    parser.add_argument("--top", type=_positive, default=15, metavar="N", help="kernels or operators (default 15)")
    parser.add_argument("--json", action="store_true", help="print a JSON list with one object per trace")
    parser.set_defaults(run=_trace)


def _rows_parser(commands: Any) -> None:
    parser = commands.add_parser("rows", help="the text that a step was trained on")
    parser.add_argument("--run", required=True, dest="source", metavar="RUN", help="run folder")
    parser.add_argument("--step", required=True, type=_positive, help="step, as in the log")
    parser.set_defaults(run=_rows)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, not {text}")
    return int(text)


def _count(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text}")
    return int(text)


def _temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text}")
    return float(text)


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
        _check_writable(Path(options.out))
    print(write_report(options.runs, Path(options.out) if options.out else None, options.sample))


def _rows(options: argparse.Namespace) -> None:
    from evals.rows import rows_of_step

    for row, text in rows_of_step(Path(options.source), options.step):
        print(f"== row {row:,}\n{text}")


def _export(options: argparse.Namespace) -> None:
    if options.packed:
        _export_packed(options)
        return
    for name in ("model", "transforms"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: only with --packed; without, an export is of a run's plain weights")
    from train.export import export, open_trained

    trained = open_trained(Path(options.source), options.step)
    export(trained, Path(options.out), options.dtype)
    _warn_of_norms(options.out)
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


def _eval(options: argparse.Namespace) -> None:
    if not options.text and not options.tasks and not options.language:
        raise ValueError("nothing to evaluate: give --text FILE, --language NAME=FILE or --tasks NAME")
    _refuse_noise_options(options)
    texts = _languages(options)
    from evals.models import load_model
    from evals.results import print_results

    if options.out:
        _check_writable(Path(options.out))
    if options.transforms != ["run"]:
        _warn_of_norms(options.model)
    if options.transforms:
        result = _eval_under_transforms(options, texts)
    else:
        model = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
        result = {"model": model.name, "transforms": [], **_eval_clean(options, model)}
    print_results(result)
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        from evals.languages import draw

        draw(result, Path(options.plot))


def _calibrate(options: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from evals.calibrate import DEFAULT_TOKENS, calibrate
    from evals.chips import read_transforms
    from evals.models import load_model

    out = Path(options.out)
    _check_writable(out)
    transforms = read_transforms(options.transforms, options.model)
    model = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
    noisy = transforms.attach(model)
    files = [Path(file) for file in options.text]
    ranges = calibrate(model, noisy, files, _protocol(options, model), options.tokens or DEFAULT_TOKENS)
    source = {"model": model.name, "transforms": transforms.record(), "text": options.text}
    save_file(ranges, out, {name: json.dumps(value) for name, value in source.items()})
    print(f"{len(ranges)} ranges of {model.name} -> {out}")


def _warn_of_norms(model: str) -> None:
    from evals.chips import norms_left_out

    if norms_left_out(model):
        print(
            f"newcompute: {model} was trained with norms before its linear layers (norm = true), which plain weights are "
            "without: use --transforms run, or export --packed",
            file=sys.stderr,
        )


def _check_writable(out: Path, option: str = "--out") -> None:
    """Refuse a result file before the work rather than after it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise ValueError(f"{option} {out}: this is a folder, expected a file name")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"{option} {out}: not writable")


def _refuse_noise_options(options: argparse.Namespace) -> None:
    """An option that would change nothing is a mistake, and a clean figure must not pass for another."""
    values = vars(options)
    names = ("mode", "chips", "first_chip", "noise_seed", "ranges")
    given = [f"--{name.replace('_', '-')}" for name in names if values.get(name) is not None]
    if given and not options.transforms and options.mode != "clean":
        raise ValueError(f"{given[0]}: there are no hardware effects without --transforms FILE.toml")
    if options.mode == "clean" and (options.chips or options.first_chip is not None):
        raise ValueError("--mode clean: there are no chips, leave --chips and --first-chip out")
    if options.first_chip is not None and options.mode == "resample":
        raise ValueError("--first-chip: resample draws weights for every batch, it has no chips to number")


def _eval_clean(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"text": {}, "tasks": {}}
    if options.text:
        from evals.text import evaluate_text, protocol_record

        protocol = _protocol(options, model)
        result["text"] = evaluate_text(model, [Path(file) for file in options.text], protocol, options.batch_size)
        result["protocol"] = protocol_record(protocol)
    if options.tasks:
        from evals.tasks import evaluate_tasks

        result["tasks"] = evaluate_tasks(
            model,
            _names(options.tasks),
            options.include_path,
            options.limit,
            options.batch_size,
            options.trust_remote_code,
        )
    return result


def _eval_under_transforms(options: argparse.Namespace, texts: dict[str, Path]) -> dict[str, Any]:
    from evals.chips import read_transforms, record, tasks_over_chips, text_over_chips
    from evals.models import load_model
    from evals.text import protocol_record

    transforms = read_transforms(
        options.transforms, options.model, options.ranges
    )  # refused before the model is loaded
    model = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
    noisy = transforms.attach(model, options.noise_seed)
    trials = _trials(options)
    result: dict[str, Any] = {"model": model.name, **record(transforms, trials, noisy, options.batch_size)}
    if options.mode == "clean":
        with noisy.clean():
            return result | _eval_clean(options, model)
    result |= {"text": {}, "tasks": {}}
    if options.text or texts:
        protocol = _protocol(options, model)
        result["protocol"] = protocol_record(protocol)
    if texts:
        from evals.languages import languages_over_chips

        result |= languages_over_chips(model, noisy, trials, texts, protocol, options.batch_size)
    if options.text:
        files = [Path(file) for file in options.text]
        result["text"] = text_over_chips(model, noisy, trials, files, protocol, options.batch_size)
    if options.tasks:
        names = ("include_path", "limit", "batch_size", "trust_remote_code")
        how = {name: getattr(options, name) for name in names}
        result["tasks"] = tasks_over_chips(model, noisy, trials, _names(options.tasks), **how)
    return result


def _protocol(options: argparse.Namespace, model: Any) -> Any:
    from evals.text import protocol_for

    return protocol_for(model, options.context, options.stride, options.mask_every)


def _languages(options: argparse.Namespace) -> dict[str, Path]:
    """The text of each language, where there are any."""
    if options.plot and not options.language:
        raise ValueError("--plot draws what --language NAME=FILE measures: there are no languages")
    if not options.language:
        return {}
    if not options.transforms or options.mode == "clean":
        raise ValueError(
            "--language compares a model under hardware effects with the same model clean: give --transforms FILE.toml, "
            "and no --mode clean; for clean figures give --text FILE"
        )
    from evals.languages import check_plot, read_languages

    if options.plot:
        check_plot(Path(options.plot))
        _check_writable(Path(options.plot), "--plot")
    return read_languages(options.language)


def _trials(options: argparse.Namespace) -> Any:
    from evals.chips import Trials

    first = 1 if options.first_chip is None else options.first_chip
    return Trials(options.mode or "chip", options.chips or 5, first)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _sweep(options: argparse.Namespace) -> None:
    _refuse_noise_options(options)
    from evals.chips import read_transforms
    from evals.models import load_model
    from evals.sweep import draw, read_probabilities, sweep
    from evals.text import protocol_record

    out = Path(options.out)
    if out.suffix == ".png":
        raise ValueError(f"--out {out}: expected a name for the JSON; the plot goes beside it")
    _check_writable(out)
    probabilities = read_probabilities(options.probabilities)
    transforms = read_transforms(options.transforms, options.model, options.ranges)
    model = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
    protocol = _protocol(options, model)
    trials = _trials(options)
    seed = options.noise_seed
    found = sweep(model, transforms, Path(options.text), probabilities, trials, protocol, options.batch_size, seed)
    head = {"model": model.name, "text": options.text, "protocol": protocol_record(protocol)}
    out.write_text(json.dumps(head | found, indent=2) + "\n", encoding="utf-8")
    label = ", ".join(Path(name).stem for name in options.transforms)
    draw({label: found["points"]}, found["clean"], model.name, out.with_suffix(".png"))
    print(f"{out}, {out.with_suffix('.png')}")


def _generate(options: argparse.Namespace) -> None:
    from evals.generate import generate
    from evals.models import load_model

    _warn_of_norms(options.model)
    model = load_model(options.model, options.device, trust_remote_code=options.trust_remote_code)
    print(generate(model, options.prompt, options.max_new_tokens, options.temperature, options.seed))


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
