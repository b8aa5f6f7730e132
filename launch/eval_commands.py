"""What eval, calibrate, sweep-noise and generate do: every check that needs no model first, then the work."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from evals.quiet import quiet_libraries
from evals.references import check_reference

TEXT_OPTIONS = ("context", "stride", "add_bos", "mask_every")
TASK_OPTIONS = ("include_path", "limit")


def evaluate(options: argparse.Namespace) -> None:
    """`newcompute eval`."""
    quiet_libraries()
    texts = _check_eval(options)
    if options.compare:
        from launch.series_commands import compare

        compare(options)
        return
    from evals.chips import read_transforms
    from evals.result_file import write_result
    from evals.results import print_results

    transforms = read_transforms(options.transforms, options.model, options.ranges) if options.transforms else None
    files = [Path(file) for file in options.text]
    if transforms is not None:
        check_ranges(transforms, [*files, *texts.values()], options)
    check_tasks(options)
    if options.transforms != ["run"]:
        warn_of_norms(options.model)
    model = load(options)
    if transforms is not None:
        result = _under_transforms(options, model, transforms, texts)
    else:
        result = {"model": model.name, "transforms": [], **_clean(options, model)}
    print_results(result)
    if options.out:
        write_result(Path(options.out), result)
    if options.plot:
        from evals.languages import draw

        draw(result, Path(options.plot))


def _check_eval(options: argparse.Namespace) -> dict[str, Path]:
    """Refuse what can be refused from the options and files alone; returns the text of each language."""
    if not options.text and not options.tasks and not options.language:
        raise ValueError("nothing to evaluate: give --text FILE, --language NAME=FILE or --tasks NAME")
    check_noise_options(options, bool(options.transforms or options.compare))
    _refuse(options, TEXT_OPTIONS, bool(options.text or options.language), "no text: it is for --text or --language")
    _refuse(options, TASK_OPTIONS, bool(options.tasks), "no tasks: it is for --tasks")
    if options.compare:
        _check_compare(options)
    texts = _languages(options)
    if options.plot:
        from evals.languages import check_plot

        check_plot(Path(options.plot))
        check_writable(Path(options.plot), "--plot")
    check_files(options.text)
    check_reference(options.model)
    if options.out:
        check_writable(Path(options.out))
    return texts


def _check_compare(options: argparse.Namespace) -> None:
    if options.language:
        raise ValueError("--compare and --language: damage by language is of one set of transforms, give --transforms")
    if options.mode == "clean":
        raise ValueError("--compare and --mode clean: the clean model is measured in any case, leave --mode out")
    if options.ranges:
        raise ValueError(
            "--compare and --ranges: ranges belong to one set of transforms; each set is calibrated on the text's beginning"
        )
    if options.plot and not options.text:
        raise ValueError("--plot draws the perplexity of --text FILE: there is no text")


def _languages(options: argparse.Namespace) -> dict[str, Path]:
    """The text of each language, where there are any."""
    if options.plot and not options.language and not options.compare:
        raise ValueError("--plot draws what --language NAME=FILE or --compare FILE.toml ... measures: there is neither")
    if not options.language:
        return {}
    if not options.transforms or options.mode == "clean":
        raise ValueError(
            "--language compares a model under hardware effects with the same model clean: give --transforms FILE.toml, "
            "and no --mode clean; for clean figures give --text FILE"
        )
    from evals.languages import read_languages

    return read_languages(options.language)


def check_noise_options(options: argparse.Namespace, with_effects: bool) -> None:
    """An option that would change nothing is a mistake, and a clean figure must not pass for another."""
    names = ("mode", "chips", "first_chip", "noise_seed", "ranges")
    if options.mode != "clean":
        _refuse(options, names, with_effects, "there are no hardware effects without --transforms FILE.toml")
    if options.mode == "clean" and (options.chips or options.first_chip is not None):
        raise ValueError("--mode clean: there are no chips, leave --chips and --first-chip out")
    if options.first_chip is not None and options.mode == "resample":
        raise ValueError("--first-chip: resample draws weights for every batch, it has no chips to number")


def _refuse(options: argparse.Namespace, names: Sequence[str], acts: bool, why: str) -> None:
    """Refuse options that would have no effect."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    if given and not acts:
        raise ValueError(f"{given[0]}: {why}")


def check_files(files: Sequence[str]) -> None:
    """Refuse texts that cannot be read, before a model is loaded for them."""
    for file in files:
        try:
            with Path(file).open("rb") as opened:
                opened.read(1)
        except OSError as error:
            raise ValueError(f"--text {file}: {error.strerror}") from error


def check_tasks(options: argparse.Namespace) -> None:
    if options.tasks:
        from evals.tasks import find_tasks

        find_tasks(names_in(options.tasks), options.include_path)


def check_ranges(transforms: Any, files: Sequence[Path], options: argparse.Namespace) -> None:
    """Refuse converters of unknown ranges where there is no text to fit them on."""
    from evals.calibrate import needs_ranges

    if options.mode != "clean" and not files and transforms.ranges is None and needs_ranges(transforms.specs):
        raise ValueError(
            "the ranges of these transforms' converters are not known, and tasks are no text to fit them on: fit them with "
            "newcompute calibrate, and name the file with --ranges; a model that was trained under them has its own with "
            "--transforms run"
        )


