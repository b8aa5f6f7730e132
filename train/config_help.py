"""The help pages of the configuration: its sections, the keys of one of them, one key. Made from the schema; torch-free.

`--help` lists the sections, `--help SECTION` the keys of one, and `--help SECTION.KEY` explains that key. The kinds of
`[[transforms]]` tables are sections of their own: `--help transforms.optical`.
"""

from __future__ import annotations

import difflib
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from train.config import Config, SourceConfig
from train.config_effect import ACTS
from train.config_merge import show
from train.config_sources import ConfigError, Problem
from transforms.specs import BitflipSpec, LoraSpec, OpticalSpec, QuantiseSpec

SECTIONS = {
    "run": "name and folder of the run, seed, device",
    "model": "architecture, size, initial weights",
    "tokenizer": "what turns text into token ids",
    "data": "the text: files, the Hub, mixtures of sources, streaming",
    "training": "length, batch, sequence length, gradient clipping",
    "optimizer": "AdamW or Muon, learning rate, weight decay",
    "schedule": "warm-up and shape of the learning rate",
    "parallel": "how processes share the work: FSDP, tensor, context and pipeline parallelism",
    "precision": "number formats of matrix products and of gradient sums",
    "float8": "float8 matrix products of the training itself",
    "compile": "torch.compile and CUDA graphs",
    "activation_checkpointing": "keep activations or compute them again",
    "checkpoint": "how often to save, where, and what to go on from",
    "faults": "hangs, slow processes, values that are not finite, loss spikes",
    "validation": "how often to evaluate held-out text",
    "noise": "seed, groups and warm-up of the hardware effects",
    "transforms": "hardware effects on layers: bit errors, few bits, optical products; LoRA",
    "robust": "weight clipping against hardware effects",
    "distillation": "learning from a trained teacher beside the text",
    "metrics": "the log: interval, W&B, TensorBoard",
    "profiling": "traces of steps, memory snapshots",
}
"""What each section is about, in the order in which the sections are listed."""

KINDS: dict[str, type[BaseModel]] = {
    "bitflip": BitflipSpec,
    "quantise": QuantiseSpec,
    "optical": OpticalSpec,
    "lora": LoraSpec,
}

EXAMPLE = "python train/main.py --config configs/quickstart.toml --training.steps 100"


def asked_for_help(arguments: Sequence[str]) -> str | None:
    """The topic after `--help` or `-h` ("" for none), or None where there is no such flag."""
    for flag in ("--help", "-h"):
        if flag in arguments:
            following = arguments[arguments.index(flag) + 1 :]
            return following[0] if following and not following[0].startswith("-") else ""
    return None


def help_page(command: str, about: str, topic: str, example: str = EXAMPLE) -> str:
    """The page of a command that takes a configuration, or of the section or key that `topic` names.

    Args:
        command: as it is called, for the lines that say how to ask further.
        about: what the command does and its own options.
        topic: "", or a section such as "training", "model.shape" or "transforms.optical", or a key in one.
        example: a whole command line.

    Raises:
        ConfigError: there is no such section or key; the nearest is named.
    """
    if topic:
        return "\n".join(_topic(topic.strip("[]").removeprefix("--"), command))
    width = max(map(len, SECTIONS))
    lines = [about.strip(), "", "Example:", textwrap.indent(example, "  "), ""]
    lines += ["  --config FILE.toml      settings of a file; repeatable, later files win"]
    lines += ["  --SECTION.KEY VALUE     one setting; wins over files", ""]
    lines += [f"Sections ({command} --help SECTION lists the keys of one):"]
    for name, text in SECTIONS.items():
        lines += _wrapped(f"  {name:{width}}  ", text)
    return "\n".join(lines)


def _topic(topic: str, command: str) -> Iterator[str]:
    if topic == "transforms":
        yield from _transforms(command)
        return
    tables = dict(_tables(Config)) | {f"transforms.{kind}": model for kind, model in KINDS.items()}
    if topic in tables:
        yield from _table(topic, tables[topic])
        return
    section, _, key = topic.rpartition(".")
    if section in tables and key in tables[section].model_fields:
        yield from _key(section, key, tables[section].model_fields[key])
        return
    keys = [f"{name}.{key}" for name, model in tables.items() for key in model.model_fields]
    close = difflib.get_close_matches(topic, [*SECTIONS, *tables, *keys], n=1, cutoff=0.5)
    nearest = f"; did you mean {close[0]}?" if close else ""
    sections = textwrap.fill(f"sections: {', '.join(SECTIONS)}", 74).replace("\n", "\n      ")
    problem = f"no such section or key{nearest}\n      {sections}"
    raise ConfigError([Problem(problem, origin=f"--help {topic}")])


