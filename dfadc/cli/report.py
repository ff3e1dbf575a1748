"""`dfadc report`: the last verification of a run, rebuilt from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dfadc.cli import options  # noqa: TC001 -- typer reads annotations at run time
from dfadc.cli.console import print_report
from dfadc.errors import DfadcError


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the last verification of RUN and write report.md anew from report.json."""
    from dfadc.run import open_run  # noqa: PLC0415 -- keeps `--help` light
    from dfadc.storage import atomic_write_text  # noqa: PLC0415
    from dfadc.verification.report import SCHEMA, render_markdown  # noqa: PLC0415

    folder = open_run(run)
    try:
        saved = json.loads(folder.report_json.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise DfadcError(f"cannot read {folder.report_json}: {exc}", f"make it: dfadc verify {run}") from exc
    schema = saved.get("schema") if isinstance(saved, dict) else None
    if schema != SCHEMA:
        raise DfadcError(
            f"{folder.report_json} has schema {schema!r}, this dfadc reads {SCHEMA!r}",
            f"make it anew: dfadc verify {run}",
        )
    atomic_write_text(folder.report_md, render_markdown(saved))
    print_report(saved, as_json=as_json, verbose=verbose)
