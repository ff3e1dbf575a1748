"""`dfadc doctor`: backends that can build and run here, and how to install the others."""

from __future__ import annotations

from typing import Annotated

import typer

from dfadc.cli import options  # noqa: TC001 -- typer reads annotations at run time
from dfadc.cli.console import print_json
from dfadc.cli.tables import print_table


def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="Backend that must build here, NAME:run that must run here, cuda or bf16; exit 4 if it is missing."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show which backends can build and run here, and how to install the missing ones."""
    from dfadc.pipeline.doctor import diagnose  # noqa: PLC0415 -- keeps `--help` light

    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        rows = [
            (
                name,
                _yes(backend.can_build),
                _yes(backend.can_run),
                backend.version or "–",
                backend.reason,
                backend.install,
            )
            for name, backend in diagnosis.backends.items()
        ]
        print_table(("backend", "builds", "runs", "version", "reason", "install"), rows)
        training = [(name, _yes(finding.available), finding.detail) for name, finding in diagnosis.training.items()]
        print_table(("training", "here", "detail"), training)
    diagnosis.require(require or [])


def _yes(value: bool) -> str:
    return "yes" if value else "no"
