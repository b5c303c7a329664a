"""Errors of the command line: every one is a single line on stderr, with exit code 2.

`guarded` wraps a command, `Commands` and `Command` say typer's own errors in one line too, `application` makes the
program of one function, which the evaluation commands run.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

TRACE = "VLMFAST_TRACEBACK"  # set in the environment: a fault of vlmfast itself is shown with its traceback
MOST = 600  # characters of an error line
USAGE: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def say(text: str) -> None:
    """Print an error as one line on stderr."""
    from vlmfast.core import brief

    printable = "".join(
        character if character.isprintable() else " " if character.isspace() else ascii(character)[1:-1]
        for character in text
    )
    print(f"error: {brief(printable, MOST)}", file=sys.stderr)


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, its errors said in one line on stderr and ended with exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from vlmfast.core import UserError

        try:
            for option_name, option_value in kwargs.items():
                _check(option_name, option_value)
            return command(*args, **kwargs)
        except UserError as error:
            say(str(error))
        except UnicodeError as error:
            say(f"what was read is not UTF-8 text ({error})")
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone: typer ends quietly
                raise
            say(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        except typer.Exit:
            raise
        except Exception as error:
            if type(error).__name__ in ("Abort", "Exit") or isinstance(error, USAGE) or os.environ.get(TRACE):
                raise
            say(
                f"{type(error).__name__}: {error} (a fault of vlmfast itself: {TRACE}=1 in the environment shows where)"
            )
        raise typer.Exit(2)

    return run


def _check(option_name: str, option_value: Any) -> None:
    """Refuse what no command can use: numbers that are not finite, text that is not UTF-8."""
    from vlmfast.core import UserError

    for single_value in option_value if isinstance(option_value, (list, tuple)) else (option_value,):
        if isinstance(single_value, float) and not math.isfinite(single_value):
            raise UserError(f"--{option_name.strip('_').replace('_', '-')} {single_value}: give a finite number")
        if isinstance(single_value, str) and any(0xD800 <= ord(character) < 0xE000 for character in single_value):
            raise UserError(f"{option_name}: {ascii(single_value)[:80]} is not UTF-8 text")


class _OneLine:
    """What typer itself refuses (options, arguments, numbers out of range), in one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        parent: Any = super()
        if not standalone_mode:
            return parent.main(*args, standalone_mode=False, **kwargs)
        try:
            sys.exit(parent.main(*args, standalone_mode=False, **kwargs) or 0)
        except USAGE as error:
            command_path = getattr(getattr(error, "ctx", None), "command_path", "")
            say(error.format_message().rstrip(". ") + (f"; see {command_path} --help" if command_path else ""))
            sys.exit(2)
        except typer.Abort:
            print("stopped", file=sys.stderr)
            sys.exit(1)


class Commands(_OneLine, TyperGroup):
    """A program of several commands."""


class Command(_OneLine, TyperCommand):
    """A program of one command."""


def application(command: Callable[..., Any]) -> typer.Typer:
    """The program that is this one function."""
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command(cls=Command)(guarded(command))
    return program
