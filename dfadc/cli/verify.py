"""`dfadc verify`: agreement of each artifact with teacher and student, and the gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfadc.cli import options  # noqa: TC001 -- typer reads annotations at run time
from dfadc.cli.console import print_report
from dfadc.errors import DfadcError


def verify(
    target: Annotated[Path, typer.Argument(help="Run folder, or one artifact with --samples.")],
    samples: Annotated[
        Path | None, typer.Option(help="Frozen samples of a run, to verify an artifact where the run is not.")
    ] = None,
    data: options.Data = None,
    min_agreement: options.MinAgreement = None,
    require: options.Require = None,
    trust_teacher: options.TrustTeacher = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Verify every artifact of a run, or one artifact, on the frozen samples."""
    from dfadc.api.verify import VerifySettings, verify_file, verify_run  # noqa: PLC0415 -- keeps `--help` light
    from dfadc.run import open_run  # noqa: PLC0415

    settings = VerifySettings(
        data=data, min_agreement=min_agreement, required=require or [], trust_teacher=trust_teacher
    )
    if target.is_dir():
        if samples is not None:
            raise DfadcError("--samples goes with an artifact; a run has its own", "leave --samples away")
        report = verify_run(open_run(target), settings)
    elif samples is None:
        raise DfadcError(f"{target} is no run folder", "for one artifact, pass --samples samples.npz")
    else:
        report = verify_file(target, samples, settings)
    print_report(report, as_json=as_json, verbose=verbose)
    raise typer.Exit(report["exit_code"])
