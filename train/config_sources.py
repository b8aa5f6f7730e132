"""Where a configuration comes from: layered TOML files and flags, merged with their provenance, validated once.

Every problem is collected and reported together, each naming the file or flag, the key, the value and what is allowed.
A value that fails is replaced by its default for the rest of the checks, so that one mistake does not hide another.
"""

from __future__ import annotations

import difflib
import os
import sys
import typing
from collections.abc import Iterator, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any, NoReturn

import tomli
import tomli_w
from pydantic import BaseModel, ValidationError

from train.config import Config
from train.config_merge import ARRAYS, ConfigError, Problem, Sources
from train.redaction import redact
from transforms.specs import KINDS, BitflipSpec, CellFaults, LoraSpec, OpticalSpec, Quantised, QuantiseSpec

EXIT_CONFIG = 2


def load_config(files: Sequence[str], flags: Sequence[str] = (), world_size: int | None = None) -> Config:
    """The validated configuration of `--config` files (later ones win) and `--section.field value` flags (they win).

    Args:
        files: TOML files.
        flags: what is left of the command line.
        world_size: number of processes; None skips the rules that need it.

    Raises:
        ConfigError: with every problem found.
    """
    from train.config_rules import cross_checks

    sources = read_sources(files, flags)
    config, broken = validate(sources)
    config = _without_superseded(config, broken, sources)
    for problem in cross_checks(config, world_size):
        if not any(key == problem.key or key.startswith(problem.key + ".") for key in broken):
            origin = problem.origin or sources.origin(problem.key)
            sources.problems.append(Problem(problem.message, problem.key, problem.value, origin))
    if sources.problems:
        raise ConfigError(sources.problems)
    return config


def _without_superseded(config: Config, broken: set[str], sources: Sources) -> Config:
    """Take back what an earlier source set for a choice that a later one has replaced; what else has no effect is a problem.

    As with the length of a run: `schedule.name = "cosine"` in a later file also ends `schedule.decay_fraction` of "wsd".
    """
    from train.config_effect import idle

    for _ in range(10):  # what is taken back may have been what another key depended on
        old = [one.key for one in idle(config) if sources.superseded(one.key, one.when.deciders)]
        for key in old:
            sources.remove(key)
        if not old:
            break
        config = Config.model_validate(sources.values)
    for one in idle(config):
        # The default stands in for a value that is wrong: what it would decide is not known.
        if not any(f"{key}.".startswith(f"{decider}.") for key in broken for decider in one.when.deciders):
            sources.problems.append(Problem(one.message, one.key, one.value, sources.origin(one.key)))
    return config


def read_sources(files: Sequence[str], flags: Sequence[str]) -> Sources:
    """Merge files and flags without validating values; unreadable files and malformed flags become problems."""
    sources = Sources()
    included: set[str] = set()
    for path in files:
        _add_file(sources, os.path.normpath(path), (), included)
    leaves = list(_parse_flags(flags, sources.problems))
    sources.add_layer(leaves, {key: f"flag --{key}" for key, _ in leaves})
    return sources


def _add_file(sources: Sources, path: str, includers: tuple[str, ...], done: set[str]) -> None:
    """Add a file, and before it those that its top-level `include` names, relative to it; each is included once."""
    if path in includers:
        sources.problems.append(Problem(f"includes itself: {' -> '.join((*includers, path))}", origin=path))
        return
    try:
        content = tomli.loads(Path(path).read_text(encoding="utf-8-sig"))  # editors of some systems begin with a mark
    except UnicodeDecodeError as error:
        message = f"not a TOML file: it is not UTF-8 (byte {error.start}); save it as UTF-8"
        sources.problems.append(Problem(message, origin=path))
        return
    except OSError as error:
        by = f" (included by {includers[-1]})" if includers else ""
        sources.problems.append(Problem(f"cannot read this file{by}: {error.strerror or error}", origin=path))
        return
    except (ValueError, RecursionError) as error:
        sources.problems.append(Problem(f"not a TOML file: {error}", origin=path))
        return
    included = content.pop("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        sources.problems.append(Problem("expected an array of file names", "include", included, path))
        included = []
    for name in included:
        other = os.path.normpath(Path(path).parent / name)
        if other not in done:
            _add_file(sources, other, (*includers, path), done)
            done.add(other)
    leaves = list(_leaves(content))
    sources.add_layer(leaves, {key: path for key, _ in leaves})


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" in ARRAYS:
            yield f"{prefix}{key}", [value]
        elif isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse_flags(flags: Sequence[str], problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """`--a.b value`, `--a.b=value`, and a bare `--a.b` for true."""
    pending = list(flags)
    while pending:
        flag = pending.pop(0)
        if not flag.startswith("--") or len(flag) < 3:
            message = 'expected a flag like --training.steps 100; several values are one array: \'["a", "b"]\''
            problems.append(Problem(message, origin=f"argument {flag}"))
            continue
        key, equals, text = flag[2:].partition("=")
        if not equals:
            bare = not pending or pending[0].startswith("--")
            if bare and _field_type(key) not in (bool, None):
                problems.append(Problem("expected a value after it", origin=f"flag --{key}"))
                continue
            text = "true" if bare else pending.pop(0)
        yield key, _flag_value(key, text)


def _flag_value(key: str, text: str) -> Any:
    """Read as TOML, unless the field is a string; one text stands for a list of texts."""
    kind = _field_type(key)
    if kind is str or (kind == list[str] and not text.lstrip().startswith("[")):
        return text
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, date | time) else value  # no field is a date, but a path may look like one


def _field_type(key: str) -> Any:
    """Annotation of a dotted key in the schema, or None."""
    model: Any = Config
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return None
        model = model.model_fields[part].annotation
        choices = [choice for choice in typing.get_args(model) if choice is not type(None)]
        model = choices[0] if len(choices) == 1 and type(None) in typing.get_args(model) else model
    return model


def schema_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, pydantic field) of every leaf of the schema."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from schema_keys(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def validate(sources: Sources) -> tuple[Config, set[str]]:
    """A configuration from what is valid, and the keys that are not; their problems are added to `sources`."""
    broken: set[str] = set()
    for _ in range(100):  # each round removes at least one offending key
        try:
            return Config.model_validate(sources.values), broken
        except ValidationError as error:
            found = [(_dotted(detail["loc"], sources), detail) for detail in error.errors()]
            for key, detail in found:
                # A table from which a broken key was taken may now lack something: one mistake, one problem.
                if key not in broken and not any(one.startswith(f"{key}.") for one in broken):
                    sources.problems.append(
                        Problem(_explain(detail, key), key, _value(detail, sources, key), sources.origin(key))
                    )
                broken.add(key)
                sources.remove(key)
    raise AssertionError("validation did not converge")


