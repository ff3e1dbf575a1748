"""Resolution: defaults < recipe < overlays for the teacher < what the user chose."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.recipe.load import change_recipe, load_recipe, recipe_to_toml
from dfadc.recipe.resolve import StudentFacts, resolve_recipe, warm_up_notes

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.recipe.schema import Recipe

CONTRACT = ImageContract((3, 32, 24), 10, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
DENSE = ImageContract((3, 32, 24), 10, mean=(0.5,) * 3, std=(0.2,) * 3, task="segmentation")
NARROWER = StudentFacts("compact_resnet_20", is_inherited=False, has_batch_norm=True, num_hints=3)
COPY = NARROWER._replace(is_inherited=True)
STRANGER = NARROWER._replace(num_hints=0)
#: Settings that auto takes for a student that starts from random weights.
RANDOM_START = {
    "replay.share": 0.3,
    "replay.procedural_share": 0.45,
    "student.start": 0.3,
    "augmentation.mixup": 0.0,
}


def resolve(
    recipe: Recipe,
    contract: ImageContract = CONTRACT,
    *,
    num_batch_norms: int = 4,
    student: StudentFacts = NARROWER,
) -> tuple[Recipe, tuple[str, ...]]:
    return resolve_recipe(recipe, contract, num_batch_norms=num_batch_norms, student=student)


def test_auto_keeps_its_composition_where_a_student_begins_with_weights_of_a_file(tmp_path: Path) -> None:
    recipe = load_recipe("auto", [f"student.weights={tmp_path / 'student.pt'}"])
    resolved, notes = resolve(recipe, num_batch_norms=20)
    assert resolved == recipe
    assert any("20 batch-norm layers" in note for note in notes)
    assert not any("overlay" in note for note in notes)


def test_a_student_from_random_weights_begins_on_procedural_images() -> None:
    resolved, notes = resolve(load_recipe("auto"))
    assert resolved == change_recipe(load_recipe("auto"), RANDOM_START)
    assert any("overlay random_start sets student.start = 0.3" in note for note in notes)
    for other in (COPY, COPY._replace(has_batch_norm=False)):
        assert resolve(load_recipe("auto"), student=other)[0].student.start == 0
    assert resolve(load_recipe("auto"), num_batch_norms=0)[0].student.start == 0.3
    assert resolve(load_recipe("auto"), DENSE)[0].student.start == 0


def test_images_are_standardised_where_mean_and_std_are_unknown_and_the_plan_says_so() -> None:
    for recipe, is_noted in (("auto", True), ("dfad", False)):
        _, notes = resolve(load_recipe(recipe), ImageContract((3, 32, 24), 10))
        assert any("mean and std are unknown" in note for note in notes) is is_noted


@pytest.mark.parametrize("recipe", ["dfad", "pool"])
def test_no_other_recipe_than_auto_is_changed(recipe: str) -> None:
    for student in (NARROWER, COPY, STRANGER):
        assert resolve(load_recipe(recipe), student=student)[0] == load_recipe(recipe)


def test_a_recipe_that_needs_batch_norm_is_refused_for_a_teacher_without() -> None:
    for recipe in (load_recipe("pool"), load_recipe("auto", ["prior.batch_norm=1"])):
        with pytest.raises(DfadcError, match=f"recipe {recipe.name} matches batch-norm statistics") as caught:
            resolve(recipe, num_batch_norms=0)
        assert caught.value.exit_code == 2
        assert "--set prior.batch_norm=0" in caught.value.hint


# ---------------------------------------------------------------------------------------------------- conflicts

POOL = ["replay.share=1", "student.start=0.1", "replay.procedural_share=0"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["student.l1=0", "student.kl=0"], "the student would learn nothing"),
        (["student.kl=0", "student.temperature=4"], "student.temperature softens the KL term"),
        (["replay.share=0", "replay.balanced=true"], "replay.balanced chooses among"),
        (["replay.procedural_share=0.6"], r"replay.procedural_share = 1.1 is more than a whole batch"),
        (["replay.share=1"], "begin on an empty replay buffer"),
        ([*POOL, "replay.repeats=3"], "every image is a repetition"),
        (["generator.latents=noisy"], "noisy latents belong to one batch.* replay.share is 0.5"),
        (["generator.architecture=paper", "generator.width=0.5"], "generator.width is for scalable generators"),
        (["prior.batch_norm=0", "prior.batch_norm_momentum=0.9"], "prior.batch_norm_momentum is set"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused_with_a_way_out(overrides: list[str], problem: str) -> None:
    with pytest.raises(DfadcError, match=problem) as caught:
        resolve(load_recipe("auto", overrides), student=COPY)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_all_conflicts_are_named_at_once() -> None:
    recipe = load_recipe("auto", ["replay.share=1", "prior.batch_norm_momentum=0.9", "prior.batch_norm=0"])
    with pytest.raises(DfadcError) as caught:
        resolve(recipe, student=COPY)
    for part in ("empty replay buffer", "prior.batch_norm_momentum", "every image is a repetition"):
        assert part in caught.value.message


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.l1=0"],
        ["replay.share=0"],
        ["replay.share=0.5", "replay.procedural_share=0.5"],
        ["prior.batch_norm_momentum=0.9"],
        [*POOL, "replay.repeats=0", "generator.latents=noisy"],
    ],
)
def test_settings_that_can_be_combined_are_taken(overrides: list[str]) -> None:
    recipe = load_recipe("auto", [*overrides, "student.optimizer.learning_rate=0.1"])
    assert resolve(recipe, student=COPY)[0] == recipe


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ([*POOL, "generator.latents=noisy"], "generator.latents = noisy"),
        (["replay.balanced=true"], "replay.balanced"),
    ],
)
def test_classes_of_images_are_nothing_for_dense_outputs(overrides: list[str], field: str) -> None:
    recipe = load_recipe("auto", [*overrides, "replay.repeats=0", "student.optimizer.learning_rate=0.1"])
    with pytest.raises(DfadcError, match=f"{field} needs one class an image, and this teacher has one for every pixel"):
        resolve(recipe, DENSE)
    assert resolve(recipe, student=COPY)[0] == recipe


# -------------------------------------------------------------------------------------------------- the budget


def test_a_warm_up_is_said() -> None:
    recipe = load_recipe("auto", [*POOL, "steps=15", "batch_size=64", "student.steps=3"])
    # A tenth of 15 steps is a step and a half: the student begins with the third.
    assert warm_up_notes(recipe) == (
        "warm-up: the first 2 of 15 steps fill the replay buffer with 128 images; the student's 39 updates follow",
    )
    assert warm_up_notes(load_recipe("auto")) == ()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            [*POOL, "replay.repeats=0", "steps=1"],
            "budget of 1 steps is too small for the warm-up: with student.start = 0.1 the student would",
        ),
        (["student.start=0.9", "steps=5", "replay.procedural_share=0"], "with student.start = 0.9"),
        (["generator.adversarial_start=0.5", "steps=1"], "the discrepancy would never count"),
    ],
)
def test_a_budget_too_small_for_the_warm_up_is_refused(overrides: list[str], problem: str) -> None:
    with pytest.raises(DfadcError, match=problem) as caught:
        resolve(load_recipe("auto", overrides))
    assert caught.value.exit_code == 2


@settings(deadline=None, max_examples=100)
@given(start=st.floats(0, 0.99), more=st.integers(0, 3))
def test_the_steps_that_the_hint_names_are_enough(start: float, more: int) -> None:
    recipe = change_recipe(load_recipe("auto"), {"student.start": start, "steps": 1, "replay.procedural_share": 0})
    try:
        warm_up_notes(recipe)
    except DfadcError as exc:
        (steps,) = re.findall(r"at least (\d+) steps", exc.hint)
        warm_up_notes(change_recipe(recipe, {"steps": int(steps) + more}))


# -------------------------------------------------------------------------------------------------- the overlays

#: Settings that auto takes for a teacher without batch norm, and for one that answers every pixel.
WITHOUT_BATCH_NORM = {
    "student.l1": 0.0,
    "student.scaled_l1": 1.0,
    "student.hints": 5.0,
    "generator.width": 0.25,
    "generator.discrepancy": "scaled_l1",
    "prior.batch_norm": 0.0,
    "replay.share": 0.4,
    "replay.procedural_share": 0.5,
    "replay.balanced": True,
    "augmentation.mixup": 0.25,
}
SEGMENTATION = {
    "batch_size": 16,
    "student.inherit": "off",
    "student.hints": 0.0,
    "generator.discrepancy": "log_l1",
    "prior.balance": 1.0,
    "replay.procedural_share": 0.0,
    "calibration.num_images": 256,
    "verify.num_samples": 512,
    "verify.min_coverage": 0.3,
}


def test_auto_takes_the_overlay_of_a_teacher_without_batch_norm_and_names_it() -> None:
    own = {"student.optimizer.learning_rate": 0.2}
    resolved, notes = resolve(change_recipe(load_recipe("auto"), own), num_batch_norms=0, student=COPY)
    assert resolved == change_recipe(load_recipe("auto"), WITHOUT_BATCH_NORM)
    (note,) = [note for note in notes if "overlay" in note]
    assert "no batch-norm statistics: overlay without_batch_norm sets" in note
    assert all(path in note for path in WITHOUT_BATCH_NORM)


@pytest.mark.parametrize("num_batch_norms", [0, 4])
@pytest.mark.parametrize("student", [NARROWER, COPY])
def test_a_student_without_batch_norm_is_trained_by_adam(num_batch_norms: int, student: StudentFacts) -> None:
    plain = student._replace(has_batch_norm=False)
    resolved, notes = resolve(load_recipe("auto"), num_batch_norms=num_batch_norms, student=plain)
    optimizer = resolved.student.optimizer
    assert (optimizer.kind, optimizer.learning_rate) == ("adam", 2e-3)
    assert any("without batch norm bears no large steps: overlay student_without_batch_norm sets" in n for n in notes)
    assert resolve(load_recipe("auto"), DENSE, student=plain)[0].student.optimizer.kind == "nesterov"


def test_auto_takes_the_overlay_of_a_teacher_that_answers_every_pixel() -> None:
    resolved, notes = resolve(load_recipe("auto"), DENSE, student=COPY)
    assert resolved == change_recipe(load_recipe("auto"), SEGMENTATION)
    assert any("answers every pixel: overlay segmentation sets" in note for note in notes)


def test_a_dense_teacher_without_batch_norm_is_learnt_in_units_of_its_logits() -> None:
    resolved, _ = resolve(load_recipe("auto"), DENSE, num_batch_norms=0)
    scaled = {"student.l1": 0.0, "student.scaled_l1": 1.0, "prior.batch_norm": 0.0}
    assert resolved == change_recipe(load_recipe("auto"), {**SEGMENTATION, **scaled})


def test_a_student_that_inherits_takes_smaller_steps() -> None:
    resolved, notes = resolve(load_recipe("auto"), student=COPY)
    assert resolved == change_recipe(load_recipe("auto"), {"student.optimizer.learning_rate": 0.01})
    assert any("needs smaller steps: overlay inherited sets student.optimizer.learning_rate = 0.01" in n for n in notes)


@pytest.mark.parametrize(("contract", "num_batch_norms"), [(CONTRACT, 0), (CONTRACT, 4), (DENSE, 4), (DENSE, 0)])
def test_the_users_own_settings_are_kept_even_where_they_are_autos(
    contract: ImageContract, num_batch_norms: int
) -> None:
    """A control of one of an overlay's settings is one: it once was not."""
    own = {"replay.procedural_share": 0.25, "student.optimizer.learning_rate": 0.2, "batch_size": 64}
    recipe = load_recipe("auto", [f"{path}={value}" for path, value in own.items()])
    resolved, notes = resolve(recipe, contract, num_batch_norms=num_batch_norms, student=COPY)
    assert resolved == change_recipe(resolved, own)
    assert not any(f"{path} =" in note for note in notes for path in own)
    whole = load_recipe("auto", ["augmentation={mixup=0.5}"])
    assert resolve(whole, contract, num_batch_norms=num_batch_norms)[0].augmentation.mixup == 0.5


