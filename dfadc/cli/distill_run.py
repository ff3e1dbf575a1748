"""The three ways of `dfadc distill`: start a run, resume one, show the plan alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dfadc.cli.console import plan_dict, plan_lines, print_json, print_line, say, terminal_observer
from dfadc.errors import some_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import ExitStack

    from dfadc.pipeline.verify import VerifySettings
    from dfadc.recipe.schema import Recipe
    from dfadc.run_folder import RunFolder
    from dfadc.teacher.load import Teacher
    from exporters.exporter import BuildSettings

#: Of a list in the teacher's contract, such as class names.
_MOST_SHOWN = 10


class Exports(NamedTuple):
    """Artifacts asked for, and the settings of their build."""

    names: list[str] | None
    settings: BuildSettings


def load_inputs(
    path: Path, described: Mapping[str, Any], recipe: Recipe, exports: Exports, wanted: VerifySettings, *, quiet: bool
) -> Teacher:
    """Loads a teacher, described as ``load_teacher`` takes it, and refuses what would fail after the training."""
    from dfadc.pipeline.distill import load_teacher  # noqa: PLC0415 -- keeps `--help` light
    from dfadc.pipeline.export_plan import plan_exports  # noqa: PLC0415
    from dfadc.pipeline.verify import check_inputs  # noqa: PLC0415
    from dfadc.training.sample_size import check_gates_can_pass  # noqa: PLC0415

    teacher = load_teacher(path, trust=wanted.trust_teacher, **described)
    source = f"{teacher.architecture} from {path} ({teacher.kind})"
    say(f"teacher: {source}, {teacher.num_parameters:,} parameters", quiet=quiet)
    contract = teacher.contract.to_dict()
    for name, source in teacher.contract_sources.items():
        value = contract[name]
        shown = some_of(list(map(str, value)), _MOST_SHOWN) if isinstance(value, list) else value
        say(f"  {name} = {shown}  ({source})", quiet=quiet)
    for note in teacher.notes:
        say(f"note: {note}", quiet=quiet)
    # A run that goes on is let go on: its samples are settled.
    precisions = {str(request.precision) for request in plan_exports(exports.names, exports.settings).requests}
    check_gates_can_pass(recipe.verify, teacher.contract, precisions)
    check_inputs(wanted, recipe, contract=teacher.contract, teacher_sha256=teacher.sha256)
    return teacher


def show_plan(teacher: Teacher, choices: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints the plan of a new run, and writes nothing; ``choices`` are those of ``plan_distillation``."""
    from dfadc.pipeline.distill import plan_distillation  # noqa: PLC0415

    plan = plan_distillation(teacher, **choices)
    if as_json:
        print_json(plan_dict(plan))
    else:
        print_line("\n".join(plan_lines(plan)))


def start(
    teacher: Teacher,
    choices: Mapping[str, Any],
    out: Path | None,
    files: Mapping[str, Path | None],
    *,
    held: ExitStack,
    force: bool,
    quiet: bool,
) -> RunFolder:
    """Starts a run in a folder that stays reserved as long as ``held`` is open; ``files`` may not lie in it."""
    from dfadc.pipeline.distill import run_distillation  # noqa: PLC0415
    from dfadc.run_lock import reserved_folder  # noqa: PLC0415

    out = out or Path("runs") / f"{teacher.path.stem}-{re.sub('[^A-Za-z0-9_.]+', '-', choices['student'])}"
    inputs = {flag: path for flag, path in files.items() if path is not None}
    held.enter_context(reserved_folder(out, force=force, inputs=inputs))
    with terminal_observer(quiet=quiet) as observer:
        return run_distillation(teacher, **choices, out=out, force=force, observer=observer)


def resume_run(
    path: Path, teacher: Path | None, exports: Exports, wanted: VerifySettings, *, held: ExitStack, quiet: bool
) -> RunFolder:
    """Goes on with a run, which stays locked as long as ``held`` is open."""
    from dfadc.pipeline.distill import resume_distillation  # noqa: PLC0415
    from dfadc.pipeline.export_plan import plan_exports  # noqa: PLC0415
    from dfadc.pipeline.gates import recipe_to_judge_by  # noqa: PLC0415
    from dfadc.pipeline.verify import check_inputs  # noqa: PLC0415
    from dfadc.run_folder import open_run  # noqa: PLC0415
    from dfadc.run_lock import locked  # noqa: PLC0415

    held.enter_context(locked(open_run(path).path))
    run = open_run(path)
    recipe = recipe_to_judge_by(run.recipe, wanted.gates)
    plan_exports(exports.names, exports.settings)
    check_inputs(wanted, recipe, contract=run.contract(), teacher_sha256=run.record()["teacher"]["sha256"])
    with terminal_observer(quiet=quiet) as observer:
        return resume_distillation(
            run, teacher, trust=wanted.trust_teacher, factories=wanted.factories, observer=observer
        )
