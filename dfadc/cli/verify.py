"""`dfadc verify`: agreement of each artifact with teacher and student, and the gates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from dfadc.cli import options
from dfadc.cli.ci import ci_outputs
from dfadc.cli.console import print_report
from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from dfadc.pipeline.verify import VerifySettings
    from dfadc.verification.report import Report

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
        from dfadc.pipeline.verify import VerifySettings  # noqa: PLC0415 -- keeps `--help` light

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
        report = _verify(target, settings, _ArtifactOptions(samples, recipe, precision))
        publish(report)
        print_report(report, as_json=as_json, verbose=verbose)
    raise typer.Exit(report["exit_code"])


class _ArtifactOptions(NamedTuple):
    """Options of a single artifact; a run records them itself."""

    samples: Path | None
    recipe: str | None
    precision: Precision | None


def _verify(target: Path, settings: VerifySettings, artifact: _ArtifactOptions) -> Report:
    from dfadc.pipeline.verify import verify_file, verify_run  # noqa: PLC0415
    from dfadc.run_folder import open_run  # noqa: PLC0415

    if target.is_dir():
        if passed := [f"--{name}" for name, value in artifact._asdict().items() if value is not None]:
            raise DfadcError(f"{', '.join(passed)} goes with an artifact; a run has its own", f"leave {passed[0]} away")
        return verify_run(open_run(target), settings)
    if artifact.samples is None:
        raise DfadcError(f"{target} is no run folder", "for one artifact, pass --samples samples.npz")
    for flag, is_set in (("--trust-teacher", settings.trust_teacher), ("--factory", settings.factories)):
        if is_set:
            raise DfadcError(f"{flag} goes with a run; one artifact is verified without its teacher", "leave it away")
    return verify_file(target, artifact.samples, settings, recipe=artifact.recipe, precision=artifact.precision or "")
