"""`dfadc distill`: the whole pipeline, from a teacher file to a verified run folder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from dfadc.cli import options
from dfadc.cli.ci import ci_outputs
from dfadc.cli.console import print_report, say
from dfadc.cli.distill_run import Exports, load_inputs, resume_run, show_plan, start
from dfadc.cli.export import run_exports
from dfadc.cli.script import print_error
from dfadc.errors import DfadcError

_RUN = "Run"
#: Flags that go with --resume; all others were decided when the run began.
_GOES_WITH_RESUME = {
    "teacher",
    "resume",
    "export",
    "keep_fp32",
    "trust_teacher",
    "factory",
    "data",
    "min_agreement",
    "min_accuracy",
    "baseline",
    "max_drop",
    "require",
    "junit",
    "as_json",
    "quiet",
    "verbose",
}


def distill(  # noqa: PLR0913, PLR0917 -- the signature is the command line
    context: typer.Context,
    teacher: Annotated[Path | None, typer.Argument(help="Teacher file; with --resume the one of the run.")] = None,
    student: Annotated[
        str, typer.Option(help="Student architecture; `dfadc students` lists them.", rich_help_panel=_RUN)
    ] = "mobilenetv2",
    recipe: Annotated[str, typer.Option(help="Shipped recipe or TOML file.", rich_help_panel=_RUN)] = "auto",
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="Recipe field, path.to.field=value (repeatable).", rich_help_panel=_RUN),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.", rich_help_panel=_RUN)] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Time budget, turned into steps once.", rich_help_panel=_RUN)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images of each update.", rich_help_panel=_RUN)] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.", rich_help_panel=_RUN)] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile; measured if not given.", rich_help_panel=_RUN),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", rich_help_panel=_RUN)] = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of every random draw.", rich_help_panel=_RUN)] = None,
    export: options.Exports = None,
    keep_fp32: options.KeepFp32 = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default runs/TEACHER-STUDENT.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted run.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    teacher_arch: options.TeacherArchitecture = None,
    arch_arg: options.ArchitectureArguments = None,
    teacher_weights: options.TeacherWeights = None,
    output: options.TeacherOutput = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    num_classes: options.NumClasses = None,
    task: options.Task = None,
    trust_teacher: options.TrustTeacher = False,
    factory: options.Factory = None,
    data: options.Data = None,
    min_agreement: options.MinAgreement = None,
    min_accuracy: options.MinAccuracy = None,
    baseline: options.Baseline = None,
    max_drop: options.MaxDrop = None,
    require: options.Require = None,
    junit: options.Junit = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Distil TEACHER into a small student without data, export it and verify it."""
    if dry_run and junit is not None:
        raise DfadcError(f"--dry-run verifies nothing, so there is nothing to write to {junit}", "leave --junit away")
    with ci_outputs(junit) as publish, ExitStack() as held:
        from dfadc.pipeline.verify import VerifySettings, verify_run  # noqa: PLC0415 -- keeps `--help` light
        from dfadc.recipe.load import load_recipe  # noqa: PLC0415
        from exporters.exporter import BuildSettings  # noqa: PLC0415

        gates = options.gates(
            min_agreement=min_agreement, min_accuracy=min_accuracy, max_drop=max_drop, data=data, baseline=baseline
        )
        teacher_arch = options.architecture(teacher_arch, arch_arg)
        wanted = VerifySettings(
            data=data,
            baseline=baseline,
            gates=gates,
            required=require or [],
            trust_teacher=trust_teacher,
            # Only what is named on this command line may be imported.
            factories=factory or [name for name in (student, teacher_arch) if name],
        )
        exports = Exports(export, BuildSettings(keep_fp32=options.nodes_in_fp32(keep_fp32)))
        if resume is not None:
            _refuse_beside_resume(context)
            run = resume_run(resume, teacher, exports, wanted, held=held, quiet=quiet)
        else:
            _refuse_without_resume(teacher, factory, steps, minutes)
            switch = {None: None, True: "on", False: "off"}[compile_]
            length = {"steps": steps, "batch_size": batch_size, "seed": seed}
            given = options.assignments({**length, "compute.precision": precision, "compute.compile": switch})
            fields = options.contract_fields(input_size, mean, std, num_classes, task)
            resolved = load_recipe(recipe, [*(assign or []), *given, *gates])
            described = {"architecture": teacher_arch, "fields": fields, "weights": teacher_weights, "output": output}
            loaded = load_inputs(teacher or Path(), described, resolved, exports, wanted, quiet=quiet)
            choices = {"student": student, "recipe": resolved, "device": device, "minutes": minutes}
            if dry_run:
                show_plan(loaded, choices, as_json=as_json)
                return
            files = {"--data": data, "--baseline": baseline}
            if recipe.endswith(".toml"):
                files["--recipe"] = Path(recipe)
            run = start(loaded, choices, out, files, held=held, force=force, quiet=quiet)
        _, export_error = run_exports(run, export, settings=exports.settings, factories=wanted.factories, quiet=quiet)
        report = verify_run(run, wanted, export_error=export_error)
        publish(report)
        print_report(report, as_json=as_json, verbose=verbose)
    say(f"run folder: {run.path}", quiet=quiet)
    if export_error is not None:
        print_error(export_error)
    raise typer.Exit(report["exit_code"])


def _refuse_without_resume(
    teacher: Path | None, factory: list[str] | None, steps: int | None, minutes: float | None
) -> None:
    if factory:
        raise DfadcError(
            f"--factory {factory[0]} goes with --resume", "a new run has its factories of --student, --teacher-arch"
        )
    if teacher is None:
        raise DfadcError("no teacher given", "dfadc distill teacher.pt --student mobilenetv2")
    if steps is not None and minutes is not None:
        raise DfadcError(f"--steps {steps} and --minutes {minutes:g} contradict each other", "give one of them")


def _refuse_beside_resume(context: typer.Context) -> None:
    """A flag that would be parsed and ignored is an error."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in _GOES_WITH_RESUME
        and (source := context.get_parameter_source(parameter.name or "")) is not None
        and source.name == "COMMANDLINE"
    ]
    if given:
        raise DfadcError(
            f"{', '.join(given)} cannot be changed by --resume, which goes on with the recipe of the run",
            f"leave {'it' if len(given) == 1 else 'them'} away, or start a new run",
        )
