"""Evaluation results as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from evals.tables import ResultTable

_DERIVED = ("_std", "_per_chip", "_clean")
NON_FINITE_INPUTS = "non_finite_inputs_per_chip"
"""Key of a row that only some have: how many inputs of the hardware were not finite."""
OVER_CLEAN = "over clean"
"""Heading of a figure's rise over the same without hardware effects, in percent of that."""


def print_results(result: Mapping[str, Any]) -> None:
    """Print what `newcompute eval` found."""
    _print_lines(result)
    over_chips = bool(result.get("chips", 0))
    if result.get("languages"):
        from evals.languages import describe

        language_table(result["languages"], result["protocol"]).print()
        print(describe(result["disparity"]))
    if result["text"]:
        text_table(result["text"], result["protocol"], over_chips).print()
    if result["tasks"]:
        task_table(result["tasks"], over_chips).print()
    for line in _non_finite_inputs(result):
        print(line)


def print_comparison(result: Mapping[str, Any]) -> None:
    """Print what `newcompute eval --compare` found: every set of transforms in one table, below the clean model."""
    print(result["model"])
    for one in result["sets"]:
        print(f"{one['name']}:")
        _print_lines(one)
    if result["text"]:
        comparison_table(result).print()
    if result["tasks"]:
        task_comparison(result).print()
    for one in result["sets"]:
        for line in _non_finite_inputs(one):
            print(f"{one['name']}: {line}")


def _print_lines(result: Mapping[str, Any]) -> None:
    """The model, what acts on it, and where ranges are from."""
    lines = [result["model"]] if "model" in result else []
    lines += result.get("table", ())
    if "mode" in result:
        lines.append(_hardware(result))
    if "calibration" in result:
        lines.append(calibration_line(result["calibration"]))
    print("\n".join(lines))


def calibration_line(calibration: Mapping[str, int]) -> str:
    """Where ranges are from that nobody gave."""
    read = ", ".join(f"the first {tokens:,} tokens of {file}" for file, tokens in calibration.items())
    return f"ranges of converters calibrated on {read}, for want of --ranges"


def _hardware(result: Mapping[str, Any]) -> str:
    """On which hardware the figures were measured."""
    if result["mode"] == "clean":
        return "clean: no hardware effects"
    seed = f"noise seed {result['noise_seed']}"
    if result["mode"] == "resample":
        return f"{result['chips']} passes, weights drawn anew for every batch of {result['batch_size']}; {seed}"
    if result["chips"] == 1:
        return f"one chip, number {result['first_chip']}; {seed}"
    return f"mean ± standard deviation over {result['chips']} chips, from chip {result['first_chip']} on; {seed}"


def _non_finite_inputs(result: Mapping[str, Any]) -> Iterator[str]:
    """What was measured although quantisers were given infinity or NaN, which a finite figure does not show."""
    for part in ("languages", "text", "tasks"):
        for name, row in (result.get(part) or {}).items():
            if counts := row.get(NON_FINITE_INPUTS):
                yield f"{name}: {counted_inputs(counts)}"


def counted_inputs(counts: list[int]) -> str:
    """How many rows of the hardware's inputs were not finite, as words for people."""
    return f"rows with infinity or NaN on their way into the hardware, per chip: {', '.join(f'{n:,}' for n in counts)}"


def windows(protocol: Mapping[str, Any]) -> str:
    """How texts were read."""
    if "mask_every" in protocol:
        return f"windows of {protocol['context']} tokens, every {protocol['mask_every']}th masked at a time"
    first = "BOS before each window" if protocol["bos_added"] else "no BOS, first token of a window unscored"
    return f"windows of {protocol['context']} tokens, stride {protocol['stride']}, {first}"


def language_table(rows: Mapping[str, Any], protocol: Mapping[str, Any]) -> ResultTable:
    """One line per language: what it costs clean, and what the hardware adds."""
    heading, broken = _not_finite(rows.values())
    numbers = ("clean bits per byte", OVER_CLEAN, "nats per token", "perplexity", *heading, "tokens")
    table = ResultTable(f"languages: {windows(protocol)}; over clean is of bits per byte", ("language",), numbers)
    for name, row in rows.items():
        cells = [
            _spread(row, "degradation", "{:+.2%}", "{:.2%}"),
            _spread(row, "nats_rise", "{:+.4f}", "{:.4f}"),
            _spread(row, "perplexity_ratio", "x{:.4f}", "{:.4f}"),
        ]
        table.add(name, number(row["bits_per_byte_clean"]), *cells, *broken(row), f"{row['tokens']:,}")
    return table


