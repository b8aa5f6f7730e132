"""Cross-lingual damage: what hardware effects do to a model's texts in several languages, and how unequally.

A language's text is measured clean and on every chip, all languages on the same chips. Per language and chip, with b for
bits per byte:

    degradation      = b / b_clean - 1
    nats rise        = nats per scored token - the same clean   = ln(perplexity_clean) * degradation
    perplexity ratio = perplexity / perplexity_clean            = exp(nats rise)

The degradation is what languages are compared by: bytes per character and characters per token differ between them, and
cancel in it, while the other two are per token of a tokenizer that cuts some languages finer than others. With D for a
language's mean degradation over the chips that are finite in every language,

    disparity ratio = max D / min D

and none where the smallest D is not above 0: a language that does not degrade, or improves, has no ratio to the others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.chips import Trials, over_chips, text_over_chips
from evals.masked import MaskedProtocol
from evals.models import EvalModel
from evals.noise import NoisyModel
from evals.text import Protocol

FIGURES = ("degradation", "nats_rise", "perplexity_ratio")


def read_languages(given: Sequence[str]) -> dict[str, Path]:
    """{name: file} from the command line's `NAME=FILE`.

    Raises:
        ValueError: one that is not of this form, a name or a file given twice, a file that cannot be read.
    """
    found: dict[str, Path] = {}
    for one in given:
        name, equals, file = one.partition("=")
        if not (name and equals and file):
            raise ValueError(f"--language {one}: expected NAME=FILE, as in de=german.txt")
        if name in found:
            raise ValueError(f"--language {one}: {name} has a text already, {found[name]}; put them into one file")
        if Path(file) in found.values():
            raise ValueError(f"--language {one}: the file is the text of another language already")
        try:
            with Path(file).open("rb"):
                found[name] = Path(file)
        except OSError as error:
            raise ValueError(f"--language {one}: {error.strerror}") from error
    return found


def languages_over_chips(
    model: EvalModel,
    noisy: NoisyModel,
    trials: Trials,
    texts: Mapping[str, Path],
    protocol: Protocol | MaskedProtocol,
    batch_size: int = 8,
) -> dict[str, Any]:
    """{"languages": {name: figures}, "disparity": figures}: what the chips of `trials` do to each language's text.

    A language has the keys of `text_over_chips`, `file`, and each of `FIGURES` with its standard deviation and its list
    over chips; the disparity those of `disparity`.

    Raises:
        ValueError: a text cannot be read, is too short, or has no finite figure above 0 when clean.
    """
    rows = text_over_chips(model, noisy, trials, list(texts.values()), protocol, batch_size)
    languages = {name: {"file": str(file)} | _damage(file, rows[str(file)]) for name, file in texts.items()}
    per_chip = {name: row["degradation_per_chip"] for name, row in languages.items()}
    return {"languages": languages, "disparity": disparity(per_chip)}


def _damage(file: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The figures of one language added to those of its text."""
    clean = row["bits_per_byte_clean"]
    if not 0 < clean < math.inf:
        raise ValueError(f"{file}: {clean} bits per byte without hardware effects: there is nothing to compare with")
    finite = [value is not None for value in row["bits_per_byte_per_chip"]]
    degradations = [math.nan if value is None else value / clean - 1 for value in row["bits_per_byte_per_chip"]]
    nats = [math.log(row["perplexity_clean"]) * value for value in degradations]
    ratios = [math.exp(min(value, 700.0)) for value in nats]
    for name, values in zip(FIGURES, (degradations, nats, ratios)):
        row = row | over_chips(name, values, finite)
    return row


