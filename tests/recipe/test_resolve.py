"""Does a recipe fit a teacher?"""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.recipe.load import change_recipe, load_recipe
from dfadc.recipe.resolve import check_budget, fit_recipe, slow_down

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


POOL = ["replay.share=1", "student.start=0.1"]
FREE_PIXELS = ["generator.architecture=free_pixels", "generator.latent_dim=0", "generator.latents=optimised"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["student.l1=0", "student.kl=0"], "the student would learn nothing"),
        (["student.kl=0", "student.temperature=4"], "student.temperature softens the KL term"),
        (["augmentation.shift=24"], r"augmentation.shift = 24 is not below the image's side \(32, 24\)"),
        (["replay.share=0"], "move replayed images"),
        (["replay.share=0", "augmentation.shift=0", "augmentation.flip=true"], "move replayed images"),
        (["replay.share=0", "augmentation.shift=0", "replay.balanced=true"], "replay.balanced chooses among"),
        (
            ["replay.share=0.7", "replay.average_share=0.5"],
            "procedural_share = 1.45 is more than a whole batch",
        ),
        (["replay.procedural_share=0.6"], r"replay.procedural_share = 1.1 is more than a whole batch"),
        (["replay.average_share=0.5", "generator.ema_decay=0"], "drawn by the averaged generator"),
        (["replay.share=1"], "begin on an empty ring"),
        ([*POOL, "replay.echoes=3", "adapt=false"], "it sees only repetitions"),
        (["generator.latents=optimised"], "latents that are optimised belong to one batch.* replay.share is 0.5"),
        (["generator.latents=noisy"], "latents that are noisy belong to one batch"),
        (["generator.latent_rate=2"], "fresh ones stay"),
        (["generator.latent_dim=0"], "is for free_pixels alone"),
        (["generator.architecture=paper", "generator.width=0.5"], "generator.width is for scalable generators"),
        (["generator.architecture=free_pixels", "generator.latent_dim=0"], "nothing that moves but latents"),
        ([*POOL, "generator.architecture=free_pixels", "generator.latents=optimised"], "as long as the image is large"),
        ([*POOL, *FREE_PIXELS, "generator.meta=fomaml"], "no weights that could be meta-learned"),
        ([*POOL, *FREE_PIXELS, "generator.reset_every=2"], "no weights that could be meta-learned or begin anew"),
        (
            ["generator.adversarial=0", "prior.batch_norm=0", "prior.one_hot=0", "prior.balance=0"],
            "the generator would learn nothing",
        ),
        (["generator.temperature=3"], "generator.temperature softens no l1"),
        (["generator.adversarial=0", "generator.adversarial_start=0.1"], "generator.adversarial_start is set"),
        (["prior.batch_norm=0", "prior.batch_norm_momentum=0.9"], "prior.batch_norm_momentum is set"),
        (["prior.balance=0", "prior.balance_momentum=0.9"], "prior.balance_momentum is set"),
        (["prior.targets=balanced"], "gives each latent a class, and fresh ones have none"),
        ([*POOL, "generator.latents=noisy", "prior.targets=balanced", "prior.one_hot=0"], "prior.one_hot is 0"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_a_way_out(overrides: list[str], problem: str) -> None:
    with pytest.raises(DfadcError, match=problem) as caught:
        fit_recipe(load_recipe("auto", overrides), CONTRACT, 4)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_all_conflicts_are_named_at_once() -> None:
    with pytest.raises(DfadcError) as caught:
        fit_recipe(
            load_recipe("auto", ["augmentation.shift=24", "replay.share=1", "generator.temperature=3"]), CONTRACT, 4
        )
    for part in ("augmentation.shift", "empty ring", "generator.temperature"):
        assert part in caught.value.message


@pytest.mark.parametrize(
    "overrides",
    [
        ["augmentation.shift=23"],
        ["student.l1=0"],
        ["replay.share=0", "augmentation.shift=0"],
        ["replay.share=0.5", "replay.average_share=0.25"],
        ["generator.latents=shared"],
        ["generator.discrepancy=kl", "generator.temperature=3"],
        ["prior.balance_momentum=0.9", "prior.batch_norm_momentum=0.9"],
        ["generator.reset_every=5"],
    ],
)
def test_what_can_be_combined_is_taken(overrides: list[str]) -> None:
    recipe = load_recipe("auto", overrides)
    assert fit_recipe(recipe, CONTRACT, 4)[0] == recipe


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ([*POOL, "generator.latents=noisy"], "generator.latents = noisy"),
        ([*POOL, "generator.latents=optimised", "prior.targets=balanced"], "prior.targets = balanced"),
        (["replay.balanced=true", "adapt=false"], "replay.balanced"),
    ],
)
def test_classes_of_images_are_nothing_for_dense_outputs(overrides: list[str], field: str) -> None:
    recipe = load_recipe("auto", [*overrides, "replay.echoes=0", "replay.procedural_share=0"])
    dense = ImageContract((3, 32, 24), 10, mean=(0.5,) * 3, std=(0.2,) * 3, task="segmentation")
    with pytest.raises(DfadcError, match=f"{field} needs one class an image, and this teacher has one for every pixel"):
        fit_recipe(recipe, dense, 4)
    assert fit_recipe(recipe, CONTRACT, 4)[0] == recipe


