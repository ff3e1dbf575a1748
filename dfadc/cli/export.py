"""`dfadc export`: more artifacts from a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfadc.cli import options  # noqa: TC001 -- typer reads annotations at run time
from dfadc.cli.console import print_json, print_table


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    exports: Annotated[
        list[str] | None, typer.Option("--export", "-e", help="NAME[:PRECISION[:PRESET]] (repeatable).")
    ] = None,
    embed_normalisation: Annotated[
        bool, typer.Option("--embed-normalisation", help="Artifacts take pixels in [0,1].")
    ] = False,
    embed_softmax: Annotated[bool, typer.Option("--embed-softmax", help="Artifacts answer probabilities.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Export the finished student of RUN."""
    from dfadc.api.export import export_student  # noqa: PLC0415 -- keeps `--help` light
    from dfadc.run import open_run  # noqa: PLC0415

    results = export_student(
        open_run(run), exports or ["onnx"], embed_normalisation=embed_normalisation, embed_softmax=embed_softmax
    )
    if as_json:
        print_json({r.path.name: {"sha256": r.sha256, "size_bytes": r.size_bytes} for r in results})
        return
    rows = [(r.path.name, r.effective_precision, f"{r.size_bytes / 1e6:.2f} MB", r.sha256[:12]) for r in results]
    print_table(("artifact", "precision", "size", "sha256"), rows)
