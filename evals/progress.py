"""How far an evaluation is: a bar on standard error where that is a terminal, and nothing in a pipe or a log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import nn


@contextmanager
def bar(label: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """A bar for `total` units of work, gone when it is left; gives the function that adds units done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda units: None
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    # Standard output is left alone: it may be a pipe, and a bar on a terminal must not take its lines.
    with Progress(
        *columns,
        console=console,
        transient=True,
        refresh_per_second=2,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as shown:
        task = shown.add_task(label, total=total)
        yield lambda units: shown.advance(task, units)


@contextmanager
def forwards(model: nn.Module, label: str, total: Callable[[], int]) -> Iterator[None]:
    """A bar that counts the tokens that a model reads.

    Args:
        total: gives how many it will read; asked only where there is a bar.
    """
    if not Console(stderr=True).is_terminal:
        yield
        return
    with bar(label, total()) as advance:

        def count(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            advance(0 if ids is None else ids.numel())

        hook = model.register_forward_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def library_bars(label: str, *modules: Any) -> Iterator[None]:
    """Modules of a library that draw bars with `tqdm` draw ours inside, and none in a pipe."""
    opened: list[AbstractContextManager] = []

    class LibraryBar:
        """What these libraries use of tqdm."""

        def __init__(
            self,
            iterable: Iterable | None = None,
            desc: str | None = None,
            total: float | None = None,
            disable: bool = False,
            **_: Any,
        ):
            known = len(iterable) if total is None and isinstance(iterable, Sized) else total
            self._items = iterable
            self._bar = (
                nullcontext(lambda units: None) if disable else bar(f"{label}: {desc}" if desc else label, known)
            )
            self.update = self._bar.__enter__()
            opened.append(self._bar)

        def __iter__(self) -> Iterator[Any]:
            for item in self._items or ():
                yield item
                self.update(1)
            self.close()

        def close(self) -> None:
            if self._bar in opened:
                opened.remove(self._bar)
                self._bar.__exit__(None, None, None)

    usual = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = LibraryBar
    try:
        yield
    finally:
        for module, tqdm in zip(modules, usual):
            module.tqdm = tqdm
        for left in opened:
            left.__exit__(None, None, None)
