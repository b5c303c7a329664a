"""Printing and progress. Results go to stdout; progress and remarks to stderr, and only where somebody watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def out() -> Any:
    """A rich console on stdout."""
    from rich.console import Console

    return Console(highlight=False)


def remarks() -> Any:
    """A rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner on stderr while something long happens; nothing where stderr is not a terminal."""
    console = remarks()
    if not console.is_terminal:
        yield
        return
    with console.status(plain(text)):
        yield


@contextmanager
def counting(total: int) -> Iterator[Any]:
    """A progress bar on stderr of `total` steps: call what it yields with a line before each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = remarks()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        started = False

        def step(text: str) -> None:
            nonlocal started
            bar.update(task, description=plain(text), advance=1 if started else 0)
            started = True

        yield step


def plain(text: object) -> str:
    """Text from elsewhere (names, answers, errors) for a markup string: its brackets are printed as they are."""
    from rich.markup import escape

    return escape(str(text))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", console: Any = None) -> None:
    """Print a table that loses nothing in a narrow terminal: what does not fit beside each other comes below it.

    heads, rows: markup strings, lines within a cell apart by a newline; the first column names the row, is repeated in
    every part and may wrap, the others are numbers.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console, rows = console or out(), [list(row) for row in rows]

    def width(column: int) -> int:
        cells = [heads[column], *(row[column] for row in rows)]
        return 2 + max((len(line) for cell in cells for line in Text.from_markup(cell).plain.split("\n")), default=0)

    widths = [width(column) for column in range(len(heads))]
    room = console.width - sum(widths[1:])
    first = min(widths[0], room if room >= 18 else max(18, console.width // 3))
    parts: list[list[int]] = [[]]
    for column in range(1, len(heads)):
        if parts[-1] and first + sum(widths[c] for c in parts[-1]) + widths[column] > console.width:
            parts.append([])
        parts[-1].append(column)
    for number, part in enumerate(parts):
        shown = Table(title=title if not number else "", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        shown.padding, shown.pad_edge = (0, 1, 0, 0), False
        shown.add_column(heads[0], overflow="fold", max_width=first - 2)
        for column in part:
            shown.add_column(heads[column], justify="right", overflow="fold")
        for row in rows:
            shown.add_row(row[0], *(row[column] for column in part))
        console.print(shown)
