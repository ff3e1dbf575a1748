"""Two ways to make a student: a recipe plays its game, or the student learns from images that are there."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from measure import Track, synchronise
from methods import LEARNING, LEARNING_BATCH
from shares import add_up, measure

from dfadc.distillation.compute.policy import choose_policy
from dfadc.distillation.loop import distill, update_generator, update_student
from dfadc.distillation.losses import discrepancy
from dfadc.distillation.step_plan import TRAINED_ON, Kind, StepPlan
from dfadc.distillation.trainable import TrainableNetwork
from dfadc.errors import DfadcError
from dfadc.networks.flops import count_flops
from dfadc.recipe.load import change_recipe
from dfadc.recipe.schema import ComputeSettings
from dfadc.run_lock import claim_folder
from dfadc.student.build import build_student
from dfadc.training.build import prepare
from dfadc.training.callbacks import Callbacks

if TYPE_CHECKING:
    from collections.abc import Callable

    from measure import Budget, Judge
    from shares import Spent
    from torch import Tensor

    from dfadc.distillation.distillation import Distillation
    from dfadc.distillation.loop import StepLosses
    from dfadc.recipe.schema import Recipe
    from dfadc.teacher.load import Teacher
    from dfadc.training.callbacks import Reading

#: A run expected to take this much of its budget was rounded up to a step that is too long for it.
TOLERANCE = 1.25


@dataclass(frozen=True)
class Played:
    """A run that came to its end, and what it took.

    Args:
        track: of the run, with its student.
        images_generated: drawn for the updates by generators; 0 where there is none.
        shares: part -> share of a step's host time, measured beforehand on updates that were undone.
        notes: what the run's own monitor found and did.
    """

    track: Track
    images_generated: int
    shares: dict[str, float]
    notes: tuple[str, ...] = ()


def play_recipe(recipe: Recipe, *, teacher: Teacher, student: str, budget: Budget, judge: Judge) -> Played:
    """Plays a recipe as ``dfadc distill`` does, up to its last step.

    Raises:
        DfadcError: the recipe does not fit the teacher or the budget.
        TrainingDiverged: the game could not be kept finite.
    """
    if budget.images is not None:
        images = recipe.batch_size * StepPlan.of(recipe).mean(TRAINED_ON)
        steps = budget.steps(seconds_per_step=1, images_per_step=images)
        recipe = change_recipe(recipe, {"steps": steps})
    with prepare(teacher, student, recipe=recipe, device="auto") as training, tempfile.TemporaryDirectory() as folder:
        run = training.run
        spent = measure_step(run)  # before the plan, which may compile the objectives
        plan = training.plan(None if budget.images is not None else budget.seconds / 60)
        if budget.images is None and plan.seconds > TOLERANCE * budget.seconds:
            raise DfadcError(f"the budget is too small: one step takes {plan.estimate.seconds_per_step:.1f} s")
        notes: list[str] = []

        def on_reading(reading: Reading) -> None:
            if reading.note:
                notes.append(f"step {reading.step}: {reading.note}")

        callbacks = Callbacks(run, claim_folder(Path(folder) / "run", force=False), on_reading)
        track = Track(judge, run.state.student.average, plan.recipe.steps)

        def on_step(losses: StepLosses) -> None:
            callbacks.on_step(losses)
            track.on_step(losses.step)

        distill(run, plan.recipe.steps, on_step)
        return Played(track, round(plan.recipe.steps * spent.images["generator"]), spent.shares(), tuple(notes))


def learn_from_images(
    draw: Callable[[int], Tensor], *, teacher: Teacher, student: str, seed: int, budget: Budget, judge: Judge
) -> Played:
    """A student learns the teacher's answers to images that nobody generates.

    Args:
        draw: count -> normalised images (count, C, H, W) on the judge's device.
        teacher: whom it asks.
        student: architecture.
        seed: of its initial weights.
        budget: of the run.
        judge: of the student.
    """
    torch.manual_seed(seed)
    learner = build_student(student, teacher.contract).module
    flops = max(count_flops(each, teacher.contract.input_size) or 0 for each in (teacher.module, learner))
    policy = choose_policy(ComputeSettings(), judge.device, flops)
    teacher = teacher.placed(policy.placement(0))
    trained = TrainableNetwork(
        learner, LEARNING.optimizer, policy, schedule=LEARNING.schedule, ema_decay=LEARNING.ema_decay
    )

    def update() -> None:
        trained.module.train()
        images = draw(LEARNING_BATCH).contiguous(memory_format=policy.memory_format)
        with policy.autocast():
            with torch.no_grad():
                teacher_logits = teacher.logits(images)
            student_logits = trained.module(images)
        trained.update(discrepancy.kl(student_logits, teacher_logits, temperature=LEARNING.temperature))

    before = copy.deepcopy(trained.state_dict())
    seconds = min(_seconds(update, judge.device) for _ in range(4))
    spent = measure(update, {"teacher": [teacher.module], "student": [trained.module]})
    trained.load_state_dict(before)
    steps = budget.steps(seconds_per_step=seconds, images_per_step=LEARNING_BATCH)
    track = Track(judge, trained.average, steps)
    for step in range(steps):
        trained.set_learning_rate(step / steps)
        update()
        track.on_step(step + 1)
    return Played(track, 0, spent.shares())


def measure_step(run: Distillation) -> Spent:
    """Cost of an average step, from one update of each kind that is then undone.

    Source of the order and the weights: :func:`dfadc.training.cost.time_steps`.
    """
    state = run.state
    networks = {
        "generator": [state.generator.module, state.generator.average],
        "teacher": [run.teacher.module],
        "student": [state.student.module],
    }
    work: dict[Kind, Callable[[], object]] = {
        Kind.GENERATOR: lambda: update_generator(run),
        Kind.REPLAY: run.generator.fill_replay,
        Kind.STUDENT: lambda: update_student(run, run.student.draw_batch()),
        Kind.REPEATED: lambda: update_student(run, run.student.draw_repeated_batch()),
    }
    updates = {each.kind: each.number * (1 - each.start) for each in run.plan.updates}
    before = copy.deepcopy(state.state_dict())
    parts = []
    try:
        run.generator.begin_updates()
        for kind, update in work.items():
            if kind in updates:
                update()  # the first of a kind fills caches
                parts.append((updates[kind], measure(update, networks)))
    finally:
        state.load_state_dict(before)
    return add_up(parts)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started
