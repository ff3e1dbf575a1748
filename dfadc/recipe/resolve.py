"""Resolution of a recipe for a teacher and a student: defaults < recipe < overlays < what the user chose.

It happens once, before anything is built; the result is saved in the run and is not resolved again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from dfadc.errors import DfadcError
from dfadc.recipe.conflicts import find_conflicts
from dfadc.recipe.load import change_recipe, lay_over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfadc.contract import ImageContract
    from dfadc.recipe.schema import Recipe

#: The recipe that adapts to the teacher.
_AUTO = "auto"


class StudentFacts(NamedTuple):
    """Facts about a student that a recipe depends on.

    Args:
        architecture: its name.
        is_inherited: it starts from the teacher's weights.
        has_batch_norm: some of its layers are batch norms.
        num_hints: layers that correspond to the teacher's.
    """

    architecture: str
    is_inherited: bool
    has_batch_norm: bool
    num_hints: int


def resolve_recipe(
    recipe: Recipe, contract: ImageContract, *, num_batch_norms: int, student: StudentFacts
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe for this teacher and student, and notes on what was changed and why.

    Args:
        recipe: as asked for; only ``auto`` is changed, and only where the user chose nothing.
        contract: the teacher's.
        num_batch_norms: its batch-norm layers with running statistics.
        student: of the run.

    Raises:
        DfadcError: the recipe asks for what teacher or student cannot give, or combines what cannot be combined.
    """
    notes: list[str] = []
    if recipe.name == _AUTO:
        for overlay, reason in _overlays(recipe, contract, num_batch_norms, student):
            recipe = _apply_overlay(recipe, overlay, reason, contract, notes)
        recipe = _make_room(recipe, notes)
    if recipe.student.hints > 0 and not student.num_hints:
        recipe = _without_hints(recipe, student.architecture)
    if recipe.prior.batch_norm > 0 and num_batch_norms == 0:
        raise DfadcError(
            f"recipe {recipe.name} matches batch-norm statistics, and the teacher has no batch-norm layer with any",
            "--set prior.batch_norm=0, or --recipe auto",
        )
    if recipe.prior.batch_norm > 0:
        notes.append(f"the teacher has {num_batch_norms} batch-norm layers: their statistics guide the generator")
    if recipe.generator.architecture == "scalable" and not contract.has_pixels:
        notes.append("mean and std are unknown: the generator's images are standardised instead of bounded to pixels")
    if not recipe.steps and not student.is_inherited:
        raise DfadcError(
            f"0 steps, and {student.architecture} has nothing to start from: it is not the teacher made smaller",
            "--steps 100 or more, or a student of the teacher's own family",
        )
    if conflicts := find_conflicts(recipe, contract):
        raise DfadcError("; ".join(problem for problem, _ in conflicts), "; ".join(way for _, way in conflicts))
    warm_up_notes(recipe)
    return recipe, (describe_losses(recipe), *notes)


def _overlays(
    recipe: Recipe, contract: ImageContract, num_batch_norms: int, student: StudentFacts
) -> Iterator[tuple[str, str]]:
    """Overlays that recipe auto takes, in this order, and the reason of each."""
    if contract.task == "multilabel":
        yield "multilabel", "the teacher gives an image several labels"
    if contract.task == "segmentation":
        yield "segmentation", "the teacher answers every pixel"
        if num_batch_norms == 0:
            yield "dense_without_batch_norm", "the teacher has no batch-norm statistics"
        return
    if not student.is_inherited and not recipe.student.weights:
        yield "random_start", "a student from random weights learns one class of an untrained generator"
    if num_batch_norms == 0:
        yield "without_batch_norm", "the teacher has no batch-norm statistics"
    if not student.has_batch_norm:
        yield "student_without_batch_norm", "a student without batch norm bears no large steps"
    elif student.is_inherited:
        yield "inherited", "a student that starts from the teacher's weights needs smaller steps"


def _apply_overlay(recipe: Recipe, overlay: str, reason: str, contract: ImageContract, notes: list[str]) -> Recipe:
    """The recipe with an overlay; as it was where that collides with the user's own settings."""
    overlaid, changes = lay_over(recipe, overlay)
    if not changes:
        return recipe
    room: list[str] = []
    overlaid = _make_room(overlaid, room)
    if find_conflicts(overlaid, contract) and not find_conflicts(recipe, contract):
        notes.append(f"{reason}, but the settings of overlay {overlay} and yours cannot be combined: it is left out")
        return recipe
    taken = ", ".join(f"{path} = {value}" for path, value in changes.items())
    notes += [f"{reason}: overlay {overlay} sets {taken}; --set keeps a setting as it is", *room]
    return overlaid


