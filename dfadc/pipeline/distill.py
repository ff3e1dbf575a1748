"""Stages one and two: loading a teacher, distilling it, and resuming a run that was interrupted."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError, Interrupted, StorageFailed, TrainingDiverged, memory_errors
from dfadc.networks.network_file import refuse_factory_from_file
from dfadc.recipe.load import load_recipe
from dfadc.run_lock import claim_folder, holding_run, reserved_folder
from dfadc.sampling.freeze import write_results
from dfadc.storage import sha256_file
from dfadc.teacher.load import Teacher, load_teacher
from dfadc.training.build import prepare
from dfadc.training.tensorboard import event_files
from exporters.exporter import ignore

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from dfadc.recipe.schema import Recipe
    from dfadc.run_folder import RunFolder
    from dfadc.training.callbacks import Reading
    from dfadc.training.plan import Plan
    from dfadc.training.run import Training

__all__ = [
    "Observer",
    "load_run_teacher",
    "load_teacher",
    "plan_distillation",
    "resume_distillation",
    "run_distillation",
]


_NEED_LESS_MEMORY = memory_errors(
    "hold less at once: --set compute.micro_batch=16 keeps the batch; or lower --batch-size or replay.capacity"
)


@dataclass(frozen=True)
class Observer:
    """Callbacks of a run.

    Args:
        on_plan: called once, before the first step.
        on_reading: called at every log interval.
        on_note: called with a line on what happens after the last step.
    """

    on_plan: Callable[[Plan], None] = ignore
    on_reading: Callable[[Reading], None] = ignore
    on_note: Callable[[str], None] = ignore


@_NEED_LESS_MEMORY
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
        observer: called with plan and progress.

    Raises:
        DfadcError: and its children. What is wrong before the first step leaves no folder and removes none; a run
            that was interrupted or diverged keeps its folder.
    """
    loaded = load_teacher(teacher) if isinstance(teacher, Path | str) else teacher
    observer = observer or Observer()
    resolved = load_recipe(recipe) if isinstance(recipe, str) else recipe
    path, inputs = Path(out), {"the teacher": loaded.path}
    if resolved.student.weights:
        inputs["student.weights"] = Path(resolved.student.weights)
    with (
        reserved_folder(path, force=force, inputs=inputs),
        prepare(loaded, student, recipe=resolved, device=device) as training,
    ):
        plan = training.plan(minutes)
        folder = claim_folder(path, force=force)
        training.start(folder, plan)
        observer.on_plan(plan)
        return _train(training, folder, observer)


@_NEED_LESS_MEMORY
def plan_distillation(
    teacher: Teacher,
    student: str = "mobilenetv2",
    *,
    recipe: Recipe | str = "auto",
    device: str = "auto",
    minutes: float | None = None,
) -> Plan:
    """Plan of :func:`run_distillation`: builds the networks and measures a step, writes nothing."""
    resolved = load_recipe(recipe) if isinstance(recipe, str) else recipe
    with prepare(teacher, student, recipe=resolved, device=device, is_for_plan=True) as training:
        return training.plan(minutes)


@_NEED_LESS_MEMORY
@holding_run
def resume_distillation(
    run: RunFolder,
    teacher: Teacher | Path | None = None,
    *,
    trust: bool = False,
    factories: Collection[str] = (),
    observer: Observer | None = None,
) -> RunFolder:
    """Goes on with an interrupted run as if it had not been interrupted: bit for bit on the CPU.

    Args:
        run: the run, from :func:`open_run`.
        teacher: loaded, or its file where that has moved since; by default the file that the run began with.
        trust: whether code in the teacher file may run.
        factories: each ``module:factory`` of the student or the teacher, which the run folder alone may not import.
        observer: called with plan and progress.

    Raises:
        DfadcError: no checkpoint, a finished run, another teacher than the run began with, or a factory that is none
            of ``factories``.
    """
    record = run.record()
    if record["status"] == "finished":
        raise DfadcError(f"the run {run.path} is finished", "`dfadc export` and `dfadc verify` work on it")
    student = record["student"]["architecture"]
    refuse_factory_from_file(student, run.record_file, allowed=factories, flag="--factory")
    if isinstance(teacher, Teacher):
        _check_teacher(run, teacher)
    else:
        teacher = load_run_teacher(run, teacher, trust=trust, factories=factories)
    observer = observer or Observer()
    recipe = load_recipe(run.recipe)
    with prepare(teacher, student, recipe=recipe, device=record["device"], has_checkpoint=True) as training:
        observer.on_plan(training.resume(run))
        return _train(training, run, observer)


