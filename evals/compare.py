"""Several sets of transforms against one clean measurement of the same model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from evals.calibrate import calibrate_where_unknown
from evals.chips import OF_THE_RUN, TransformList, Trials, read_transforms, record, tasks_over_chips, text_over_chips
from evals.masked import MaskedProtocol
from evals.models import EvalModel
from evals.text import Protocol
from transforms.specs import adds_norms


def read_sets(names: Sequence[str], model: str) -> dict[str, TransformList]:
    """{name: transforms} of the files of `--compare`, named by what their file names do not share.

    Raises:
        ConfigError: a file's problems.
        ValueError: a file is given twice, or its transforms' norms belong to the model.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"--compare: {twice[0]} is there twice")
    stems = Counter(Path(name).stem for name in names)
    found = {}
    for name in names:
        transforms = read_transforms([name], model)
        if transforms.trained and adds_norms(transforms.specs):
            raise ValueError(
                f"--compare {OF_THE_RUN}: this run's training added norms to the model, so that other sets have another clean "
                f"model: evaluate it alone, with --transforms {OF_THE_RUN}"
            )
        found[Path(name).stem if stems[Path(name).stem] == 1 else name] = transforms
    return found


def compare(
    model: EvalModel,
    sets: Mapping[str, TransformList],
    files: Sequence[Path],
    trials: Trials,
    protocol: Protocol | MaskedProtocol | None,
    clean: Mapping[str, Any],
    batch_size: int = 8,
    seed: int | None = None,
    tasks: Sequence[str] = (),
    task_options: Mapping[str, Any] | None = None,
    following: Callable[[str, int], AbstractContextManager] = lambda label, passes: nullcontext(),
) -> Iterator[dict[str, Any]]:
    """What each set does, as it is measured: its name, `record`, `text` and `tasks` over chips, and `calibration`.

    Args:
        protocol: None where there are no texts.
        clean: "text", what `evaluate_text` found without hardware effects, and "by_task", what `evaluate_tasks` did for
            each of the tasks.
        following: shows the progress over texts, by a set's name and how often they are read.
    """
    for name, transforms in sets.items():
        noisy = transforms.attach(model, seed)
        try:
            found: dict[str, Any] = {"name": name, **record(transforms, trials, noisy, batch_size)}
            with following(name, found["chips"] + (not noisy.known)):
                if protocol is not None:
                    calibration = calibrate_where_unknown(model, noisy, files, protocol)
                    found |= {"calibration": calibration} if calibration else {}
                    found["text"] = text_over_chips(
                        model, noisy, trials, files, protocol, batch_size, dict(clean["text"])
                    )
            found.setdefault("text", {})
            options = dict(task_options or {})
            found["tasks"] = tasks_over_chips(model, noisy, trials, tasks, clean["by_task"], **options)
        finally:
            noisy.detach()
        yield found


def draw(result: Mapping[str, Any], file: Path) -> None:
    """A bar per set and text: how far its perplexity lies over clean, with deviation over chips, and each chip as a dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    texts, sets = result["text"], result["sets"]
    height = 0.8 / len(texts)
    figure = Figure(figsize=(7.0, max(2.5, 1.2 + 0.35 * len(sets) * len(texts))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    largest = 0.0
    for number, (text, clean_row) in enumerate(texts.items()):
        clean = clean_row["perplexity"]
        for place, one in enumerate(sets):
            row, y = one["text"][text], place - 0.4 + height * (number + 0.5)
            chips = [value / clean - 1 for value in row["perplexity_per_chip"] if value is not None]
            broken = row["non_finite_chips"]
            if chips:
                spread = row["perplexity_std"]
                mean, error = row["perplexity"] / clean - 1, None if spread is None else spread / clean
                axes.barh(y, mean, height, xerr=error, color=f"C{number}", alpha=0.6, capsize=3)
                axes.plot(chips, [y] * len(chips), ".", color="black", markersize=3)
                largest = max(largest, *map(abs, chips))
            if broken:
                note = f" {broken}/{len(row['perplexity_per_chip'])} not finite"
                axes.annotate(note, (max(chips, default=0.0), y), va="center", fontsize=7)
        axes.barh(0, 0, height, color=f"C{number}", alpha=0.6, label=f"{text}: clean {clean:.2f}")
    axes.set_yticks(range(len(sets)), [one["name"] for one in sets])
    axes.invert_yaxis()
    if largest > 1:  # from a fraction of a percent to thousands
        axes.set_xscale("symlog", linthresh=0.01)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="perplexity over clean", title=Path(result["model"]).name)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=150)
