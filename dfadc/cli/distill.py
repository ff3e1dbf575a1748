"""`dfadc distill`: the whole pipeline, from a teacher file to a verified run folder."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from dfadc.cli import options
from dfadc.cli.ci import ci_outputs
from dfadc.cli.console import plan_dict, plan_lines, print_json, print_line, print_report, say, terminal_observer
from dfadc.cli.export import run_exports
from dfadc.cli.script import print_error
from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from dfadc.contract import ContractFields, ImageContract
    from dfadc.pipeline.verify import VerifySettings
    from dfadc.recipe.schema import Recipe
    from dfadc.run_folder import RunFolder
    from dfadc.teacher.load import Teacher
    from dfadc.verification.report import Report
    from exporters.exporter import BuildSettings

_RUN = "Run"
#: Of a list in the teacher's contract, such as class names.
_MOST_SHOWN = 10
#: What may be said beside --resume; the rest was decided when the run began.
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
    steps: Annotated[int | None, typer.Option(help="Steps of the game.", rich_help_panel=_RUN)] = None,
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
        gates = options.gates(
            min_agreement=min_agreement, min_accuracy=min_accuracy, max_drop=max_drop, data=data, baseline=baseline
        )
        if factory and resume is None:
            raise DfadcError(
                f"--factory {factory[0]} goes with --resume", "a new run has its factories of --student, --teacher-arch"
            )
        # Only what is named on this command line may be imported.
        factories = factory or [name for name in (student, teacher_arch) if name]
        wanted = _verification(data, baseline, gates, require or [], trust_teacher, factories)
        exports = _Exports(export, options.nodes_in_fp32(keep_fp32))
        if resume is not None:
            from dfadc.run_folder import open_run  # noqa: PLC0415 -- keeps `--help` light
            from dfadc.run_lock import locked  # noqa: PLC0415

            _refuse_beside_resume(context)
            held.enter_context(locked(open_run(resume).path))
            run = _resume(resume, teacher, exports, wanted, quiet=quiet)
        elif teacher is None:
            raise DfadcError("no teacher given", "dfadc distill teacher.pt --student mobilenetv2")
        else:
            if steps is not None and minutes is not None:
                raise DfadcError(f"--steps {steps} and --minutes {minutes:g} contradict each other", "give one of them")
            shorthand = {
                "steps": steps,
                "batch_size": batch_size,
                "seed": seed,
                "compute.precision": precision,
                "compute.compile": None if compile_ is None else ("on" if compile_ else "off"),
            }
            given = [f"{path}={value}" for path, value in shorthand.items() if value is not None]
            fields = options.contract_fields(input_size, mean, std, num_classes, task)
            from dfadc.recipe.load import load_recipe  # noqa: PLC0415 -- keeps `--help` light

            resolved = load_recipe(recipe, [*(assign or []), *given, *gates])
            loaded = _load(teacher, teacher_arch, fields, trust=trust_teacher, quiet=quiet)
            _check_gates(exports, resolved, loaded.contract)
            _check_what_follows(exports, wanted, resolved, loaded.contract, loaded.sha256)
            job = _Job(loaded, student, resolved, device, minutes)
            if dry_run:
                _show_plan(job, as_json=as_json)
                return
            from dfadc.run_lock import reserved_folder  # noqa: PLC0415

            out = out or _default_out(loaded.path, student)
            files = {
                "--data": data,
                "--baseline": baseline,
                "--recipe": Path(recipe) if recipe.endswith(".toml") else None,
            }
            inputs = {flag: path for flag, path in files.items() if path is not None}
            held.enter_context(reserved_folder(out, force=force, inputs=inputs))
            run = _start(job, out, force=force, quiet=quiet)
        report, export_error = _finish(run, exports, wanted, quiet=quiet)
        publish(report)
        print_report(report, as_json=as_json, verbose=verbose)
    say(f"run folder: {run.path}", quiet=quiet)
    if export_error is not None:
        print_error(export_error)
    raise typer.Exit(report["exit_code"])


class _Exports(NamedTuple):
    names: list[str] | None
    keep_fp32: tuple[str, ...] | None

    @property
    def settings(self) -> BuildSettings:
        from exporters.exporter import BuildSettings  # noqa: PLC0415 -- keeps `--help` light

        return BuildSettings(keep_fp32=self.keep_fp32)


class _Job(NamedTuple):
    teacher: Teacher
    student: str
    recipe: Recipe
    device: str
    minutes: float | None


def _verification(
    data: Path | None,
    baseline: Path | None,
    gates: list[str],
    required: list[str],
    trust_teacher: bool,
    factories: list[str],
) -> VerifySettings:
    from dfadc.pipeline.verify import VerifySettings  # noqa: PLC0415 -- keeps `--help` light

    return VerifySettings(
        data=data,
        baseline=baseline,
        gates=gates,
        required=required,
        trust_teacher=trust_teacher,
        factories=factories,
    )


def _load(path: Path, architecture: str | None, fields: ContractFields, *, trust: bool, quiet: bool) -> Teacher:
    from dfadc.pipeline.distill import load_teacher  # noqa: PLC0415

    teacher = load_teacher(path, architecture=architecture, fields=fields, trust=trust)
    say(
        f"teacher: {teacher.architecture} from {path} ({teacher.kind}), {teacher.num_parameters:,} parameters",
        quiet=quiet,
    )
    contract = teacher.contract.to_dict()
    for name, source in teacher.contract_sources.items():
        say(f"  {name} = {_shown(contract[name])}  ({source})", quiet=quiet)
    for note in teacher.notes:
        say(f"note: {note}", quiet=quiet)
    return teacher


def _shown(value: object) -> str:
    if not isinstance(value, list):
        return str(value)
    more = len(value) - _MOST_SHOWN
    return ", ".join(map(str, value[:_MOST_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _start(job: _Job, out: Path, *, force: bool, quiet: bool) -> RunFolder:
    from dfadc.pipeline.distill import run_distillation  # noqa: PLC0415

    with terminal_observer(quiet=quiet) as observer:
        return run_distillation(
            job.teacher,
            job.student,
            out=out,
            recipe=job.recipe,
            device=job.device,
            minutes=job.minutes,
            force=force,
            observer=observer,
        )


def _refuse_beside_resume(context: typer.Context) -> None:
    """A flag that would be parsed and ignored is an error."""
    said = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in _GOES_WITH_RESUME
        and (source := context.get_parameter_source(parameter.name or "")) is not None
        and source.name == "COMMANDLINE"
    ]
    if said:
        raise DfadcError(
            f"{', '.join(said)} cannot be changed by --resume, which goes on with the recipe of the run",
            f"leave {'it' if len(said) == 1 else 'them'} away, or start a new run",
        )


def _resume(path: Path, teacher: Path | None, exports: _Exports, wanted: VerifySettings, *, quiet: bool) -> RunFolder:
    from dfadc.pipeline.distill import resume_distillation  # noqa: PLC0415
    from dfadc.pipeline.gates import recipe_to_judge_by  # noqa: PLC0415
    from dfadc.run_folder import open_run  # noqa: PLC0415

    run = open_run(path)
    recipe = recipe_to_judge_by(run.recipe, wanted.gates)
    _check_what_follows(exports, wanted, recipe, run.contract(), run.record()["teacher"]["sha256"])
    with terminal_observer(quiet=quiet) as observer:
        return resume_distillation(
            run, teacher, trust=wanted.trust_teacher, factories=wanted.factories, observer=observer
        )


def _check_what_follows(
    exports: _Exports, wanted: VerifySettings, recipe: Recipe, contract: ImageContract, teacher_sha256: str
) -> None:
    """What would fail after the training fails before it."""
    from dfadc.pipeline.export_plan import plan_exports  # noqa: PLC0415
    from dfadc.pipeline.verify import check_inputs  # noqa: PLC0415

    plan_exports(exports.names, exports.settings)
    check_inputs(wanted, recipe, contract=contract, teacher_sha256=teacher_sha256)


def _check_gates(exports: _Exports, recipe: Recipe, contract: ImageContract) -> None:
    """Refuses gates that no artifact could pass. A run that goes on is let go on: its samples are settled."""
    from dfadc.pipeline.export_plan import plan_exports  # noqa: PLC0415
    from dfadc.training.sample_size import check_gates_can_pass  # noqa: PLC0415

    requests = plan_exports(exports.names, exports.settings).requests
    check_gates_can_pass(recipe.verify, contract, {str(request.precision) for request in requests})


def _show_plan(job: _Job, *, as_json: bool) -> None:
    from dfadc.pipeline.distill import plan_distillation  # noqa: PLC0415

    plan = plan_distillation(job.teacher, job.student, recipe=job.recipe, device=job.device, minutes=job.minutes)
    if as_json:
        print_json(plan_dict(plan))
        return
    for line in plan_lines(plan):
        print_line(line)


def _default_out(teacher: Path, student: str) -> Path:
    return Path("runs") / f"{teacher.stem}-{re.sub('[^A-Za-z0-9_.]+', '-', student)}"


def _finish(
    run: RunFolder, exports: _Exports, wanted: VerifySettings, *, quiet: bool
) -> tuple[Report, DfadcError | None]:
    """The report on the student and on what could be exported, and what kept the rest from it."""
    from dfadc.pipeline.verify import verify_run  # noqa: PLC0415

    _, export_error = run_exports(
        run, exports.names, settings=exports.settings, factories=wanted.factories, quiet=quiet
    )
    return verify_run(run, wanted, export_error=export_error), export_error