def text_table(rows: Mapping[str, Any], protocol: Mapping[str, Any], over_chips: bool) -> ResultTable:
    """One line per text file, or under hardware effects one per file and figure."""
    title = f"text: {windows(protocol)}"
    if not over_chips:
        table = ResultTable(title, ("file",), ("perplexity", "bits per byte", "tokens scored"))
        for file, row in rows.items():
            table.add(file, number(row["perplexity"]), number(row["bits_per_byte"]), f"{row['tokens']:,}")
        return table
    heading, broken = _not_finite(rows.values())
    table = ResultTable(title, ("file", "figure"), ("mean", "± std", "clean", OVER_CLEAN, *heading, "tokens scored"))
    for file, row in rows.items():
        for name, figure in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
            table.add(file, figure, *_over_chips(row, name), *broken(row), f"{row['tokens']:,}")
    return table


def task_table(tasks: Mapping[str, Any], over_chips: bool) -> ResultTable:
    """One line per metric of a task."""
    heading, broken = _not_finite(tasks.values() if over_chips else ())
    numbers = ("mean", "± std", "clean", OVER_CLEAN, *heading) if over_chips else ("value",)
    table = ResultTable("tasks (lm-eval)", ("task", "metric"), numbers)
    for task, metrics in tasks.items():
        for metric in _metrics(metrics, over_chips):
            if over_chips:
                table.add(task, metric, *_over_chips(metrics, metric), *broken(metrics))
            else:
                table.add(task, metric, number(metrics[metric]))
    return table


def comparison_table(result: Mapping[str, Any]) -> ResultTable:
    """One line per text and set of transforms, first the clean model's."""
    several = len(result["text"]) > 1
    names = ("file", "transforms") if several else ("transforms",)
    heading, broken = _not_finite([row for one in result["sets"] for row in one["text"].values()])
    numbers = ("perplexity", "± std", OVER_CLEAN, "bits per byte", *heading)
    of = "" if several else f" of {next(iter(result['text']))}"
    table = ResultTable(f"text{of}: {windows(result['protocol'])}; over clean is of perplexity", names, numbers)
    for file, clean in result["text"].items():
        place = (file,) if several else ()
        table.add(
            *place, "clean", number(clean["perplexity"]), "", "", number(clean["bits_per_byte"]), *heading and [""]
        )
        for one in result["sets"]:
            row = one["text"][file]
            mean, std, _, over = _over_chips(row, "perplexity")
            table.add(*place, one["name"], mean, std, over, number(row["bits_per_byte"]), *broken(row))
    return table


def task_comparison(result: Mapping[str, Any]) -> ResultTable:
    """One line per metric of a task and set of transforms."""
    heading, broken = _not_finite([row for one in result["sets"] for row in one["tasks"].values()])
    table = ResultTable("tasks (lm-eval)", ("task", "metric", "transforms"), ("mean", "± std", OVER_CLEAN, *heading))
    for task, clean in result["tasks"].items():
        for metric, value in clean.items():
            table.add(task, metric, "clean", number(value), "", "", *heading and [""])
            for one in result["sets"]:
                metrics = one["tasks"][task]
                mean, std, _, over = _over_chips(metrics, metric)
                table.add(task, metric, one["name"], mean, std, over, *broken(metrics))
    return table


def _not_finite(rows: Iterable[Mapping[str, Any]]) -> tuple[list[str], Callable[[Mapping[str, Any]], list[str]]]:
    """The heading of a column that counts chips that are not finite, and a row's cell in it; none where all are finite."""
    if not any(row["non_finite_chips"] for row in rows):
        return [], lambda row: []
    return ["not finite"], lambda row: [str(row["non_finite_chips"])]


def _metrics(metrics: Mapping[str, Any], over_chips: bool) -> list[str]:
    """The names of a task's metrics, without what was derived from each."""
    if not over_chips:
        return list(metrics)
    return [name for name in metrics if name != "non_finite_chips" and not name.endswith(_DERIVED)]


def _over_chips(row: Mapping[str, Any], name: str) -> tuple[str, str, str, str]:
    """Mean, standard deviation, clean value and rise over clean of one figure."""
    mean, clean = row[name], row[f"{name}_clean"]
    return number(mean), number(row[f"{name}_std"]), number(clean), percent_over(mean, clean)


def percent_over(value: float | None, clean: float) -> str:
    """How far a figure lies over its clean value, in percent of that; "-" where there is nothing to compare."""
    return "-" if value is None or not clean > 0 else f"{value / clean - 1:+.2%}"


def _spread(row: Mapping[str, Any], name: str, of_mean: str, of_spread: str) -> str:
    if row[name] is None:
        return "-"
    spread = "" if row[f"{name}_std"] is None else f" ± {of_spread.format(row[f'{name}_std'])}"
    return of_mean.format(row[name]) + spread


def number(value: float | None) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 1e9 else f"{value:.4e}"