def load_run_teacher(
    run: RunFolder, path: Path | None = None, *, trust: bool = False, factories: Collection[str] = ()
) -> Teacher:
    """Loads the teacher of a run the way the run did; ``path`` is that of its file where it has moved since.

    Raises:
        DfadcError: the file is gone, or is not the one that the run began with, or the run names a factory that is none
            of ``factories``.
    """
    record = run.record()
    known = record["teacher"]
    if known["requested_architecture"] is not None:
        named = known["requested_architecture"]
        refuse_factory_from_file(named, run.record_file, allowed=factories, flag="--factory")
    path = path or Path(known["path"])
    if not path.is_file():
        raise DfadcError(
            f"the teacher of the run {run.path} is not at {path}",
            f"put it there, or name it to go on: dfadc distill TEACHER --resume {run.path}",
        )
    # Before loading: code in another file must not run because this one was trusted.
    sha256 = sha256_file(path)
    if sha256 != known["sha256"]:
        raise _another_teacher(run, path, sha256)
    fields = ContractFields.from_dict(record["contract"])
    teacher = load_teacher(
        path,
        architecture=known["requested_architecture"],
        fields=fields,
        trust=trust,
        weights=known.get("requested_weights"),
        output=known.get("requested_output"),
    )
    _check_teacher(run, teacher)
    return teacher


def _check_teacher(run: RunFolder, teacher: Teacher) -> None:
    """Refuses a teacher that is not the one the run began with, or is understood in another way."""
    if teacher.sha256 != run.record()["teacher"]["sha256"]:
        raise _another_teacher(run, teacher.path, teacher.sha256)
    output = run.record()["teacher"].get("requested_output")
    if teacher.requested_output != output:
        raise DfadcError(
            f"the run {run.path} began with output {output} of {teacher.path}, not {teacher.requested_output}",
            "load the teacher as the run did",
        )
    if teacher.contract != run.contract():
        raise DfadcError(
            f"the run {run.path} began with another contract for {teacher.path}: {run.contract()}, not "
            f"{teacher.contract}",
            "load the teacher as the run did",
        )


def _another_teacher(run: RunFolder, path: Path, sha256: str) -> DfadcError:
    began_with = run.record()["teacher"]["sha256"]
    return DfadcError(
        f"the teacher changed since the run {run.path} began: its sha256 was {began_with[:12]}…, "
        f"{path} has {sha256[:12]}…",
        "use the file that the run began with, or start a new run",
    )


def _train(training: Training, folder: RunFolder, observer: Observer) -> RunFolder:
    before, started = folder.record().get("seconds", 0.0), time.monotonic()
    log, step = training.recipe.log, training.run.state.step

    def spent() -> dict[str, float]:
        return {"seconds": round(before + time.monotonic() - started, 1)}

    folder.update_record({"status": "running"})
    try:
        with event_files(log, folder, step, observer.on_reading) as on_reading:
            training.train(folder, on_reading)
        write_results(training, folder, observer.on_note)
    except BaseException as exc:
        is_interrupted = isinstance(exc, Interrupted | KeyboardInterrupt)
        ended = "diverged" if isinstance(exc, TrainingDiverged) else "failed"
        with suppress(StorageFailed):  # a full disk may be why it ends, and that is raised
            folder.update_record({"status": "interrupted" if is_interrupted else ended, **spent()})
        raise
    folder.update_record({"status": "finished", **spent()})
    folder.remove_checkpoints()
    return folder
