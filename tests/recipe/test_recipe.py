"""Recipes: every way in leads to one frozen, bounded, explained object."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dfadc.errors import DfadcError
from dfadc.recipe.load import (
    change_recipe,
    describe_fields,
    load_recipe,
    recipe_from_dict,
    recipe_names,
    recipe_to_toml,
)
from dfadc.recipe.removed import RECIPES, SECTIONS, SETTINGS, VALUES
from dfadc.recipe.schema import Recipe

if TYPE_CHECKING:
    from pathlib import Path

FIELDS = list(describe_fields())


def load_toml(text: str, folder: Path) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


# -------------------------------------------------------------------------------------------------- shipped ones


def test_auto_is_the_first_and_the_default() -> None:
    assert recipe_names()[0] == "auto"
    assert set(recipe_names()) == {"auto", "dfad", "dfad-seg", "pool"}
    assert load_recipe() == load_recipe("auto")


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_valid_named_like_its_file_and_described(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_toml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert load_toml(recipe_to_toml(recipe), tmp_path) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_json(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe_from_dict(recipe.model_dump(mode="json"), "run.json") == recipe


def test_dfad_is_the_papers_cifar_10_experiment() -> None:
    """The table of settings in the paper's code: nothing but L1, SGD and Adam, rates falling at epochs 100 and 200."""
    recipe = load_recipe("dfad")
    student, generator = recipe.student, recipe.generator
    assert (recipe.batch_size, recipe.steps) == (256, 500 * 50)
    assert (student.steps, generator.steps) == (5, 1)
    assert (student.l1, student.kl, generator.discrepancy) == (1.0, 0.0, "l1")
    sgd, adam = student.optimizer, generator.optimizer
    assert (sgd.kind, sgd.learning_rate, sgd.weight_decay) == ("sgd", 0.1, 5e-4)
    assert (adam.learning_rate, adam.momentum) == (1e-3, 0.9)
    assert (student.schedule.kind, student.schedule.milestones, student.schedule.decay) == ("step", (0.2, 0.4), 0.1)
    assert generator.schedule == "as_student"
    assert (generator.architecture, generator.latent_dim) == ("paper", 256)
    assert generator.student_mode == "train"
    assert recipe.prior == Recipe().prior
    assert generator.latents == "fresh"
    assert student.start == generator.adversarial_start == student.scaled_l1 == student.hints == 0
    assert recipe.replay.share == recipe.replay.repeats == recipe.replay.procedural_share == 0
    assert recipe.augmentation.mixup == 0
    assert sgd.clip_norm == adam.clip_norm == student.ema_decay == generator.ema_decay == 0


def test_auto_composes_priors_replay_and_mixup() -> None:
    recipe = load_recipe("auto")
    assert recipe.prior.batch_norm > 0
    assert recipe.prior.one_hot > 0
    assert recipe.prior.balance > 0
    assert recipe.replay.share > 0
    assert recipe.augmentation.mixup > 0
    # The last EMA student is what gets exported.
    assert recipe.student.ema_decay > 0


# ----------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("steps=7", "steps", 7),
        ("student.optimizer.learning_rate=0.05", "student.optimizer.learning_rate", 0.05),
        ("student.optimizer.learning_rate=5e-2", "student.optimizer.learning_rate", 0.05),
        ("prior.balance=2", "prior.balance", 2.0),
        ("generator.architecture=paper_a", "generator.architecture", "paper_a"),
        ("generator.architecture='paper_b'", "generator.architecture", "paper_b"),
        ("replay.balanced=true", "replay.balanced", True),
        ("student.schedule.milestones=[0.5, 0.75]", "student.schedule.milestones", (0.5, 0.75)),
        ("verify.min_agreement=off", "verify.min_agreement", "off"),
        ("verify.min_agreement=0.9", "verify.min_agreement", 0.9),
        ("student.weights=some folder/a=b.pt", "student.weights", "some folder/a=b.pt"),
        (" steps = 7 ", "steps", 7),
        ("name=2026-01-02", "name", "2026-01-02"),
    ],
)
def test_set_reaches_every_kind_of_field(override: str, path: str, value: Any) -> None:
    found: Any = load_recipe("auto", [override])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win() -> None:
    assert load_recipe("auto", ["steps=7", "steps=8"]).steps == 8


def test_overrides_change_nothing_else_and_are_remembered() -> None:
    changed = load_recipe("auto", ["student.optimizer.learning_rate=0.05", "steps=1000"])
    assert changed == change_recipe(load_recipe("auto"), {"student.optimizer.learning_rate": 0.05})
    assert changed.assigned == {"steps", "student.optimizer.learning_rate"}
    assert change_recipe(changed, {"batch_size": 8}).assigned == {*changed.assigned, "batch_size"}
    assert load_recipe("auto").assigned == frozenset()


