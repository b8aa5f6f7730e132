"""Options of the commands that evaluate a model: eval, calibrate, sweep-noise, generate."""

from __future__ import annotations

import argparse
from typing import Any

from launch import eval_commands, series_commands


def add_parsers(commands: Any) -> None:
    _eval_parser(commands)
    _calibrate_parser(commands)
    _sweep_parser(commands)
    _generate_parser(commands)


def _eval_parser(commands: Any) -> None:
    parser = commands.add_parser("eval", help="perplexity and bits per byte of text files, and lm-eval tasks")
    _model_argument(parser)
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text files")
    parser.add_argument(
        "--language",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="text in one language, as in de=german.txt; repeatable: what the transforms do to each, and the disparity",
    )
    parser.add_argument("--tasks", default="", metavar="A,B", help="lm-eval tasks, by name or YAML file")
    parser.add_argument("--include-path", metavar="DIR", help="folder of further lm-eval task definitions")
    parser.add_argument("--limit", type=positive, help="examples per task")
    effects = parser.add_mutually_exclusive_group()
    effects.add_argument(
        "--transforms",
        nargs="+",
        metavar="FILE.toml",
        help='hardware effects: files of [[transforms]] tables, all at once, or "run" for those of the run',
    )
    effects.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE.toml",
        help='files of [[transforms]] tables, or "run": each alone, against one clean measurement, in one table',
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw what --compare or --language measures")
    _ranges_argument(parser)
    parser.add_argument("--mode", choices=["clean", "chip", "resample"], help="with transforms (default chip)")
    _noise_arguments(parser)
    _forward_arguments(parser)
    parser.add_argument(
        "--out",
        metavar="FILE.json",
        help="write the result as JSON; with --compare after each file, to go on with later",
    )
    parser.set_defaults(run=eval_commands.evaluate)


def _calibrate_parser(commands: Any) -> None:
    parser = commands.add_parser("calibrate", help="fit the ranges of converters on text, for eval --ranges")
    _model_argument(parser)
    _transforms_argument(parser, "[[transforms]] with tracked or learned ranges")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="text files to read")
    parser.add_argument("--tokens", type=positive, help="tokens of each file, from its beginning (default 16384)")
    _forward_arguments(parser, batches=False)
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="file of ranges to write")
    parser.set_defaults(run=eval_commands.calibrate)


def _sweep_parser(commands: Any) -> None:
    parser = commands.add_parser("sweep-noise", help="perplexity against one number of the transforms, with a plot")
    _model_argument(parser)
    _transforms_argument(parser, "[[transforms]] of which one number is changed")
    parser.add_argument("--text", required=True, metavar="FILE", help="text file")
    parser.add_argument(
        "--key",
        required=True,
        help="the number: probability (all above 0 of bit errors), photons, levels, tile, weight.bits (of int4), ..., and "
        "transforms.1.photons where several transforms have one",
    )
    parser.add_argument("--values", required=True, metavar="V,V", help="its values, as in 1e-6,1e-5,1e-4")
    parser.add_argument("--mode", default="chip", choices=["chip", "resample"])
    _ranges_argument(parser)
    _noise_arguments(parser)
    _forward_arguments(parser)
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE.json",
        help="result, written after each value, to go on with later; the plot goes beside it as .png",
    )
    parser.set_defaults(run=series_commands.sweep)


def _generate_parser(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue a prompt")
    _model_argument(parser)
    parser.add_argument("--prompt", default="", help="text to continue; empty starts from BOS")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--temperature", type=_temperature, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    _trust_argument(parser)
    parser.set_defaults(run=eval_commands.generate)


def _model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="run, checkpoint, Hugging Face folder or id")


def _transforms_argument(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--transforms", nargs="+", required=True, metavar="FILE.toml", help=help)


def _ranges_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranges",
        metavar="FILE",
        help="ranges of converters, from newcompute calibrate (default: those of the run, else fitted on the text's beginning)",
    )


def _noise_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chips", type=positive, help="simulated chips, or passes with resample (default 5)")
    parser.add_argument("--first-chip", type=_count, metavar="N", help="number of the first; 0 trained (default 1)")
    parser.add_argument("--noise-seed", type=_count, metavar="N", help="default: that of the file's [noise], else 1234")


def _forward_arguments(parser: argparse.ArgumentParser, batches: bool = True) -> None:
    parser.add_argument(
        "--context", type=positive, help="tokens per window of text (default: the model's context, at most 512)"
    )
    parser.add_argument(
        "--stride", type=positive, help="tokens of text between windows (default: those of a window, no overlap)"
    )
    parser.add_argument(
        "--add-bos",
        choices=["auto", "yes", "no"],
        help="BOS before each window of text; auto (default): where the model's tokenizer puts one before a text by itself",
    )
    parser.add_argument(
        "--mask-every",
        type=positive,
        metavar="K",
        help="masked encoders: mask every K-th token at a time, in K passes (default 7)",
    )
    if batches:
        parser.add_argument("--batch-size", type=positive, default=8, help="windows or requests per forward")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    _trust_argument(parser)


def _trust_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model or a task brings along"
    )


def positive(text: str) -> int:
    """A whole number of at least 1 on the command line."""
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
