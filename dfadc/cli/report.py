"""`dfadc report`: rebuilds the report of a run's last verification from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfadc.cli import options  # noqa: TC001 -- typer reads annotations at run time
from dfadc.cli.console import print_report, say


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the last verification of RUN and write report.html, .md and .json anew from its folder."""
    from dfadc.pipeline.report import NOT_WRITTEN, rebuild_report  # noqa: PLC0415 -- keeps `--help` light
    from dfadc.run_folder import open_run  # noqa: PLC0415

    folder = open_run(run)
    rebuilt = rebuild_report(folder)
    print_report(rebuilt, as_json=as_json, verbose=verbose)
    if not any(note.startswith(NOT_WRITTEN) for note in rebuilt.get("notes", ())):
        say(f"report: {folder.report_html}")