def _dotted(location: tuple[int | str, ...], sources: Sources) -> str:
    """Dotted key of a pydantic location; trailing parts that name a branch of a union are left off."""
    # Behind the number of a transform stands its kind, which is no key.
    parts = [str(part) for i, part in enumerate(location) if i != 2 or location[0] != "transforms"]
    while len(parts) > 1 and sources.get(".".join(parts)) is None:
        parts.pop()
    return ".".join(parts)


def _value(detail: Any, sources: Sources, key: str) -> Any:
    value = sources.get(key)
    return detail["input"] if value is None else value


def _explain(detail: Any, key: str) -> str:
    """A pydantic error in words for people."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{_suggest(key)}"
    if kind in ("model_type", "model_attributes_type"):
        return "expected a table with keys below it"
    if kind == "string_pattern_mismatch":
        return "expected letters, digits, '.', '_' and '-', beginning with a letter or digit"
    words = {
        "int_type": "expected a whole number",
        "float_type": "expected a number",
        "bool_type": "expected true or false",
        "string_type": "expected a string",
        "list_type": "expected an array",
        "dict_type": "expected a table",
        "finite_number": "expected a finite number",
    }
    if kind in words:
        return words[kind]
    if kind == "union_tag_not_found":
        return f"expected a kind, one of {', '.join(KINDS)}"
    if kind == "union_tag_invalid":
        close = difflib.get_close_matches(str(context["tag"]), KINDS, n=1)
        return f"no kind of transform; choose from {', '.join(KINDS)}" + (
            f"; did you mean {close[0]!r}?" if close else ""
        )
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"expected one of {context['expected']}{_nearest_choice(detail)}"
    bounds = {
        "greater_than": "greater than",
        "greater_than_equal": "at least",
        "less_than": "less than",
        "less_than_equal": "at most",
    }
    if kind in bounds:
        limit = next(iter(context.values()))
        return f"expected a value {bounds[kind]} {limit}"
    return detail["msg"]


def _nearest_choice(detail: Any) -> str:
    choices = [choice.strip("' ") for choice in detail["ctx"]["expected"].replace(" or ", ",").split(",")]
    close = difflib.get_close_matches(str(detail["input"]), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _suggest(key: str) -> str:
    """The nearest key of the schema: first by the whole name, then by the last part alone."""
    if key.startswith("transforms."):
        return _suggest_transform(key)
    known = [name for name, _ in schema_keys()]
    sections = [name for name in Config.model_fields if name not in known]
    close = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.75)
    if not close:
        last = key.rpartition(".")[2]
        tails = {name.rpartition(".")[2]: name for name in reversed(known)}
        close = [tails[tail] for tail in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.75)]
    if close:
        return f"; did you mean {close[0]}?"
    section = key.partition(".")[0]
    allowed = [name for name in known if name.startswith(section + ".")] or sections
    return f"; allowed are {', '.join(allowed)}"


def _suggest_transform(key: str) -> str:
    """The nearest key of a `[[transforms]]` table, or of the table of an operand in it."""
    nested = key.count(".") > 2
    models = (CellFaults, Quantised) if nested else (BitflipSpec, QuantiseSpec, OpticalSpec, LoraSpec)
    allowed = list(dict.fromkeys(name for model in models for name in model.model_fields))
    close = difflib.get_close_matches(key.rpartition(".")[2], allowed, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; allowed are {', '.join(allowed)}"


def to_toml(config: Config) -> str:
    """The resolved configuration, defaults included; loading it gives an equal one."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def split_arguments(arguments: Sequence[str], known: Sequence[str] = ()) -> tuple[list[str], dict[str, str], list[str]]:
    """(`--config` files, values of the `known` options, remaining flags) of a command line.

    Raises:
        ConfigError: one of these options has no value.
    """
    files: list[str] = []
    options: dict[str, str] = {}
    rest: list[str] = []
    pending = list(arguments)
    while pending:
        name, equals, value = pending.pop(0).partition("=")
        if name not in ("--config", *known):
            rest.append(name + equals + value)
            continue
        if not equals:
            if not pending or pending[0].startswith("--"):
                raise ConfigError([Problem("expected a value after it", origin=f"option {name}")])
            value = pending.pop(0)
        if name == "--config":
            files.append(value)
        else:
            options[name] = value
    return files, options, rest


def exit_with(error: Exception, code: int = EXIT_CONFIG) -> NoReturn:
    print(redact(f"newcompute: {error}"), file=sys.stderr, flush=True)
    raise SystemExit(code)
