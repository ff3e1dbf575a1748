"""Does a recipe fit a teacher? What adapts is adapted and said; what cannot be combined is refused before any step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfadc.errors import DfadcError
from dfadc.recipe import Recipe, change_recipe

if TYPE_CHECKING:
    from dfadc.contract import ImageContract


def fit_recipe(recipe: Recipe, contract: ImageContract, num_batch_norms: int) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe as this teacher can play it, and what was changed and why.

    Args:
        recipe: as asked for; only one with ``adapt`` set is changed.
        contract: the teacher's.
        num_batch_norms: its batch-norm layers with running statistics.

    Raises:
        DfadcError: the recipe asks for what this teacher cannot give, or combines what cannot be combined.
    """
    notes: list[str] = []
    changes: dict[str, object] = {}
    if recipe.prior.batch_norm > 0 and num_batch_norms == 0:
        if not recipe.adapt:
            raise DfadcError(
                f"recipe {recipe.name} matches batch-norm statistics, and the teacher has no batch-norm layer with any",
                "--set prior.batch_norm=0, or --recipe auto",
            )
        changes["prior.batch_norm"] = 0.0
        notes.append("the teacher has no batch-norm statistics: prior.batch_norm is off")
    elif recipe.prior.batch_norm > 0:
        notes.append(f"the teacher has {num_batch_norms} batch-norm layers: their statistics guide the generator")
    if recipe.generator.output == "pixels" and not contract.has_pixels and recipe.adapt:
        changes["generator.output"] = "standardised"
        notes.append("mean and std are unknown: the generator's images are standardised instead of bounded to pixels")
    if recipe.student.l1 == 0 and recipe.student.kl == 0:
        raise DfadcError("student.l1 and student.kl are both 0: the student would learn nothing", "set one above 0")
    if recipe.augmentation.shift >= min(contract.input_size[1:]):
        raise DfadcError(
            f"augmentation.shift = {recipe.augmentation.shift} is not below the image's side {contract.input_size[1:]}"
        )
    if (recipe.augmentation.shift or recipe.augmentation.flip) and recipe.replay.share == 0:
        raise DfadcError(
            "augmentation.shift and flip move replayed images, and replay.share is 0",
            "--set replay.share=0.5, or --set augmentation.shift=0",
        )
    return (change_recipe(recipe, changes) if changes else recipe), tuple(notes)
