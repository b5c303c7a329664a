"""The command line: one module per command, registered here.

To add the command `vlmfast NAME`: write `vlmfast/cli/NAME.py` (dashes become underscores) with a function of the same
name whose parameters are typer options, and put the name into `COMMANDS`. A name without a module is not registered.
A command raises `UserError` for bad input: it becomes one line on stderr and exit code 2. Modules import heavy
things (torch, transformers) inside their function only, so that `vlmfast --help` stays quick. Shared options and
media reading are in `options`, printing and progress in `console`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

COMMANDS = (
    "demo",
    "ask",
    "check",
    "methods",
    "stream",
    "heads",
    "calibrate",
    "tune",
    "roofline",
    "page",
    "serve",
)


def build() -> typer.Typer:
    """The application with every command whose module exists."""
    app = typer.Typer(
        name="vlmfast",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in COMMANDS:
        module = f"{__name__}.{name.replace('-', '_')}"
        if importlib.util.find_spec(module) is not None:
            function = getattr(importlib.import_module(module), name.replace("-", "_"))
            app.command(name)(guarded(function))
    return app


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Bad input ends in one line on stderr and exit code 2, never in a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from vlmfast.core import UserError

        try:
            return command(*args, **kwargs)
        except UserError as e:
            print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
            raise typer.Exit(2) from None

    return run


def _version(value: bool) -> None:
    if value:
        from vlmfast import __version__

        print(f"vlmfast {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Faster inference for multimodal and video LLMs on unmodified transformers models."""


def main() -> None:
    """Entry point of the `vlmfast` script."""
    build()()