def test_python_and_files_choose_as_set_does(tmp_path: Path) -> None:
    changed = change_recipe(load_recipe("auto"), {"augmentation.mixup": 0.5})
    assert resolve(changed, num_batch_norms=0)[0].augmentation.mixup == 0.5
    path = tmp_path / "mine.toml"
    path.write_text('name = "auto"\n[augmentation]\nmixup = 0.5\n')
    resolved, _ = resolve(load_recipe(path), num_batch_norms=0)
    assert (resolved.augmentation.mixup, resolved.generator.width) == (0.5, 0.25)
    path.write_text(recipe_to_toml(change_recipe(load_recipe("auto"), WITHOUT_BATCH_NORM)))
    assert resolve(load_recipe(path), num_batch_norms=0)[0] == load_recipe(path)


def test_procedural_images_give_way_to_what_the_user_asks_for() -> None:
    for num_batch_norms, own in ((4, 0.25), (0, 0.5)):
        wide, notes = resolve(load_recipe("auto", ["replay.share=0.95"]), num_batch_norms=num_batch_norms, student=COPY)
        assert (wide.replay.share, wide.replay.procedural_share) == (0.95, 0.05)
        assert any("replay.procedural_share = 0.05" in note for note in notes)
        narrow, _ = resolve(load_recipe("auto", ["replay.share=0.3"]), num_batch_norms=num_batch_norms, student=COPY)
        assert narrow.replay.procedural_share == own
    # Room enough for auto's own share, not for that of the overlay.
    between, notes = resolve(load_recipe("auto", ["replay.share=0.6"]), num_batch_norms=0)
    assert between.replay.procedural_share == 0.4
    assert any("replay.procedural_share = 0.4" in note for note in notes)