def _tables(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted name, class) of every table of the schema, arrays of tables included."""
    for name, field in model.model_fields.items():
        table = _table_of(field.annotation)
        if table is not None:
            yield f"{prefix}{name}", table
            yield from _tables(table, f"{prefix}{name}.")


def _table_of(annotation: Any) -> type[BaseModel] | None:
    """The class of a key that holds a table, perhaps an optional one, or an array of tables."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list) and len(inner) == 1:
        return _table_of(inner[0])
    return None


def _table(name: str, model: type[BaseModel], title: str = "") -> Iterator[str]:
    """The keys of a table, then those of the tables in it, each class once."""
    is_transform = name.startswith("transforms.")
    header = "[[transforms]]" if is_transform else f"[[{name}]]" if name == "data.sources" else f"[{name}]"
    about = model.__doc__ if is_transform else SECTIONS.get(name, title)
    yield from _wrapped("", f"{header}  {' '.join((about or '').split())}")
    if is_transform and name.count(".") == 1:
        yield f'  kind = "{name.rpartition(".")[2]}"'
    inner: dict[type[BaseModel], list[str]] = {}
    for key, field in model.model_fields.items():
        table = _table_of(field.annotation)
        if table is not None:
            inner.setdefault(table, []).append(key)
        if not (is_transform and key == "kind"):
            yield from _key(name, key, field)
    for table, keys in inner.items():
        yield ""
        if table is SourceConfig:
            yield from _wrapped(
                "", "[[data.sources]]  one table for each source, with the keys of [data] from source to weight"
            )
        elif is_transform:
            yield f"Keys of the tables {', '.join(keys)}:"
            for key, field in table.model_fields.items():
                yield from _key(f"{name}.{keys[0]}", key, field)
        else:
            yield from _table(f"{name}.{keys[0]}", table, model.model_fields[keys[0]].description or "")


def _key(section: str, key: str, field: FieldInfo) -> Iterator[str]:
    name = key if section.startswith(("transforms.", "data.sources")) else f"--{section}.{key}"
    default = field.get_default(call_default_factory=True)
    shown = "" if default is None or field.is_required() or isinstance(default, BaseModel) else show(default)
    needed = "  (required)" if field.is_required() else ""
    yield f"  {name} {type_name(field.annotation)}{f'  (default {shown})' if shown else needed}"
    when = ACTS.get(f"{section}.{key}")
    remedy = f" ({when.remedy})" if when is not None and when.remedy else ""
    yield from _wrapped("      ", " ".join((field.description or "").split()) + remedy)


def _transforms(command: str) -> Iterator[str]:
    yield from _wrapped("", f"[[transforms]]  {SECTIONS['transforms']}. One table for each; they act in their order.")
    yield ""
    for kind, model in KINDS.items():
        yield from _wrapped(f'  kind = "{kind}"'.ljust(22), " ".join((model.__doc__ or "").split()))
    yield ""
    yield from _wrapped("", f"`{command} --help transforms.KIND` lists the keys of one kind. An example:")
    yield from ("", "  [[transforms]]", '  kind = "optical"', '  modules = ["*.mlp.*"]', "  levels = 256", "")
    yield "configs/transforms/ has files of such tables: --config configs/transforms/int8.toml"


def _wrapped(prefix: str, text: str) -> Iterator[str]:
    """Text after a prefix, further lines indented as far, within the terminal's width."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    indent = " " * min(len(prefix), 30)
    yield from textwrap.wrap(
        prefix + text,
        width,
        subsequent_indent=indent,
        drop_whitespace=True,
        break_long_words=False,
        break_on_hyphens=False,
    )


def type_name(annotation: Any) -> str:
    """What to write for a value of a type: its choices, or N, X, TEXT, true|false, ARRAY, TABLE."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if origin is typing.Annotated:
        return type_name(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return "|".join(type_name(part) for part in typing.get_args(annotation) if part is not type(None))
    if origin is list:
        return "ARRAY"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "TABLE"
    return {"int": "N", "float": "X", "str": "TEXT", "bool": "true|false"}.get(
        getattr(annotation, "__name__", ""), "VALUE"
    )
