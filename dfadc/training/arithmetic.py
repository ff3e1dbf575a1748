"""The arithmetic of a step, counted from what each network takes to go forward once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfadc.recipe.schema import Recipe


def flops_per_step(recipe: Recipe, *, teacher: int, student: int, generator: int) -> float:
    """Floating-point operations of an average step of the run.

    A backward pass takes twice the forward one for a network that moves, and as much as the forward one where a
    gradient only passes through on its way to the images.

    Args:
        recipe: the run's.
        teacher: operations of the teacher for one image.
        student: the same of the student.
        generator: the same of the generator.
    """
    rules, replay = recipe.generator, recipe.replay
    drawn = generator * (1 - replay.share)
    learns = recipe.student.steps * (drawn + teacher + 3 * student) * (1 - recipe.student.start)
    repeats = replay.repeats * 3 * student * (1 - recipe.student.start)
    seeks = rules.steps * (3 * generator + 2 * (teacher + student))
    leaves = generator if replay.share == 1 else 0
    return recipe.batch_size * (learns + seeks + leaves + repeats)
