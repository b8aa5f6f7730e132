"""Values of several sources merged into one table, each with where it came from, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from train.redaction import redact

ARRAYS = ("transforms", "data.sources")
"""Arrays of tables; one table alone may be written as a table."""
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
        what = f"{self.key} = {show(self.value)}" if self.key and self.value is not None else self.key
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
    layers: dict[str, int] = field(default_factory=dict)
    """For every dotted key the number of the file, or of the flags behind them, that set it last."""
    problems: list[Problem] = field(default_factory=list)

    def origin(self, key: str) -> str:
        """The source of a key, of all that is below it, or of the nearest table around it."""
        below = dict.fromkeys(origin for name, origin in self.origins.items() if name.startswith(key + "."))
        found = self.origins.get(key) or ", ".join(below)
        while key and not found:
            key = key.rpartition(".")[0]
            found = self.origins.get(key, "")
        return found

    def superseded(self, key: str, deciders: Sequence[str]) -> bool:
        """Whether one of the keys that decide about `key` was set by a later source."""
        below = [layer for name, layer in self.layers.items() if name.startswith(f"{key}.")]
        return max([self._layer(key), *below]) < max(map(self._layer, deciders), default=0)

    def _layer(self, key: str) -> int:
        while key and key not in self.layers:
            key = key.rpartition(".")[0]
        return self.layers.get(key, 0)

    def get(self, key: str) -> Any:
        value: Any = self.values
        for part in key.split("."):
            if isinstance(value, list):
                value = value[int(part)] if part.isdigit() and int(part) < len(value) else None
            else:
                value = value.get(part) if isinstance(value, dict) else None
        return value

    def set(self, key: str, value: Any, origin: str) -> None:
        """Set one leaf; arrays of tables append, and an explicit empty array clears. A number means a table of an array."""
        table: Any = self.values
        *parents, last = key.split(".")
        for i, part in enumerate(parents):
            if isinstance(table, list):
                where, count = ".".join(parents[:i]), len(table)
                if not part.isdigit() or int(part) > count:
                    there = {0: "no table", 1: "one table, number 0"}.get(count, f"tables 0 to {count - 1}")
                    message = f"{where} has {there}: expected a number there, as in {where}.0.{last}"
                    self.problems.append(Problem(message, key, value, origin))
                    return
                if int(part) == count:
                    table.append({})
                table = table[int(part)]
            else:
                begins_array = ".".join(parents[: i + 1]) in ARRAYS and ".".join(parents[i + 1 : i + 2]) == "0"
                table = table.setdefault(part, [] if begins_array else {})
            if not isinstance(table, dict | list):
                self.problems.append(
                    Problem(f'"{part}" is a value elsewhere, so it cannot be a table', key, value, origin)
                )
                return
        if isinstance(table, list):
            where = ".".join(parents)
            self.problems.append(
                Problem(f"{where} is an array of tables: name one by its number, {where}.0.{last}", key, value, origin)
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
        layer = max(self.layers.values(), default=0) + 1
        for key, value in leaves:
            self.set(key, value, origin_of[key])
            self.layers[key] = layer


def show(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
