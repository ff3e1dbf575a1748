"""One cell of the table: a method on a task, with one seed and one budget, and its line in the results file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from measure import Budget, Judge, memory_mebibytes
from methods import LEARNING_SHIFT_SHARE, METHODS
from play import Played, learn_from_images, play_recipe
from tasks import TASKS
from train_teacher import normalise

from dfadc.distillation.compute.policy import choose_device
from dfadc.distillation.images import augmentation
from dfadc.errors import DfadcError, TrainingDiverged
from dfadc.evaluation.labelled_images import EvaluationData
from dfadc.provenance import environment
from dfadc.recipe.load import load_recipe
from dfadc.teacher.load import Placement, load_teacher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from train_teacher import Split

    from dfadc.contract import ImageContract
    from dfadc.teacher.load import Teacher


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        task: name in ``TASKS``.
        method: name in ``METHODS``.
        seed: of every random draw.
        budget: of the run.
    """

    task: str
    method: str
    seed: int
    budget: Budget

    @property
    def overrides(self) -> tuple[str, ...]:
        """Changes to the shipped recipe, the seed apart."""
        return METHODS[self.method].changes

    def key(self) -> dict[str, Any]:
        """Key of the cell in the results file."""
        return {**asdict(self), "budget": str(self.budget)}


def run_cell(cell: Cell, data: Path | None = None) -> dict[str, Any]:
    """Runs a cell to its end and returns its line.

    A recipe that asks for what the teacher lacks, a budget that is too small and a run that diverges are results.

    Args:
        cell: what to run.
        data: folder of Fashion-MNIST's idx files.

    Raises:
        DfadcError: teacher or images cannot be read, or something is missing here.
    """
    task, device = TASKS[cell.task], choose_device()
    teacher = load_teacher(task.teacher)
    teacher = teacher.placed(Placement(device))
    test = task.load("test", data)
    labelled = EvaluationData(test.images.numpy(), test.labels.numpy(), teacher.contract)
    judge = Judge(labelled, teacher.module, device)
    line = {
        **cell.key(),
        "student": task.student,
        "num_test_images": len(labelled),
        "teacher_accuracy": judge.teacher_accuracy,
        "overrides": cell.overrides,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        **{name: environment()[name] for name in ("versions", "platform", "git_commit")},
        "memory_before_mebibytes": memory_mebibytes(),
    }
    try:
        played = _play(cell, teacher, judge, data)
    except DfadcError as exc:
        # Of its children only this one is about the method; others are about the disk or what is not installed.
        if type(exc) not in (DfadcError, TrainingDiverged):
            raise
        return {**line, "outcome": exc.message}
    return {
        **line,
        "outcome": "done",
        **judge(played.track.student)._asdict(),
        "steps": played.track.steps,
        "run_seconds": round(played.track.seconds, 2),
        "images_generated": played.images_generated,
        "shares": played.shares,
        "memory_mebibytes": memory_mebibytes(),
        "curve": played.track.curve,
        "notes": played.notes,
    }


def _play(cell: Cell, teacher: Teacher, judge: Judge, data: Path | None) -> Played:
    task, method = TASKS[cell.task], METHODS[cell.method]
    if method.recipe:
        recipe = load_recipe(method.recipe, [*cell.overrides, f"seed={cell.seed}"])
        return play_recipe(recipe, teacher=teacher, student=task.student, budget=cell.budget, judge=judge)
    rng = torch.Generator().manual_seed(cell.seed)
    draw: Callable[[int], Tensor] = partial(_draw_noise, teacher.contract, rng)
    if method.images == "real":
        draw = partial(_draw_real, task.load("train", data), teacher.contract, rng)
    return learn_from_images(
        lambda count: draw(count).to(judge.device),
        teacher=teacher,
        student=task.student,
        seed=cell.seed,
        budget=cell.budget,
        judge=judge,
    )


def _draw_real(split: Split, contract: ImageContract, rng: torch.Generator, count: int) -> Tensor:
    """Training images at random, each moved a little: (count, C, H, W)."""
    chosen = torch.randint(len(split.labels), (count,), generator=rng)
    pixels = min(contract.input_size[1:]) // LEARNING_SHIFT_SHARE
    return augmentation.shift(normalise(split.images[chosen], contract), pixels, rng)


def _draw_noise(contract: ImageContract, rng: torch.Generator, count: int) -> Tensor:
    """Standard normal pixels, whose mean and variance are those of real images once normalised: (count, C, H, W)."""
    return torch.randn(count, *contract.input_size, generator=rng)