def disparity(per_chip: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """How unequally languages degrade.

    Args:
        per_chip: each language's degradation on every chip, None where that is not finite.

    Returns:
        `ratio` (None where undefined, and then `undefined` says why), the languages `worst` and `best`, `chips` (how many
        are finite in every language, and count), `ratio_per_chip` (largest over smallest degradation on that chip alone;
        None where undefined), and `note`: what a reader of the ratio must know, or None.
    """
    chips = list(zip(*per_chip.values()))
    common = [i for i, values in enumerate(chips) if None not in values]
    found: dict[str, Any] = {"ratio": None, "worst": None, "best": None, "chips": len(common)}
    found["ratio_per_chip"] = [_ratio(values) for values in chips]
    found |= {"undefined": None, "note": None}
    if len(per_chip) < 2:
        return found | {"undefined": "a disparity needs two languages"}
    if not common:
        return found | {"undefined": "no chip is finite in every language"}
    kept = {name: [v for i in common if (v := values[i]) is not None] for name, values in per_chip.items()}
    means = {name: statistics.fmean(values) for name, values in kept.items()}
    worst, best = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    found |= {"worst": worst, "best": best, "ratio": _ratio(list(means.values()))}
    if found["ratio"] is None:
        found["undefined"] = f"{best} does not degrade ({means[best]:+.3%})"
    notes = []
    if len(common) > 1 and 0 < means[best] < 2 * statistics.stdev(kept[best]) / math.sqrt(len(common)):
        notes.append(
            f"{best}'s degradation is less than 2 standard errors from 0, so the ratio could be any: more chips"
        )
    if len(common) < len(chips):
        broken = [name for name, values in per_chip.items() if None in values]
        notes.append(f"{len(chips) - len(common)} of {len(chips)} chips left out, not finite in {', '.join(broken)}")
    return found | {"note": "; ".join(notes) or None}


def _ratio(values: Sequence[float | None]) -> float | None:
    """The largest over the smallest of some degradations."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or len(known) < 2 or min(known) <= 0:
        return None
    return max(known) / min(known)


def describe(found: Mapping[str, Any]) -> str:
    """A disparity as a line for people."""
    if found["ratio"] is None:
        line = f"disparity ratio undefined: {found['undefined']}"
    else:
        line = f"disparity ratio {found['ratio']:.3f}: {found['worst']} degrades most, {found['best']} least"
        single = [value for value in found["ratio_per_chip"] if value is not None]
        if len(found["ratio_per_chip"]) > 1 and single:
            line += f"; {min(single):.3f} to {max(single):.3f} on single chips"
            undefined = len(found["ratio_per_chip"]) - len(single)
            line += f", undefined on {undefined}" if undefined else ""
    return line + (f" ({found['note']})" if found["note"] else "")


def check_plot(file: Path) -> None:
    """
    Raises:
        ValueError: matplotlib writes no files of this name's kind.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if file.suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot {file}: expected a name that ends in .{', .'.join(sorted(kinds))}")


def draw(result: Mapping[str, Any], file: Path) -> None:
    """A bar per language: mean degradation, its standard deviation over chips, and each chip as a dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    languages = result["languages"]
    figure = Figure(figsize=(max(4.0, 1.5 + 0.8 * len(languages)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(languages.values()):
        if row["degradation"] is None:
            axes.annotate("no finite\nchip", (place, 0), ha="center", va="bottom", fontsize=7)
            continue
        axes.bar(place, row["degradation"], yerr=row["degradation_std"], color="C0", alpha=0.6, capsize=4)
        chips = [value for value in row["degradation_per_chip"] if value is not None]
        axes.plot([place] * len(chips), chips, ".", color="black", markersize=4)
        if row["non_finite_chips"]:
            text = f"{row['non_finite_chips']}/{len(row['degradation_per_chip'])}\nnot finite"
            axes.annotate(text, (place, max(chips)), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(languages)), list(languages))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("rise of bits per byte over clean")
    found = result["disparity"]
    ratio = "undefined" if found["ratio"] is None else f"{found['ratio']:.2f}"
    axes.set_title(f"{Path(result['model']).name}: disparity ratio {ratio}", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=150)
