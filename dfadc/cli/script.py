"""Reporting of errors that a user can correct, for commands and example scripts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Callable


def run_as_script(main: Callable[..., Any]) -> None:
    """Runs a function as a program of its own, with the command line's arguments as typer reads them."""
    try:
        typer.run(main)
    except DfadcError as exc:
        print_error(exc)
        sys.exit(exc.exit_code)


def print_error(error: DfadcError) -> None:
    """Prints an error and its remedy on stderr."""
    typer.echo(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        typer.echo(f"hint: {error.hint}", file=sys.stderr)
