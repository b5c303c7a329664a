"""Printing and progress. Results go to stdout; progress and remarks to stderr, and only where somebody watches."""

from __future__ import annotations

from collections.abc import Iterator
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
    with console.status(text):
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
            bar.update(task, description=text, advance=1 if started else 0)
            started = True

        yield step
