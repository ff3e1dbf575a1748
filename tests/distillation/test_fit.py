"""Does a recipe fit a teacher?"""

from __future__ import annotations

import pytest

from dfadc.contract import ImageContract
from dfadc.distillation.fit import fit_recipe
from dfadc.errors import DfadcError
from dfadc.recipe import load_recipe

CONTRACT = ImageContract((3, 32, 24), 10, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def test_auto_says_how_many_batch_norms_guide_the_generator() -> None:
    recipe = load_recipe("auto")
    fitted, notes = fit_recipe(recipe, CONTRACT, 20)
    assert fitted == recipe
    assert any("20 batch-norm layers" in note for note in notes)


def test_auto_drops_what_a_teacher_without_batch_norm_cannot_give_and_says_so() -> None:
    fitted, notes = fit_recipe(load_recipe("auto"), CONTRACT, 0)
    assert fitted.prior.batch_norm == 0
    assert fitted.prior.balance == load_recipe("auto").prior.balance
    assert any("prior.batch_norm is off" in note for note in notes)


def test_auto_does_without_pixels_where_mean_and_std_are_unknown_and_says_so() -> None:
    recipe = load_recipe("auto", ["generator.output=pixels"])
    fitted, notes = fit_recipe(recipe, ImageContract((3, 32, 24), 10), 4)
    assert fitted.generator.output == "standardised"
    assert any("mean and std are unknown" in note for note in notes)
    assert fit_recipe(recipe, CONTRACT, 4)[0].generator.output == "pixels"


def test_fitting_twice_changes_nothing_more() -> None:
    """A resumed run fits the recipe that its first start wrote."""
    once, _ = fit_recipe(load_recipe("auto"), CONTRACT, 0)
    twice, _ = fit_recipe(once, CONTRACT, 0)
    assert twice == once


def test_a_recipe_that_does_not_adapt_is_refused_instead() -> None:
    recipe = load_recipe("dfad", ["prior.batch_norm=1"])
    with pytest.raises(DfadcError, match="recipe dfad matches batch-norm statistics") as caught:
        fit_recipe(recipe, CONTRACT, 0)
    assert "--set prior.batch_norm=0" in caught.value.hint
    assert fit_recipe(recipe, CONTRACT, 1)[0] == recipe


def test_the_paper_fits_any_teacher_as_it_is() -> None:
    recipe = load_recipe("dfad")
    assert fit_recipe(recipe, CONTRACT, 0) == (recipe, ())


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["student.l1=0", "student.kl=0"], "the student would learn nothing"),
        (["augmentation.shift=24"], r"augmentation.shift = 24 is not below the image's side \(32, 24\)"),
        (["replay.share=0"], "move replayed images"),
        (["replay.share=0", "augmentation.shift=0", "augmentation.flip=true"], "move replayed images"),
    ],
)
def test_what_cannot_be_combined_is_refused(overrides: list[str], problem: str) -> None:
    with pytest.raises(DfadcError, match=problem):
        fit_recipe(load_recipe("auto", overrides), CONTRACT, 4)


@pytest.mark.parametrize(
    "overrides", [["augmentation.shift=23"], ["student.l1=0"], ["replay.share=0", "augmentation.shift=0"]]
)
def test_what_can_be_combined_is_taken(overrides: list[str]) -> None:
    recipe = load_recipe("auto", overrides)
    assert fit_recipe(recipe, CONTRACT, 4)[0] == recipe