def test_recipes_that_adapt_replay_dense_images_without_balance_and_say_so() -> None:
    dense = ImageContract((3, 32, 24), 10, mean=(0.5,) * 3, std=(0.2,) * 3, task="segmentation")
    fitted, notes = fit_recipe(load_recipe("dfad+"), dense, 0)
    assert fitted == change_recipe(load_recipe("dfad+"), {"replay.balanced": False})
    assert any("replay.balanced is off" in note for note in notes)


def test_auto_takes_dense_settings_where_it_was_left_as_it_is() -> None:
    dense = ImageContract((3, 32, 24), 10, mean=(0.5,) * 3, std=(0.2,) * 3, task="segmentation")
    fitted, notes = fit_recipe(load_recipe("auto", ["batch_size=7"]), dense, 4)
    expected = load_recipe("auto-seg")
    assert (fitted.batch_size, fitted.generator.discrepancy) == (7, "log_l1")
    assert fitted.prior == expected.prior
    assert fitted.verify == expected.verify
    assert any("generator.discrepancy = log_l1" in note and "batch_size" not in note for note in notes)
    assert fit_recipe(fitted, dense, 4)[0] == fitted, "a resumed run is fitted again"
    assert fit_recipe(load_recipe("auto"), CONTRACT, 4)[0].generator.discrepancy == "l1"


# -------------------------------------------------------------------------------------------------- the budget


def test_a_warm_up_is_said() -> None:
    recipe = load_recipe("auto", [*POOL, "steps=15", "batch_size=64", "student.steps=3"])
    # A tenth of 15 steps is a step and a half: the student begins with the third.
    assert check_budget(recipe) == (
        "warm-up: the first 2 of 15 steps fill the ring with 128 images; the student's 39 updates follow",
    )
    assert check_budget(load_recipe("auto")) == ()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            [*POOL, "steps=1"],
            "budget of 1 steps is too small for the warm-up: with student.start = 0.1 the student would",
        ),
        (["student.start=0.9", "steps=5"], "with student.start = 0.9"),
        (["generator.adversarial_start=1.0"], "the discrepancy would never count"),
        (["generator.adversarial_start=0.5", "steps=1"], "the discrepancy would never count"),
    ],
)
def test_a_budget_too_small_for_the_warm_up_is_refused(overrides: list[str], problem: str) -> None:
    with pytest.raises(DfadcError, match=problem) as caught:
        fit_recipe(load_recipe("auto", overrides), CONTRACT, 4)
    assert caught.value.exit_code == 2


@settings(deadline=None, max_examples=100)
@given(start=st.floats(0, 0.99), more=st.integers(0, 3))
def test_the_steps_that_the_hint_names_are_enough(start: float, more: int) -> None:
    recipe = change_recipe(load_recipe("auto"), {"student.start": start, "steps": 1})
    try:
        check_budget(recipe)
    except DfadcError as exc:
        (steps,) = re.findall(r"at least (\d+) steps", exc.hint)
        check_budget(change_recipe(recipe, {"steps": int(steps) + more}))


# ---------------------------------------------------------------------------------------------- auto without BN


def test_auto_takes_l1_in_units_of_the_logits_where_no_batch_norm_holds_their_scale() -> None:
    fitted, notes = fit_recipe(load_recipe("auto"), CONTRACT, 0)
    assert (fitted.student.l1, fitted.student.scaled_l1) == (0.0, 1.0)
    assert fitted.generator.discrepancy == "scaled_l1"
    assert any("in units of its logits" in note for note in notes)
    # What the user chose instead stays.
    chosen, _ = fit_recipe(load_recipe("auto", ["student.l1=0", "generator.discrepancy=kl"]), CONTRACT, 0)
    assert (chosen.student.l1, chosen.student.scaled_l1, chosen.student.kl) == (0.0, 0.0, 1.0)
    assert chosen.generator.discrepancy == "kl"


def test_auto_says_what_it_plays() -> None:
    _, (game, *_) = fit_recipe(load_recipe("auto"), CONTRACT, 20)
    assert game == (
        "recipe auto: the generator seeks 1 l1 + 1 batch_norm + 1 one_hot + 5 balance, the student learns 1 l1 + 1 kl "
        "+ 20 hints on images that are 25% fresh, 50% replayed, 25% procedural; 50% of its batches are mixed up; 10 of "
        "15 updates repeat what it was shown"
    )
    _, (game, *reasons) = fit_recipe(load_recipe("auto"), CONTRACT, 0)
    assert "seeks 1 scaled_l1 + 1 one_hot + 5 balance, the student learns 1 scaled_l1 + 1 kl" in game
    assert reasons
    _, (game, *_) = fit_recipe(load_recipe("dfad+"), CONTRACT, 0)
    assert "10% fresh, 40% replayed, 50% procedural" in game


