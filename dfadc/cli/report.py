"""`dfadc report`: the last verification of a run, rebuilt from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfadc.cli.console import print_report
from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from dfadc.cli import options


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the last verification of RUN and write report.md anew from report.json."""
    from dfadc.run import open_run  # noqa: PLC0415 -- keeps `--help` light
    from dfadc.storage import atomic_write_text  # noqa: PLC0415
    from dfadc.verification.report import render_markdown  # noqa: PLC0415

    folder = open_run(run)
    try:
        saved = json.loads(folder.report_json.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise DfadcError(f"cannot read {folder.report_json}: {exc}", f"make it: dfadc verify {run}") from exc
    atomic_write_text(folder.report_md, render_markdown(saved))
    print_report(saved, as_json=as_json, verbose=verbose)
