"""Conflicts within a recipe and with its teacher's contract, each with a way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfadc.recipe.schema import num_micro_batches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfadc.contract import ImageContract
    from dfadc.recipe.schema import Recipe

#: A conflict, and the way out of it.
Conflict = tuple[str, str]


def find_conflicts(recipe: Recipe, contract: ImageContract) -> list[Conflict]:
    """All settings of a recipe that cannot be combined."""
    return [
        *_student_conflicts(recipe),
        *_generator_conflicts(recipe),
        *_class_conflicts(recipe, contract),
        *_batch_conflicts(recipe),
    ]


def _student_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """The student's images and its loss."""
    student, replay = recipe.student, recipe.replay
    if student.l1 == student.scaled_l1 == student.kl == 0:
        yield "student.l1, scaled_l1 and kl are all 0: the student would learn nothing", "set one above 0"
    if student.kl == 0 and student.temperature != 1:
        yield "student.temperature softens the KL term, and student.kl is 0", "--set student.kl=1"
    if replay.balanced and replay.share == 0:
        yield "replay.balanced chooses among replayed images, and replay.share is 0", "--set replay.balanced=false"
    if (total := replay.share + replay.procedural_share) > 1:
        yield f"replay.share + replay.procedural_share = {total:g} is more than a whole batch", "lower one of them"
    if replay.share < 1:
        return
    if student.start == 0:
        way = "--set student.start=0.1 fills it first"
        yield "with replay.share = 1 the student would begin on an empty replay buffer", way
    if replay.repeats:
        problem = "replay.repeats repeats batches, and with replay.share = 1 every image is a repetition"
        yield problem, f"--set student.steps={student.steps + replay.repeats}, --set replay.repeats=0"


def _generator_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """The generator, its latents and its terms."""
    rules, prior = recipe.generator, recipe.prior
    if rules.latents == "noisy" and recipe.replay.share < 1:
        problem = "noisy latents belong to one batch, which reaches the student through the replay buffer"
        yield f"{problem}: replay.share is {recipe.replay.share:g}", "--set replay.share=1"
    if rules.width != 1 and rules.architecture != "scalable":
        way = "--set generator.width=1, --set generator.architecture=scalable"
        yield f"generator.width is for scalable generators, not for {rules.architecture}", way
    if prior.batch_norm_momentum > 0 and prior.batch_norm == 0:
        yield "prior.batch_norm_momentum is set, and prior.batch_norm is 0", "--set prior.batch_norm=1"


def _class_conflicts(recipe: Recipe, contract: ImageContract) -> Iterator[Conflict]:
    """Settings that need one class an image."""
    if contract.task == "classification":
        return
    asked = {
        "generator.latents = noisy": recipe.generator.latents == "noisy",
        "replay.balanced": recipe.replay.balanced and contract.is_dense,
    }
    has = "one for every pixel" if contract.is_dense else "several labels"
    for field, is_set in asked.items():
        if is_set:
            yield f"{field} needs one class an image, and this teacher has {has}", "leave it away"


def _batch_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """The parts that a batch is cut into."""
    size = recipe.compute.micro_batch
    if recipe.batch_size // num_micro_batches(recipe.batch_size, size) < 2:
        problem = f"compute.micro_batch = {size} leaves a single image of {recipe.batch_size}, and batch norm needs two"
        yield problem, f"--set compute.micro_batch={max(4, size)}"