def _make_room(recipe: Recipe, notes: list[str]) -> Recipe:
    """Procedural images give way to the replayed ones that the user asks for."""
    path, replay = "replay.procedural_share", recipe.replay
    rest = round(1 - replay.share, 9)
    if recipe.is_assigned(path) or rest >= replay.procedural_share:
        return recipe
    notes.append(f"replayed images leave no more of a batch: {path} = {rest:g}")
    return change_recipe(recipe, {path: rest}).with_assigned(recipe.assigned)


def _without_hints(recipe: Recipe, architecture: str) -> Recipe:
    """The recipe for a student that shares no layer with its teacher.

    Raises:
        DfadcError: the user asks for hints.
    """
    path = "student.hints"
    if recipe.is_assigned(path) or recipe.name != _AUTO:
        raise DfadcError(
            f"{path} = {recipe.student.hints:g} compares the student's layers with the teacher's, and {architecture} "
            "is not the teacher made narrower",
            f"--set {path}=0, or a student of the teacher's own family",
        )
    return change_recipe(recipe, {path: 0.0}).with_assigned(recipe.assigned)


def describe_losses(recipe: Recipe) -> str:
    """One line on the losses of generator and student and on the student's images."""
    student, prior, replay = recipe.student, recipe.prior, recipe.replay
    seeks = {recipe.generator.discrepancy: 1.0} | {name: getattr(prior, name) for name in PRIORS}
    learns = {"l1": student.l1, "scaled_l1": student.scaled_l1, "kl": student.kl, "hints": student.hints}
    shares = {"replayed": replay.share, "procedural": replay.procedural_share}
    images = {"fresh": 1 - sum(shares.values()), **shares}
    seen = ", ".join(f"{share:.0%} {source}" for source, share in images.items() if share > 0)
    alone = student.start if replay.procedural_share else 0.0
    start = f"; the first {alone:.0%} of the steps show it procedural images alone" if alone else ""
    repeats = f"; {replay.repeats} of {recipe.student_updates} updates repeat a batch" if replay.repeats else ""
    return (
        f"recipe {recipe.name}: the generator seeks {_sum(seeks)}, the student learns {_sum(learns)} on images that "
        f"are {seen}; {recipe.augmentation.mixup:.0%} of its batches are mixed up{repeats}{start}"
    )


#: Priors by name, as the recipe's section and the generator's terms call them.
PRIORS = ("batch_norm", "one_hot", "balance")


def _sum(weights: dict[str, float]) -> str:
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight > 0)


def warm_up_notes(recipe: Recipe) -> tuple[str, ...]:
    """A line for the plan on what a warm-up leaves of the run's steps; none where there is no warm-up.

    Raises:
        DfadcError: the steps are too few for the warm-up.
    """
    if not recipe.steps:
        return ("0 steps: the student stays as it starts",)
    student_start, adversarial_start = recipe.first_update, recipe.generator.adversarial_start
    start = math.ceil(student_start * recipe.steps)
    if start >= recipe.steps:
        raise DfadcError(
            f"a budget of {recipe.steps} steps is too small for the warm-up: with student.start = {student_start:g} "
            "the student would never be updated",
            f"give the run at least {math.ceil(1 / (1 - student_start)) + 1} steps (--steps or --minutes)",
        )
    if math.ceil(adversarial_start * recipe.steps) >= recipe.steps:
        raise DfadcError(
            f"a budget of {recipe.steps} steps is too small for the warm-up: with generator.adversarial_start = "
            f"{adversarial_start:g} the discrepancy would never count",
            "give the run more steps (--steps or --minutes), or --set generator.adversarial_start=0",
        )
    if not start:
        return ()
    images = min(start * recipe.batch_size, recipe.replay.capacity)
    updates = (recipe.steps - start) * recipe.student.steps
    filled = f"the first {start} of {recipe.steps} steps fill the replay buffer with {images:,} images"
    return (f"warm-up: {filled}; the student's {updates:,} updates follow",)
