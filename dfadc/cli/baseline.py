"""`dfadc baseline`: freezes the predictions that a later run or export is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfadc.cli import options  # noqa: TC001 -- typer reads annotations at run time
from dfadc.cli.console import print_json, say
from dfadc.cli.tables import print_table


def baseline(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The baseline's file, .npz.")],
    data: options.Data = None,
    factory: options.Factory = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing baseline.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Freeze RUN's samples and the predictions of its student and artifacts, for `dfadc verify --baseline`."""
    from dfadc.pipeline.baseline import describe_frozen, write_baseline  # noqa: PLC0415 -- keeps `--help` light
    from dfadc.run_folder import open_run  # noqa: PLC0415

    frozen = write_baseline(open_run(run), out, data=data, force=force, factories=factory or ())
    described = describe_frozen(frozen)
    for name, reason in frozen.left_out.items():
        say(f"not in the baseline: {name}: {reason}", quiet=quiet)
    for note in frozen.notes:
        say(f"note: {note}", quiet=quiet)
    if as_json:
        print_json(described)
    else:
        rows = [
            (name, *("–" if rates[rate] is None else f"{rates[rate]:.2%}" for rate in ("agreement", "accuracy")))
            for name, rates in described["networks"].items()
        ]
        source = ", ".join(described["gated_sources"]) or "none"
        print_table(("network", f"agreement with teacher (source {source})", "accuracy"), rows)
    say(f"baseline: {out}", quiet=quiet)