def test_a_part_of_an_assigned_section_is_assigned() -> None:
    recipe = load_recipe("auto", ["student.optimizer={kind='adam'}"])
    assert recipe.is_assigned("student.optimizer.kind")
    assert recipe.is_assigned("student.optimizer.learning_rate")
    assert not recipe.is_assigned("student.optimiz")
    assert not recipe.is_assigned("student.steps")


def test_all_that_a_file_states_is_assigned(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("steps = 7\n[student.optimizer]\nkind = 'adam'\n")
    assert load_recipe(path, ["batch_size=8"]).assigned == {"batch_size", "steps", "student.optimizer.kind"}


@pytest.mark.parametrize("override", ["steps", "=7", "", "--steps"])
def test_an_override_without_path_or_value_is_refused(override: str) -> None:
    with pytest.raises(DfadcError, match="is not path=value"):
        load_recipe("auto", [override])


def test_a_path_through_a_value_is_refused() -> None:
    with pytest.raises(DfadcError, match=r"student.steps is a value, not a section \(in student.steps.more\)"):
        load_recipe("auto", ["student.steps.more=1"])


def test_a_value_in_place_of_a_section_is_refused() -> None:
    with pytest.raises(DfadcError, match=r"student = 5"):
        load_recipe("auto", ["student=5"])


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("student.optimizer.learning_rat=0.1", "student.optimizer.learning_rate"),
        ("prior.batchnorm=1", "prior.batch_norm"),
        ("batchsize=8", "batch_size"),
        ("generator.latentdim=8", "generator.latent_dim"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(override: str, nearest: str) -> None:
    path = override.partition("=")[0]
    with pytest.raises(DfadcError, match=re.escape(f"unknown field '{path}' (did you mean '{nearest}'?)")):
        load_recipe("auto", [override])


def test_an_unknown_key_like_no_other_is_named_alone() -> None:
    with pytest.raises(DfadcError, match=r"unknown field 'zzz'$"):
        load_recipe("auto", ["zzz=1"])


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(DfadcError) as caught:
        load_recipe("auto", ["steps=-1", "batch_size=1", "student.foo=1", "student.l1=-1"])
    for path in ("steps", "batch_size", "student.foo", "student.l1"):
        assert path in caught.value.message
    assert "recipe show" in caught.value.hint


@pytest.mark.parametrize(
    "override",
    [
        'steps="10"',
        "steps=10.5",
        "steps=10.0",
        "steps=true",
        "replay.balanced=1",
        "replay.balanced=yes",
        "name=5",
        "student.l1=true",
        'student.l1="1.0"',
        "student.l1=nan",
        "student.l1=inf",
        "student.l1=-inf",
        "student.optimizer.clip_norm=inf",
        "log.checkpoint_minutes=inf",
        "student.schedule.milestones=0.5",
        "student.schedule.milestones=[2.0]",
        "student.l1=2026-01-02",
        "verify.min_agreement=on",
    ],
)
def test_values_are_never_converted(override: str) -> None:
    path = override.partition("=")[0]
    with pytest.raises(DfadcError, match=re.escape(path)):
        load_recipe("auto", [override])


def bounds_of(text: str) -> list[tuple[str, float]]:
    return [(sign, float(limit)) for sign, limit in re.findall(r"([≥>≤<]) (\S+)", text)]


@pytest.mark.parametrize(("path", "bounds"), [(path, bounds) for path, bounds, *_ in FIELDS if bounds_of(bounds)])
def test_a_value_beyond_a_bound_is_refused(path: str, bounds: str) -> None:
    is_whole = bounds.startswith("integer")
    for sign, limit in bounds_of(bounds):
        # Shown limits are rounded, which only shows in the largest one.
        step = max(1.0, 1e-5 * limit) if is_whole else max(1e-6, abs(limit) * 1e-6)
        beyond = {"≥": limit - step, ">": limit, "≤": limit + step, "<": limit + (step if limit > 1e15 else 0)}[sign]
        value = str(int(beyond)) if is_whole else repr(beyond)
        with pytest.raises(DfadcError, match=re.escape(path)):
            load_recipe("auto", [f"{path}={value}"])


@pytest.mark.parametrize(("path", "choices"), [(path, kind) for path, kind, *_ in FIELDS if " | " in kind])
def test_only_the_listed_choices_are_taken(path: str, choices: str) -> None:
    for choice in choices.split(" | "):
        load_recipe("auto", [f"{path}={choice}"])
    with pytest.raises(DfadcError, match=re.escape(path)):
        load_recipe("auto", [f"{path}=other"])


def test_every_number_has_a_bound_and_every_field_a_description() -> None:
    assert len(FIELDS) <= 65, "a new setting takes the place of another"
    for path, bounds, default, description in FIELDS:
        assert description, path
        assert default, path
        if bounds.startswith(("integer", "number")):
            assert bounds_of(bounds), path


def test_a_recipe_is_frozen() -> None:
    recipe = load_recipe("auto")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.steps = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.student.optimizer.learning_rate = 5.0  # type: ignore[misc]


def test_a_change_is_a_validated_copy() -> None:
    recipe = load_recipe("auto")
    assert change_recipe(recipe, {"steps": 5, "prior.balance": 0.5}).prior.balance == 0.5
    assert recipe == load_recipe("auto")
    with pytest.raises(DfadcError, match="recipe auto: steps = -1"):
        change_recipe(recipe, {"steps": -1})


def test_a_saved_recipe_names_its_file_in_errors() -> None:
    with pytest.raises(DfadcError, match=r"recipe runs/x/run.json: unknown field 'foo'"):
        recipe_from_dict({"foo": 1}, "runs/x/run.json")


# --------------------------------------------------------------------------------------------------------- files


def test_a_file_of_a_few_lines_takes_defaults_for_the_rest(tmp_path: Path) -> None:
    recipe = load_toml("steps = 9\n[student.optimizer]\nkind = 'adam'\n", tmp_path)
    assert recipe == change_recipe(Recipe(), {"steps": 9, "student.optimizer.kind": "adam"})


def test_an_unknown_recipe_is_answered_with_the_known_ones() -> None:
    with pytest.raises(DfadcError, match="unknown recipe 'atuo'") as caught:
        load_recipe("atuo")
    assert "auto, dfad, dfad-seg, pool" in caught.value.hint
    assert ".toml" in caught.value.hint


@pytest.mark.parametrize("content", [None, b"steps = ", b"\xff\xfe\x00", b"steps = 1\nsteps = 2\n"])
def test_a_file_that_cannot_be_read_is_said(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DfadcError, match=r"cannot read recipe .*mine\.toml"):
        load_recipe(path)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").mkdir()
    with pytest.raises(DfadcError, match="cannot read recipe"):
        load_recipe(tmp_path / "mine.toml")


@settings(deadline=None, max_examples=60)
@given(
    text=st.text(),
    rate=st.floats(1e-12, 100),
    weight=st.floats(0, 1e6),
    milestones=st.lists(st.floats(0, 1), max_size=3),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_values_survive_toml(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    rate: float,
    weight: float,
    milestones: list[float],
    seed: int,
) -> None:
    changes = {
        "description": text,
        "student.optimizer.learning_rate": rate,
        "prior.balance": weight,
        "student.schedule.milestones": milestones,
        "seed": seed,
    }
    recipe = change_recipe(load_recipe("auto"), changes)
    assert load_toml(recipe_to_toml(recipe), tmp_path_factory.mktemp("recipe")) == recipe


# ------------------------------------------------------------------------------------- names of earlier versions


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_gone_is_answered_with_one_to_use(name: str) -> None:
    with pytest.raises(DfadcError, match=re.escape(f"there is no recipe '{name}' any more")) as caught:
        load_recipe(name)
    assert caught.value.hint == RECIPES[name]
    assert re.search(r"use (auto|pool)", caught.value.hint)


@pytest.mark.parametrize("path", SETTINGS)
def test_a_setting_that_is_gone_is_answered_with_advice(path: str) -> None:
    assert path not in {field for field, *_ in FIELDS}
    with pytest.raises(DfadcError, match=re.escape(f"there is no setting {path} any more: {SETTINGS[path]}")):
        load_recipe("auto", [f"{path}=1"])


@pytest.mark.parametrize("path", SECTIONS)
def test_a_section_that_is_a_setting_now_is_answered_with_advice(path: str) -> None:
    with pytest.raises(DfadcError, match=re.escape(f"there is no section {path} any more: {SECTIONS[path]}")):
        load_recipe("auto", [f"{path}.kind=cosine"])


@pytest.mark.parametrize(("path", "value"), VALUES)
def test_a_value_that_is_gone_is_answered_with_advice(path: str, value: str) -> None:
    with pytest.raises(DfadcError, match=re.escape(f"{path} = {value} is gone: {VALUES[path, value]}")):
        load_recipe("auto", [f"{path}={value}"])


def test_advice_names_settings_that_there_are() -> None:
    known = {path for path, *_ in FIELDS}
    for advice in (*SETTINGS.values(), *SECTIONS.values(), *VALUES.values(), *RECIPES.values()):
        named = re.findall(r"\b(?:student|generator|prior|replay|verify|compute|calibration)\.[a-z_.]+[a-z_]", advice)
        assert set(named) <= known, advice
