"""Tables on a terminal and in a pipe: names wrap where room is short, numbers never do."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

SHORTEST_NAME = 10
"""Columns that a name has at least, or its length if it is shorter."""


class ResultTable:
    """Rows of names, which may be broken anywhere, and of numbers, which are broken between words only ("1.25 ± 0.50").

    A pipe gets each column at full width whatever COLUMNS says, without colours. On a terminal that is too narrow the
    headings wrap first, then the names, then numbers with a spread; what still does not fit makes the table wider than
    the terminal rather than a number shorter.
    """

    def __init__(self, title: str, names: Sequence[str], numbers: Sequence[str]):
        self.title = title
        self.headings = [*names, *numbers]
        self.num_names = len(names)
        self.rows: list[list[str]] = []

    def add(self, *cells: str) -> None:
        assert len(cells) == len(self.headings), (cells, self.headings)
        self.rows.append(list(cells))

    def print(self) -> None:
        console = Console()
        widths = self.widths(console.width if console.is_terminal else None)
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
        for place, (heading, width) in enumerate(zip(self.headings, widths)):
            name = place < self.num_names
            table.add_column(heading, width=width, overflow="fold", justify="left" if name else "right")
        for row in self.rows:
            table.add_row(*row)
        # Drawn aside: a console cuts off what is wider than its terminal.
        drawn = io.StringIO()
        room = _borders(len(widths)) + sum(widths)
        Console(file=drawn, width=room, force_terminal=console.is_terminal, no_color=True).print(table, markup=False)
        lines = [line.rstrip() for line in drawn.getvalue().splitlines()]
        print("\n".join(["", self.title, "", *lines]), flush=True)

    def widths(self, room: int | None) -> list[int]:
        """The width of every column, for a terminal of `room` columns; None is a pipe."""
        columns = [[heading, *(row[i] for row in self.rows)] for i, heading in enumerate(self.headings)]
        names, numbers = columns[: self.num_names], columns[self.num_names :]
        whole = [max(map(cell_len, cells)) for cells in columns]
        if room is None or _borders(len(columns)) + sum(whole) <= room:
            return whole
        room -= _borders(len(columns))
        wide = whole[: self.num_names]
        least = [min(width, SHORTEST_NAME) for width in wide]
        unbroken = [max(_longest_word(cells[:1]), *map(cell_len, cells[1:])) for cells in numbers]
        kept = unbroken if sum(unbroken) + sum(least) <= room else [_longest_word(cells) for cells in numbers]
        while sum(wide) + sum(kept) > room and any(w > m for w, m in zip(wide, least)):
            widest = max((i for i in range(len(names)) if wide[i] > least[i]), key=lambda i: wide[i])
            wide[widest] -= 1
        return [*wide, *kept]


def _borders(columns: int) -> int:
    """What the space between columns takes of a row."""
    return 3 * (columns - 1)


def _longest_word(cells: Sequence[str]) -> int:
    return max((cell_len(word) for cell in cells for word in cell.split()), default=1)