def check_writable(out: Path, option: str = "--out") -> None:
    """Refuse a result file before the work rather than after it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise ValueError(f"{option} {out}: this is a folder, expected a file name")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"{option} {out}: not writable")


def warn_of_norms(model: str) -> None:
    """Tell that plain weights are not all of what was trained."""
    from evals.chips import norms_left_out

    if norms_left_out(model):
        print(
            f"newcompute: {model} was trained with norms before its linear layers (norm = true), which plain weights are "
            "without: use --transforms run, or export --packed",
            file=sys.stderr,
        )


def load(options: argparse.Namespace) -> Any:
    from evals.models import load_model

    return load_model(options.model, options.device, options.dtype, options.trust_remote_code)


def protocol_of(options: argparse.Namespace, model: Any) -> Any:
    from evals.text import protocol_for

    return protocol_for(model, options.context, options.stride, options.mask_every, options.add_bos or "auto")


def trials_of(options: argparse.Namespace) -> Any:
    from evals.chips import Trials

    first = 1 if options.first_chip is None else options.first_chip
    return Trials(options.mode or "chip", options.chips or 5, first)


def names_in(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def task_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("include_path", "limit", "batch_size", "trust_remote_code")}


def progress_over(
    model: Any, files: Sequence[Path], protocol: Any, at_most: int | None = None
) -> Callable[[str, int], AbstractContextManager]:
    """A bar over texts, or over `at_most` tokens of each: called with what is measured, and how often they are read."""
    from evals.progress import forwards
    from evals.text import tokens_of_a_pass

    def bar(label: str, passes: int) -> AbstractContextManager:
        return forwards(model.model, label, lambda: passes * tokens_of_a_pass(model, files, protocol, at_most))

    return bar


def _clean(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Figures without hardware effects."""
    result: dict[str, Any] = {"text": {}, "tasks": {}}
    if options.text:
        from evals.text import evaluate_text, protocol_record

        protocol, files = protocol_of(options, model), [Path(file) for file in options.text]
        with progress_over(model, files, protocol)("text", 1):
            result["text"] = evaluate_text(model, files, protocol, options.batch_size)
        result["protocol"] = protocol_record(protocol)
    if options.tasks:
        from evals.tasks import evaluate_tasks

        result["tasks"] = evaluate_tasks(model, names_in(options.tasks), **task_options(options))
    return result


def _under_transforms(
    options: argparse.Namespace, model: Any, transforms: Any, texts: dict[str, Path]
) -> dict[str, Any]:
    """Figures over chips, each with its clean value."""
    from evals.calibrate import calibrate_where_unknown
    from evals.chips import record, tasks_over_chips, text_over_chips
    from evals.text import protocol_record

    noisy = transforms.attach(model, options.noise_seed)
    trials = trials_of(options)
    result: dict[str, Any] = {"model": model.name, **record(transforms, trials, noisy, options.batch_size)}
    if options.mode == "clean":
        with noisy.clean():
            return result | _clean(options, model)
    result |= {"text": {}, "tasks": {}}
    files = [Path(file) for file in options.text]
    if files or texts:
        protocol = protocol_of(options, model)
        result["protocol"] = protocol_record(protocol)
        every = [*files, *texts.values()]
        with progress_over(model, every, protocol)("text", 1 + result["chips"] + (not noisy.known)):
            calibration = calibrate_where_unknown(model, noisy, every, protocol)
            result |= {"calibration": calibration} if calibration else {}
            if texts:
                from evals.languages import languages_over_chips

                result |= languages_over_chips(model, noisy, trials, texts, protocol, options.batch_size)
            if files:
                result["text"] = text_over_chips(model, noisy, trials, files, protocol, options.batch_size)
    if options.tasks:
        result["tasks"] = tasks_over_chips(model, noisy, trials, names_in(options.tasks), **task_options(options))
    return result


def calibrate(options: argparse.Namespace) -> None:
    """`newcompute calibrate`."""
    quiet_libraries()
    from evals.calibrate import DEFAULT_TOKENS, NOTHING_TO_CALIBRATE, calibrate, needs_ranges
    from evals.chips import read_transforms
    from evals.ranges import write_ranges
    from evals.text import protocol_record

    out = Path(options.out)
    check_writable(out)
    check_files(options.text)
    check_reference(options.model)
    transforms = read_transforms(options.transforms, options.model)
    if not needs_ranges(transforms.specs):
        raise ValueError(NOTHING_TO_CALIBRATE)
    model = load(options)
    protocol = protocol_of(options, model)
    noisy = transforms.attach(model)
    files, tokens = [Path(file) for file in options.text], options.tokens or DEFAULT_TOKENS
    with progress_over(model, files, protocol, tokens)("text", 1):
        ranges = calibrate(model, noisy, files, protocol, tokens)
    source = {"model": model.name, "transforms": transforms.record(), "text": options.text}
    source |= {"tokens": tokens, "protocol": protocol_record(protocol)}
    write_ranges(out, ranges, {name: json.dumps(value) for name, value in source.items()})
    print(f"{len(ranges)} ranges of {model.name} -> {out}")


def generate(options: argparse.Namespace) -> None:
    """`newcompute generate`."""
    quiet_libraries()
    from evals.generate import generate
    from evals.models import load_model

    check_reference(options.model)
    warn_of_norms(options.model)
    model = load_model(options.model, options.device, trust_remote_code=options.trust_remote_code)
    print(generate(model, options.prompt, options.max_new_tokens, options.temperature, options.seed))
