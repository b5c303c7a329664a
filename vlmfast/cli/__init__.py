"""The command line: one module per command, registered here.

To add the command `vlmfast NAME`: write `vlmfast/cli/NAME.py` (dashes become underscores) with a function of the same
name whose parameters are typer options, and put the name into `COMMANDS`. A name without a module is not registered.
A command raises `UserError` for bad input: it becomes one line on stderr and exit code 2. Modules import heavy
things (torch, transformers) inside their function only, so that `vlmfast --help` stays quick. Shared options and
media reading are in `options`, printing and progress in `console`, errors in `errors`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated

import typer

from vlmfast.cli.errors import Commands, guarded

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
)


def build() -> typer.Typer:
    """The application with every command whose module exists."""
    application = typer.Typer(
        name="vlmfast",
        cls=Commands,
        invoke_without_command=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    application.callback()(_root)
    for name in COMMANDS:
        module_name = f"{__name__}.{name.replace('-', '_')}"
        if importlib.util.find_spec(module_name) is not None:
            function = getattr(importlib.import_module(module_name), name.replace("-", "_"))
            application.command(name)(guarded(function))
    return application


def _version(value: bool) -> None:
    if value:
        from vlmfast import __version__

        print(f"vlmfast {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Faster inference for multimodal and video LLMs on unmodified transformers models."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the `vlmfast` script."""
    build()()
