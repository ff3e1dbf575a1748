"""`dfadc verify`: agreement of each artifact with teacher and student, and the gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dfadc.cli import options
from dfadc.cli.ci import ci_outputs
from dfadc.cli.console import print_report
from dfadc.errors import DfadcError

_ARTIFACT = "One artifact"


#: Precision whose limits of comparison A count.
Precision = Literal["fp32", "fp16", "int8"]
Samples = Annotated[
    Path | None,
    typer.Option(help="Frozen samples of a run, to verify an artifact without the run.", rich_help_panel=_ARTIFACT),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Recipe whose gates count; by default recipe.toml beside the samples, else auto.",
        rich_help_panel=_ARTIFACT,
    ),
]
JudgedPrecision = Annotated[
    Precision | None,
    typer.Option(
        "--precision", help="Precision it is judged as; by default that of its metadata.", rich_help_panel=_ARTIFACT
    ),
]


def verify(  # noqa: PLR0913, PLR0917 -- the signature is the command line
    target: Annotated[Path, typer.Argument(help="Run folder, or one artifact with --samples.")],
    samples: Samples = None,
    recipe: RecipeName = None,
    precision: JudgedPrecision = None,
    data: options.Data = None,
    assign: options.SetGate = None,
    min_agreement: options.MinAgreement = None,
    min_accuracy: options.MinAccuracy = None,
    baseline: options.Baseline = None,
    max_drop: options.MaxDrop = None,
    require: options.Require = None,
    trust_teacher: options.TrustTeacher = False,
    factory: options.Factory = None,
    junit: options.Junit = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Verify every artifact of a run, or one artifact, on the frozen samples."""
    with ci_outputs(junit) as publish:
        from dfadc.pipeline.verify import VerifySettings, verify_file, verify_run  # noqa: PLC0415
        from dfadc.run_folder import open_run  # noqa: PLC0415

        gates = options.gates(
            min_agreement=min_agreement, min_accuracy=min_accuracy, max_drop=max_drop, data=data, baseline=baseline
        )
        settings = VerifySettings(
            data=data,
            baseline=baseline,
            gates=[*(assign or []), *gates],
            required=require or [],
            trust_teacher=trust_teacher,
            factories=factory or (),
        )
        if target.is_dir():
            of_artifact = {"--samples": samples, "--recipe": recipe, "--precision": precision}
            if passed := [flag for flag, value in of_artifact.items() if value is not None]:
                hint = f"leave {passed[0]} away"
                raise DfadcError(f"{', '.join(passed)} goes with an artifact; a run has its own", hint)
            report = verify_run(open_run(target), settings)
        else:
            if samples is None:
                raise DfadcError(f"{target} is no run folder", "for one artifact, pass --samples samples.npz")
            for flag, is_set in (("--trust-teacher", trust_teacher), ("--factory", factory)):
                if is_set:
                    raise DfadcError(
                        f"{flag} goes with a run; one artifact is verified without its teacher", "leave it away"
                    )
            report = verify_file(target, samples, settings, recipe=recipe, precision=precision or "")
        publish(report)
        print_report(report, as_json=as_json, verbose=verbose)
    raise typer.Exit(report["exit_code"])
