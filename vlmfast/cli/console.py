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
def waiting(message: str) -> Iterator[None]:
    """A spinner on stderr while something long happens; nothing where stderr is not a terminal."""
    console = remarks()
    if not console.is_terminal:
        yield
        return
    with console.status(plain(message)):
        yield


@contextmanager
def counting(num_steps: int) -> Iterator[Any]:
    """A progress bar on stderr of `total` steps: call what it yields with a line before each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = remarks()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task_id = bar.add_task("", total=num_steps)
        started = False

        def step(message: str) -> None:
            nonlocal started
            bar.update(task_id, description=plain(message), advance=1 if started else 0)
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

    console, rows = console or out(), [list(table_row) for table_row in rows]

    def width(column: int) -> int:
        cells = [heads[column], *(table_row[column] for table_row in rows)]
        return 2 + max((len(line) for cell in cells for line in Text.from_markup(cell).plain.split("\n")), default=0)

    widths = [width(column) for column in range(len(heads))]
    room_left = console.width - sum(widths[1:])
    first_width = min(widths[0], room_left if room_left >= 18 else max(18, console.width // 3))
    column_groups: list[list[int]] = [[]]
    for column in range(1, len(heads)):
        group_width = first_width + sum(widths[index] for index in column_groups[-1]) + widths[column]
        if column_groups[-1] and group_width > console.width:
            column_groups.append([])
        column_groups[-1].append(column)
    for number, part_columns in enumerate(column_groups):
        part_table = Table(
            title=title if not number else "", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
        )
        part_table.padding, part_table.pad_edge = (0, 1, 0, 0), False
        part_table.add_column(heads[0], overflow="fold", max_width=first_width - 2)
        for column in part_columns:
            part_table.add_column(heads[column], justify="right", overflow="fold")
        for table_row in rows:
            part_table.add_row(table_row[0], *(table_row[column] for column in part_columns))
        console.print(part_table)
