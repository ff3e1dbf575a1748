"""`dfadc doctor`: what can be built and run here, and how to get the rest."""

from __future__ import annotations

from typing import Annotated

import typer

from dfadc.cli import options  # noqa: TC001 -- typer reads annotations at run time
from dfadc.cli.console import print_json
from dfadc.cli.tables import print_table


def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(help="Backend that must build here, NAME:run that must run here, cuda or bf16: else exit 4."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show which backends can build and run here, and how to get the missing ones."""
    from dfadc.pipeline.doctor import diagnose  # noqa: PLC0415 -- keeps `--help` light

    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        rows = [
            (name, _yes(found.can_build), _yes(found.can_run), found.version or "–", found.reason, found.install)
            for name, found in diagnosis.backends.items()
        ]
        print_table(("backend", "builds", "runs", "version", "reason", "install"), rows)
        training = [(name, _yes(found.available), found.detail) for name, found in diagnosis.training.items()]
        print_table(("training", "here", "detail"), training)
    diagnosis.require(require or [])


def _yes(value: bool) -> str:
    return "yes" if value else "no"
