"""Lengths of the training that makes verification samples, bounded by the run's own. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfadc.recipe.schema import Recipe

#: Updates of the prior generator, of each adversary, and of the pixels of the prior's samples; all of them at most the
#: shares below.
PRIOR_STEPS, ADVERSARY_STEPS, REFINE_STEPS = 600, 150, 40
#: Adversaries trained; the most harmful one is kept.
ADVERSARY_RESTARTS = 2
#: Bound of both generators as a share of the run's own generator updates, so that finishing costs little of it: in a
#: step of `auto` the teacher answers six batches, in an update of a verification generator one.
_PRIOR_SHARE, _ADVERSARY_SHARE = 1 / 3, 1 / 10
#: The same for the pixels of the samples, of all images that the teacher answers in the run.
_REFINE_SHARE = 1 / 4
#: Steps of the run that the shares are taken of where it has none, for a student that stays as it starts.
_SHORTEST = 300


def verification_steps(recipe: Recipe) -> tuple[int, int]:
    """Updates of the prior generator and of each adversary, within their shares of the run's generator updates."""
    updates = (recipe.steps or _SHORTEST) * recipe.generator.steps
    prior, adversary = (max(1, int(share * updates)) for share in (_PRIOR_SHARE, _ADVERSARY_SHARE))
    return min(PRIOR_STEPS, prior), min(ADVERSARY_STEPS, adversary)


def refine_steps(recipe: Recipe, count: int) -> int:
    """Updates of the pixels of ``count`` samples."""
    answered = (recipe.steps or _SHORTEST) * (recipe.student.steps + recipe.generator.steps) * recipe.batch_size
    return min(REFINE_STEPS, int(_REFINE_SHARE * answered / max(1, count)))