def test_auto_stays_the_users_where_an_overlay_does_not_go_with_it() -> None:
    """``generator.width`` is for scalable generators alone."""
    with pytest.raises(DfadcError, match="matches batch-norm statistics"):
        resolve(load_recipe("auto", ["generator.architecture=paper"]), num_batch_norms=0)
    chosen = load_recipe("auto", ["generator.architecture=paper", "prior.batch_norm=0"])
    resolved, notes = resolve(chosen, num_batch_norms=0, student=COPY)
    assert (resolved.generator.width, resolved.replay.procedural_share) == (1.0, 0.25)
    assert any("overlay without_batch_norm and yours cannot be combined" in note for note in notes)


# --------------------------------------------------------------------------------------------------------- hints


def test_auto_goes_without_hints_where_no_layer_corresponds() -> None:
    for num_batch_norms in (4, 0):
        resolved, _ = resolve(load_recipe("auto"), num_batch_norms=num_batch_norms, student=STRANGER)
        assert resolved.student.hints == 0


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_hints_that_the_user_asks_for_are_refused_where_no_layer_corresponds(recipe: str) -> None:
    asked = load_recipe(recipe, ["student.hints=5"])
    assert resolve(asked)[0].student.hints == 5
    with pytest.raises(DfadcError, match="compact_resnet_20 is not the teacher made narrower") as caught:
        resolve(asked, student=STRANGER)
    assert "--set student.hints=0" in caught.value.hint


def test_the_plan_describes_the_losses() -> None:
    _, (line, *_) = resolve(load_recipe("auto"), num_batch_norms=20, student=COPY)
    assert line == (
        "recipe auto: the generator seeks 1 l1 + 1 batch_norm + 1 one_hot + 5 balance, the student learns 1 l1 + 1 kl "
        "+ 20 hints on images that are 25% fresh, 50% replayed, 25% procedural; 50% of its batches are mixed up; 10 of "
        "15 updates repeat a batch"
    )
    _, (line, *_) = resolve(load_recipe("auto"), num_batch_norms=20)
    assert line.endswith("repeat a batch; the first 30% of the steps show it procedural images alone")
    _, (line, *reasons) = resolve(load_recipe("auto"), num_batch_norms=0)
    assert "seeks 1 scaled_l1 + 1 one_hot + 5 balance, the student learns 1 scaled_l1 + 1 kl" in line
    assert "10% fresh, 40% replayed, 50% procedural" in line
    assert reasons
