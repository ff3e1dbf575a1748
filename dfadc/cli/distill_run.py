"""The three ways of `dfadc distill`: start a run, resume one, show the plan alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dfadc.cli.console import plan_dict, plan_lines, print_json, print_line, say, terminal_observer
from dfadc.cli.export import run_exports

if TYPE_CHECKING:
    from contextlib import ExitStack

    from dfadc.contract import ContractFields, ImageContract
    from dfadc.errors import DfadcError
    from dfadc.pipeline.verify import VerifySettings
    from dfadc.recipe.schema import Recipe
    from dfadc.run_folder import RunFolder
    from dfadc.teacher.load import Teacher
    from dfadc.verification.report import Report
    from exporters.exporter import BuildSettings

#: Of a list in the teacher's contract, such as class names.
_MOST_SHOWN = 10


class Exports(NamedTuple):
    """Artifacts asked for, and the ONNX nodes that stay in fp32."""

    names: list[str] | None
    keep_fp32: tuple[str, ...] | None

    @property
    def settings(self) -> BuildSettings:
        """The same as the exporters take it."""
        from exporters.exporter import BuildSettings  # noqa: PLC0415 -- keeps `--help` light

        return BuildSettings(keep_fp32=self.keep_fp32)


class Inputs(NamedTuple):
    """Teacher file and recipe of a new run, as named on the command line."""

    teacher: Path
    architecture: str | None
    fields: ContractFields
    recipe: str
    assignments: list[str]
    weights: str | None = None
    output: str | None = None


class Choices(NamedTuple):
    """Student, device and time budget of a new run."""

    student: str
    device: str
    minutes: float | None


class Job(NamedTuple):
    """A new run with its inputs loaded."""

    teacher: Teacher
    recipe: Recipe
    choices: Choices


def load_job(inputs: Inputs, choices: Choices, exports: Exports, wanted: VerifySettings, *, quiet: bool) -> Job:
    """Loads recipe and teacher, and refuses what would fail after the training."""
    from dfadc.recipe.load import load_recipe  # noqa: PLC0415 -- keeps `--help` light

    recipe = load_recipe(inputs.recipe, inputs.assignments)
    teacher = _load(inputs, trust=wanted.trust_teacher, quiet=quiet)
    _check_gates(exports, recipe, teacher.contract)
    _check_what_follows(exports, wanted, recipe, teacher.contract, teacher.sha256)
    return Job(teacher, recipe, choices)


def _load(inputs: Inputs, *, trust: bool, quiet: bool) -> Teacher:
    from dfadc.pipeline.distill import load_teacher  # noqa: PLC0415

    teacher = load_teacher(
        inputs.teacher,
        architecture=inputs.architecture,
        fields=inputs.fields,
        trust=trust,
        weights=inputs.weights,
        output=inputs.output,
    )
    say(
        f"teacher: {teacher.architecture} from {inputs.teacher} ({teacher.kind}), "
        f"{teacher.num_parameters:,} parameters",
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


def start(
    job: Job, out: Path | None, recipe: str, wanted: VerifySettings, *, held: ExitStack, force: bool, quiet: bool
) -> RunFolder:
    """Starts a run in a folder that stays reserved as long as ``held`` is open."""
    from dfadc.pipeline.distill import run_distillation  # noqa: PLC0415
    from dfadc.run_lock import reserved_folder  # noqa: PLC0415

    out = out or _default_out(job.teacher.path, job.choices.student)
    files = {
        "--data": wanted.data,
        "--baseline": wanted.baseline,
        "--recipe": Path(recipe) if recipe.endswith(".toml") else None,
    }
    inputs = {flag: path for flag, path in files.items() if path is not None}
    held.enter_context(reserved_folder(out, force=force, inputs=inputs))
    with terminal_observer(quiet=quiet) as observer:
        return run_distillation(
            job.teacher,
            job.choices.student,
            out=out,
            recipe=job.recipe,
            device=job.choices.device,
            minutes=job.choices.minutes,
            force=force,
            observer=observer,
        )


def resume_run(
    path: Path, teacher: Path | None, exports: Exports, wanted: VerifySettings, *, held: ExitStack, quiet: bool
) -> RunFolder:
    """Goes on with a run, which stays locked as long as ``held`` is open."""
    from dfadc.pipeline.distill import resume_distillation  # noqa: PLC0415
    from dfadc.pipeline.gates import recipe_to_judge_by  # noqa: PLC0415
    from dfadc.run_folder import open_run  # noqa: PLC0415
    from dfadc.run_lock import locked  # noqa: PLC0415

    held.enter_context(locked(open_run(path).path))
    run = open_run(path)
    recipe = recipe_to_judge_by(run.recipe, wanted.gates)
    _check_what_follows(exports, wanted, recipe, run.contract(), run.record()["teacher"]["sha256"])
    with terminal_observer(quiet=quiet) as observer:
        return resume_distillation(
            run, teacher, trust=wanted.trust_teacher, factories=wanted.factories, observer=observer
        )


def _check_what_follows(
    exports: Exports, wanted: VerifySettings, recipe: Recipe, contract: ImageContract, teacher_sha256: str
) -> None:
    """Checks before the training everything that would fail after it."""
    from dfadc.pipeline.export_plan import plan_exports  # noqa: PLC0415
    from dfadc.pipeline.verify import check_inputs  # noqa: PLC0415

    plan_exports(exports.names, exports.settings)
    check_inputs(wanted, recipe, contract=contract, teacher_sha256=teacher_sha256)


def _check_gates(exports: Exports, recipe: Recipe, contract: ImageContract) -> None:
    """Refuses gates that no artifact could pass. A run that goes on is let go on: its samples are settled."""
    from dfadc.pipeline.export_plan import plan_exports  # noqa: PLC0415
    from dfadc.training.sample_size import check_gates_can_pass  # noqa: PLC0415

    requests = plan_exports(exports.names, exports.settings).requests
    check_gates_can_pass(recipe.verify, contract, {str(request.precision) for request in requests})


def show_plan(job: Job, *, as_json: bool) -> None:
    """Prints the plan of a new run, and writes nothing."""
    from dfadc.pipeline.distill import plan_distillation  # noqa: PLC0415

    student, device, minutes = job.choices
    plan = plan_distillation(job.teacher, student, recipe=job.recipe, device=device, minutes=minutes)
    if as_json:
        print_json(plan_dict(plan))
        return
    for line in plan_lines(plan):
        print_line(line)


def _default_out(teacher: Path, student: str) -> Path:
    return Path("runs") / f"{teacher.stem}-{re.sub('[^A-Za-z0-9_.]+', '-', student)}"


def finish(
    run: RunFolder, exports: Exports, wanted: VerifySettings, *, quiet: bool
) -> tuple[Report, DfadcError | None]:
    """The report on the student and on what could be exported, and what kept the rest from it."""
    from dfadc.pipeline.verify import verify_run  # noqa: PLC0415

    _, export_error = run_exports(
        run, exports.names, settings=exports.settings, factories=wanted.factories, quiet=quiet
    )
    return verify_run(run, wanted, export_error=export_error), export_error
