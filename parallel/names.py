"""One name per parameter, whatever wraps it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

LEARNED = "transforms."
"""Begins the names of what hardware effects learn and track."""
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")
_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original$")
_LEARNED = re.compile(r"^(.*?)\.(?:parametrizations\.weight|input_effects)\.\d+\.range_([a-z]+)(\d*)\.(log_range)$")
_OF_EFFECT = re.compile(r"parametrizations\.\w+\.\d+\.(\w+)$")


def clean_name(name: str) -> str:
    """The name a parameter has in the bare model: compile, checkpoint and parametrization prefixes removed.

    A parameter of an effect on a weight, such as an adapter's, stands beside that weight; what a hardware effect learns has
    a name of its own, beginning with "transforms.".
    """
    name = _WRAPPERS.sub("", name)
    if learned := _LEARNED.fullmatch(name):
        return LEARNED + ".".join(filter(None, learned.groups()))
    return _OF_EFFECT.sub(r"\1", _PARAMETRIZED.sub(r"\1", name))


def named_parameters(*parts: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(clean name, parameter) for every parameter of a model, or of its stages here, once; a tied one under its first name."""
    for part in parts:
        for name, parameter in part.named_parameters():
            yield clean_name(name), parameter