def test_auto_plays_as_dfad_plus_without_batch_norm_where_it_was_left_as_it_is() -> None:
    chosen = load_recipe("auto", ["student.optimizer.learning_rate=0.05", "steps=77"])
    fitted, notes = fit_recipe(chosen, CONTRACT, 0)
    own = {"steps": 77, "student.optimizer.learning_rate": 0.05}
    keep = {"name": "auto", "description": chosen.description, "pinned": sorted(own), **own}
    assert fitted == change_recipe(load_recipe("dfad+"), keep)
    assert any("the settings of dfad+ are taken" in note and "optimizer.kind = adam" in note for note in notes)
    assert fit_recipe(load_recipe("dfad+"), CONTRACT, 0)[0] == load_recipe("dfad+")


def test_auto_leaves_what_the_user_set_even_where_that_is_its_own_default() -> None:
    """A control of one of dfad+'s settings is one: it once was not."""
    own = {"replay.procedural_share": 0.25, "augmentation.mixup": 0.5}
    shipped = load_recipe("auto")
    assert (shipped.replay.procedural_share, shipped.augmentation.mixup) == (0.25, 0.5)
    fitted, notes = fit_recipe(load_recipe("auto", [f"{path}={value}" for path, value in own.items()]), CONTRACT, 0)
    assert (fitted.replay.procedural_share, fitted.augmentation.mixup) == (0.25, 0.5)
    assert fitted.student.optimizer.kind == "adam"
    assert not any("procedural_share" in note for note in notes)
    assert fit_recipe(fitted, CONTRACT, 0)[0] == fitted, "a resumed run is fitted again"
    whole, _ = fit_recipe(load_recipe("auto", ["augmentation={shift=2, mixup=0.5}"]), CONTRACT, 0)
    assert whole.augmentation.mixup == 0.5


def test_auto_as_dfad_plus_does_without_pixels_where_mean_and_std_are_unknown() -> None:
    fitted, _ = fit_recipe(load_recipe("auto"), ImageContract((3, 32, 24), 10), 0)
    assert (fitted.generator.output, fitted.replay.procedural_share) == ("standardised", 0.5)


def test_procedural_images_give_way_to_what_the_user_asks_for() -> None:
    for num_batch_norms, own in ((4, 0.25), (0, 0.5)):
        wide, notes = fit_recipe(load_recipe("auto", ["replay.share=0.95"]), CONTRACT, num_batch_norms)
        assert (wide.replay.share, wide.replay.procedural_share) == (0.95, 0.05)
        assert any("leave no more of a batch: replay.procedural_share = 0.05" in note for note in notes)
        assert fit_recipe(wide, CONTRACT, num_batch_norms)[0] == wide, "a resumed run is fitted again"
        narrow, _ = fit_recipe(load_recipe("auto", ["replay.share=0.3"]), CONTRACT, num_batch_norms)
        assert narrow.replay.procedural_share == own
    # Room enough for auto's own share, not for that of dfad+: what is said is what is played.
    between, notes = fit_recipe(load_recipe("auto", ["replay.share=0.6"]), CONTRACT, 0)
    assert between.replay.procedural_share == 0.4
    assert any("replay.procedural_share = 0.4" in note for note in notes)


def test_auto_stays_the_users_where_dfad_plus_does_not_go_with_it() -> None:
    """``generator.width`` is for scalable generators alone."""
    fitted, notes = fit_recipe(load_recipe("auto", ["generator.architecture=paper"]), CONTRACT, 0)
    assert (fitted.generator.width, fitted.replay.procedural_share) == (1.0, 0.25)
    assert any("its settings and yours cannot be combined" in note for note in notes)


def test_auto_keeps_its_composition_where_batch_norms_guide_the_generator() -> None:
    fitted, _ = fit_recipe(load_recipe("auto"), CONTRACT, 9)
    assert fitted == load_recipe("auto")
    assert (fitted.student.l1, fitted.student.scaled_l1, fitted.generator.discrepancy) == (1.0, 0.0, "l1")


# ---------------------------------------------------------------------------------------- a student that inherits


def test_a_student_that_inherits_moves_in_smaller_steps_once() -> None:
    recipe = load_recipe("auto", ["student.inherited_rate=0.5"])
    slower, (note,) = slow_down(recipe)
    assert slower.student.optimizer.learning_rate == recipe.student.optimizer.learning_rate / 2
    assert "needs smaller steps: student.optimizer.learning_rate = 0.1" in note
    assert slow_down(slower) == (slower, ()), "a resumed run is prepared again"


def test_the_users_own_rate_is_that_of_a_student_that_inherits_too() -> None:
    recipe = load_recipe("auto", ["student.inherited_rate=0.5", "student.optimizer.learning_rate=0.03"])
    assert slow_down(recipe) == (recipe, ())
