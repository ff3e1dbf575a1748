"""Stages one and two: load a teacher, distil it, and go on with a run that was interrupted."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError
from dfadc.finish import write_results
from dfadc.models.teacher import Teacher, load_teacher
from dfadc.recipe import Recipe, load_recipe
from dfadc.run import RunFolder, claim_folder
from dfadc.training import Plan, Reading, Training, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Observer", "load_teacher", "plan_distillation", "resume_distillation", "run_distillation"]


def _ignore(_: object) -> None:
    """The default observer."""


@dataclass(frozen=True)
class Observer:
    """Who is told what while a run goes on.

    Args:
        on_plan: called once, before the first step.
        on_reading: called at every log interval.
    """

    on_plan: Callable[[Plan], None] = _ignore
    on_reading: Callable[[Reading], None] = _ignore


def run_distillation(
    teacher: Teacher | Path | str,
    student: str = "mobilenetv2",
    *,
    out: Path | str,
    recipe: Recipe | str = "auto",
    device: str = "auto",
    minutes: float | None = None,
    force: bool = False,
    observer: Observer | None = None,
) -> RunFolder:
    """Distils a teacher into a student, without data, into a run folder.

    Args:
        teacher: from :func:`load_teacher`, or a file that needs no further words.
        student: architecture of the student.
        out: the run folder; it must not hold a run yet.
        recipe: a :class:`Recipe`, or the name of a shipped one.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        minutes: time budget, turned into steps once, at the measured rate, instead of the recipe's.
        force: replace a run that is there.
        observer: told about plan and progress.

    Raises:
        DfadcError: and its children; a run that was interrupted or diverged keeps its folder.
    """
    loaded = load_teacher(teacher) if isinstance(teacher, Path | str) else teacher
    observer = observer or Observer()
    resolved = load_recipe(recipe) if isinstance(recipe, str) else recipe
    with prepare(loaded, student, recipe=resolved, device=device) as training:
        folder = claim_folder(Path(out), force=force)
        plan = training.plan(minutes)
        training.start(folder, plan)
        observer.on_plan(plan)
        return _play(training, folder, observer)


def plan_distillation(
    teacher: Teacher,
    student: str = "mobilenetv2",
    *,
    recipe: Recipe | str = "auto",
    device: str = "auto",
    minutes: float | None = None,
) -> Plan:
    """What :func:`run_distillation` would do and cost: builds the players and measures a step, writes nothing."""
    resolved = load_recipe(recipe) if isinstance(recipe, str) else recipe
    with prepare(teacher, student, recipe=resolved, device=device) as training:
        return training.plan(minutes)


def resume_distillation(
    run: RunFolder, teacher: Teacher | None = None, *, observer: Observer | None = None
) -> RunFolder:
    """Goes on with an interrupted run as if it had not been interrupted: bit for bit on the CPU.

    Args:
        run: the run, from :func:`open_run`.
        teacher: where the file has moved since, or needs trust; by default it is loaded as the run did.
        observer: told about plan and progress.

    Raises:
        DfadcError: no checkpoint, a finished run, or another teacher than the run began with.
    """
    record = run.record()
    if record["status"] == "finished":
        raise DfadcError(f"the run {run.path} is finished", "`dfadc export` and `dfadc verify` work on it")
    known = record["teacher"]
    if teacher is None:
        fields = ContractFields.from_dict(record["contract"])
        teacher = load_teacher(known["path"], architecture=known["requested_architecture"], fields=fields)
    if known["sha256"] != teacher.sha256:
        raise DfadcError(
            f"the teacher changed since the run {run.path} began: its sha256 was {known['sha256'][:12]}…, "
            f"{teacher.path} has {teacher.sha256[:12]}…",
            "resume with the file that the run began with, or start a new run",
        )
    observer = observer or Observer()
    student = record["student"]["architecture"]
    with prepare(teacher, student, recipe=load_recipe(run.recipe), device=record["device"]) as training:
        observer.on_plan(training.resume(run))
        return _play(training, run, observer)


def _play(training: Training, folder: RunFolder, observer: Observer) -> RunFolder:
    started = time.monotonic()
    training.play(folder, observer.on_reading)
    write_results(training, folder)
    played = folder.record().get("seconds", 0.0) + time.monotonic() - started
    folder.update_record({"status": "finished", "seconds": round(played, 1)})
    return folder
