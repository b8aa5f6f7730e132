"""Measurements in parts, written as they come: eval --compare (sets of transforms) and sweep-noise (values of a number)."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from evals.quiet import quiet_libraries
from evals.references import check_reference
from launch.eval_commands import (
    check_files,
    check_noise_options,
    check_ranges,
    check_tasks,
    check_writable,
    load,
    names_in,
    progress_over,
    protocol_of,
    task_options,
    trials_of,
    warn_of_norms,
)


def compare(options: argparse.Namespace) -> None:
    """`newcompute eval --compare`, whose options have been checked."""
    from evals import compare as comparison
    from evals.result_file import GrowingResult
    from evals.results import print_comparison
    from evals.tasks import evaluate_tasks
    from evals.text import evaluate_text, protocol_record

    sets = comparison.read_sets(options.compare, options.model)
    files, tasks = [Path(file) for file in options.text], names_in(options.tasks)
    for transforms in sets.values():
        check_ranges(transforms, files, options)
    check_tasks(options)
    result = GrowingResult(Path(options.out) if options.out else None, "sets", _settings(options, files))
    _check_sets(options, result.found, sets)
    warn_of_norms(options.model)
    model = load(options)
    protocol = protocol_of(options, model) if files else None
    following = progress_over(model, files, protocol) if files else lambda label, passes: nullcontext()
    with following("clean", 1):
        text = evaluate_text(model, files, protocol, options.batch_size) if protocol else {}
    how = task_options(options)
    by_task = {task: evaluate_tasks(model, [task], **how) for task in tasks}
    clean = {"text": text, "tasks": {name: row for found in by_task.values() for name, row in found.items()}}
    settings = {"model": model.name, "dtype": str(model.model.dtype)}
    result.begin(settings | ({"protocol": protocol_record(protocol)} if protocol else {}), clean)
    _tell_what_is_there(result, [one["name"] for one in result.found])
    missing = {name: one for name, one in sets.items() if name not in [found["name"] for found in result.found]}
    for found in comparison.compare(
        model, missing, files, trials_of(options), protocol, {"text": text, "by_task": by_task}, options.batch_size,
        options.noise_seed, tasks, how, following,
    ):  # fmt: skip
        result.add(found)
    print_comparison(result.content)
    if options.plot:
        comparison.draw(result.content, Path(options.plot))


def sweep(options: argparse.Namespace) -> None:
    """`newcompute sweep-noise`."""
    quiet_libraries()
    check_noise_options(options, with_effects=True)
    from evals import sweep as sweeping
    from evals.chips import read_transforms
    from evals.result_file import GrowingResult
    from evals.results import calibration_line
    from evals.text import evaluate_text, protocol_record

    out, text = Path(options.out), Path(options.text)
    if out.suffix == ".png":
        raise ValueError(f"--out {out}: expected a name for the JSON; the plot goes beside it")
    check_writable(out)
    check_files([options.text])
    check_reference(options.model)
    transforms = read_transforms(options.transforms, options.model, options.ranges)
    axis = sweeping.read_axis(transforms, options.key, options.values)
    seed = transforms.seed if options.noise_seed is None else options.noise_seed
    settings = {
        "text": options.text,
        **_settings(options, [text]),
        "key": axis.key,
        "transforms": transforms.record(),
        "noise_seed": seed,
    }
    result = GrowingResult(out, "points", settings | {"ranges": options.ranges})
    model = load(options)
    protocol, trials = protocol_of(options, model), trials_of(options)
    following = progress_over(model, [text], protocol)
    noisy = transforms.attach(model, seed)  # what belongs to the model, such as norms, is there when it is clean
    with noisy.clean(), following("clean", 1):
        clean = evaluate_text(model, [text], protocol, options.batch_size)
    noisy.detach()
    perplexity = clean[str(text)]["perplexity"]
    settings = {"model": model.name, "dtype": str(model.model.dtype), "protocol": protocol_record(protocol)}
    result.begin(settings, {"clean": perplexity})
    done = [point["value"] for point in result.found]
    _tell_what_is_there(result, [f"{axis.name} = {value:g}" for value in done])
    print(f"clean: perplexity {perplexity:.4f}", flush=True)
    for point in sweeping.sweep(model, axis, text, trials, protocol, clean, options.batch_size, seed, done, following):
        if "calibration" in point and not result.found:
            print(calibration_line(point["calibration"]), flush=True)
        result.add(point)
        print(sweeping.describe(axis.name, point), flush=True)
    label = ", ".join(Path(name).stem for name in options.transforms)
    sweeping.draw({label: result.found}, perplexity, model.name, out.with_suffix(".png"), axis.name)
    print(f"{out}, {out.with_suffix('.png')}")


def _settings(options: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    """What all parts of a result have in common, as far as the options tell."""
    from evals.result_file import text_hash

    trials = trials_of(options)
    found: dict[str, Any] = {"sha256": {str(file): text_hash(file) for file in files}, "mode": trials.mode}
    found |= {"chips": trials.chips}
    found |= {"first_chip": trials.first_chip} if trials.mode == "chip" else {"batch_size": options.batch_size}
    if getattr(options, "tasks", ""):
        found |= {"task_names": names_in(options.tasks), "limit": options.limit}
    return found


def _check_sets(options: argparse.Namespace, found: list[dict[str, Any]], sets: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the result has a set of the same name and of other transforms.
    """
    for one in found:
        transforms = sets.get(one["name"])
        if transforms is None:
            continue
        seed = transforms.seed if options.noise_seed is None else options.noise_seed
        now = {"transforms": json.loads(json.dumps(transforms.record())), "noise_seed": seed}
        differing = [name for name, value in now.items() if one.get(name) != value]
        if differing:
            raise ValueError(
                f"--out {options.out}: its set {one['name']} has other {differing[0]}; give another name, or remove it"
            )


def _tell_what_is_there(result: Any, names: list[str]) -> None:
    if names:
        print(f"{result.file}: goes on behind {', '.join(names)}", flush=True)
