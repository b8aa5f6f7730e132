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
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any, NoReturn

import tomli
import tomli_w
from pydantic import BaseModel, ValidationError

from train.config import Config
from train.redaction import redact
from transforms.specs import KINDS, BitflipSpec, CellFaults, LoraSpec, OpticalSpec, Quantised, QuantiseSpec

EXIT_CONFIG = 2
ONE_OF = [("training.steps", "training.tokens", "training.tokens_per_parameter")]
"""Keys that say the same thing in different ways: one source may set only one, and a later source replaces it."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration."""

    message: str
    key: str = ""
    value: Any = None
    origin: str = ""

    def __str__(self) -> str:
        where = f"{self.origin}: " if self.origin else ""
        what = f"{self.key} = {show_value(self.value)}" if self.key and self.value is not None else self.key
        head = f"{where}{what}".rstrip(": ")
        return f"  {head}\n      {self.message}" if head else f"  {self.message}"


class ConfigError(Exception):
    """All problems of a configuration; `str()` is the report for the user."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(redact(f"{count} in the configuration:\n\n" + "\n\n".join(map(str, self.problems))))


@dataclass
class Sources:
    """Merged values, and for every dotted key the file or flag that set it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def origin(self, key: str) -> str:
        """The source of a key, of all that is below it, or of the nearest table around it."""
        below = dict.fromkeys(origin for name, origin in self.origins.items() if name.startswith(key + "."))
        found = self.origins.get(key) or ", ".join(below)
        while key and not found:
            key = key.rpartition(".")[0]
            found = self.origins.get(key, "")
        return found

    def get(self, key: str) -> Any:
        value: Any = self.values
        for part in key.split("."):
            if isinstance(value, list):
                value = value[int(part)] if part.isdigit() and int(part) < len(value) else None
            else:
                value = value.get(part) if isinstance(value, dict) else None
        return value

    def set(self, key: str, value: Any, origin: str) -> None:
        """Set one leaf; arrays of tables append, and an explicit empty array clears."""
        table = self.values
        *parents, last = key.split(".")
        for part in parents:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                self.problems.append(
                    Problem(f'"{part}" is a value elsewhere, so it cannot be a table', key, value, origin)
                )
                return
        if value == {} and isinstance(table.get(last), dict):
            return  # an empty section says nothing
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            earlier = table.get(last)
            offset = len(earlier) if isinstance(earlier, list) else 0
            table[last] = [*(earlier if isinstance(earlier, list) else []), *value]
            self.origins.update({f"{key}.{offset + i}": origin for i in range(len(value))})
        else:
            table[last] = value
        self.origins[key] = origin

    def remove(self, key: str) -> None:
        parent = self.get(key.rpartition(".")[0]) if "." in key else self.values
        last = key.rpartition(".")[2]
        if isinstance(parent, dict):
            parent.pop(last, None)
        elif isinstance(parent, list) and key.split(".")[-2] == "sources" and last.isdigit():
            parent[int(last)] = {}  # its place keeps the numbers of the others
        elif isinstance(parent, list) and key.split(".")[-2] == "transforms" and last.isdigit():
            parent[int(last)] = {"kind": "bitflip", "weight": {}}
        elif isinstance(parent, list):
            self.remove(key.rpartition(".")[0])

    def add_layer(self, leaves: list[tuple[str, Any]], origin_of: dict[str, str]) -> None:
        names = {key for key, _ in leaves}
        for group in ONE_OF:
            given = [key for key in group if key in names]
            if len(given) > 1:
                both = " and ".join(given)
                self.problems.append(Problem(f"{both} say the same thing: give one", origin=origin_of[given[0]]))
            for key in group:
                if given and key not in given:
                    self.remove(key)
        for key, value in leaves:
            self.set(key, value, origin_of[key])


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
    for problem in cross_checks(config, world_size):
        if not any(key == problem.key or key.startswith(problem.key + ".") for key in broken):
            origin = problem.origin or sources.origin(problem.key)
            sources.problems.append(Problem(problem.message, problem.key, problem.value, origin))
    if sources.problems:
        raise ConfigError(sources.problems)
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
        content = tomli.loads(Path(path).read_text(encoding="utf-8"))
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
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse_flags(flags: Sequence[str], problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """`--a.b value`, `--a.b=value`, and a bare `--a.b` for true."""
    pending = list(flags)
    while pending:
        flag = pending.pop(0)
        if not flag.startswith("--") or len(flag) < 3:
            problems.append(Problem("expected a flag like --training.steps 100", origin=f"argument {flag}"))
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
    """Read as TOML, unless the field is a string."""
    if _field_type(key) is str:
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


def show_value(value: Any) -> str:
    """A value as TOML has it, shortened where it is long."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
