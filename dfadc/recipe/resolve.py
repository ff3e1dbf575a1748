"""A recipe made to fit a teacher: what adapts is adapted and said, what does not fit is refused before any step."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError
from dfadc.recipe.conflicts import echo_conflicts, find_conflicts
from dfadc.recipe.load import change_recipe, describe_fields, load_recipe

if TYPE_CHECKING:
    from dfadc.contract import ImageContract
    from dfadc.recipe.schema import Recipe

#: The recipe that reads the teacher, and what it becomes for one that answers every pixel or has no batch norm.
_AUTO, _AUTO_DENSE, _AUTO_WITHOUT_NORM = "auto", "auto-seg", "dfad+"


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
    reads_teacher = recipe.name == _AUTO and recipe.adapt
    is_dense = contract.task == "segmentation"
    if reads_teacher and is_dense:
        shipped, other = load_recipe(_AUTO), load_recipe(_AUTO_DENSE)
        because = "the teacher answers every pixel"
        recipe = _take_settings(recipe, shipped, other, because, contract=contract, notes=notes)
    recipe = _adapt(recipe, contract, num_batch_norms, notes)
    if reads_teacher and not is_dense and num_batch_norms == 0:
        shipped, other = (_adapt(load_recipe(each), contract, 0, []) for each in (_AUTO, _AUTO_WITHOUT_NORM))
        because = "the teacher has no batch-norm statistics"
        recipe = _take_settings(recipe, shipped, other, because, contract=contract, notes=notes)
    if conflicts := find_conflicts(recipe, contract):
        raise DfadcError("; ".join(problem for problem, _ in conflicts), "; ".join(way for _, way in conflicts))
    check_budget(recipe)
    return recipe, (describe_game(recipe), *notes) if recipe.adapt else tuple(notes)


def describe_game(recipe: Recipe) -> str:
    """What both players of a recipe are paid for, and what the student is shown, in one line."""
    student, rules, prior, replay = recipe.student, recipe.generator, recipe.prior, recipe.replay
    priors = ("batch_norm", "one_hot", "balance", "activation", "total_variation", "l2")
    seeks = {rules.discrepancy: rules.adversarial, **{name: getattr(prior, name) for name in priors}}
    learns = {"l1": student.l1, "scaled_l1": student.scaled_l1, "kl": student.kl, "hints": student.hints}
    shares = {
        "of the averaged generator": replay.average_share,
        "replayed": replay.share,
        "procedural": replay.procedural_share,
    }
    images = {"fresh": 1 - sum(shares.values()), **shares}
    seen = ", ".join(f"{share:.0%} {source}" for source, share in images.items() if share > 0)
    echoes = f"; {replay.echoes} of {recipe.student_updates} updates repeat what it was shown" if replay.echoes else ""
    return (
        f"recipe {recipe.name}: the generator seeks {_sum(seeks)}, the student learns {_sum(learns)} on images that "
        f"are {seen}; {recipe.augmentation.mixup:.0%} of its batches are mixed up{echoes}"
    )


def _sum(weights: dict[str, float]) -> str:
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight > 0)


def check_budget(recipe: Recipe) -> tuple[str, ...]:
    """What a warm-up leaves of the run's steps, for the plan; nothing where there is none.

    Raises:
        DfadcError: the steps are too few for the warm-up.
    """
    student_start, adversarial_start = recipe.student.start, recipe.generator.adversarial_start
    start = math.ceil(student_start * recipe.steps)
    if start >= recipe.steps:
        raise DfadcError(
            f"a budget of {recipe.steps} steps is too small for the warm-up: with student.start = {student_start:g} "
            "the student would never be updated",
            f"give the run at least {math.ceil(1 / (1 - student_start)) + 1} steps (--steps or --minutes)",
        )
    if recipe.generator.adversarial > 0 and math.ceil(adversarial_start * recipe.steps) >= recipe.steps:
        raise DfadcError(
            f"a budget of {recipe.steps} steps is too small for the warm-up: with generator.adversarial_start = "
            f"{adversarial_start:g} the discrepancy would never count",
            "give the run more steps (--steps or --minutes), or --set generator.adversarial=0",
        )
    if math.ceil(recipe.generator.low_resolution * recipe.steps) >= recipe.steps:
        raise DfadcError(
            f"{recipe.steps} steps are too few: with generator.low_resolution = {recipe.generator.low_resolution:g} "
            "none would be played with whole images",
            "give the run more steps, or --set generator.low_resolution=0",
        )
    if recipe.student.quantise_from < 1 and math.ceil(recipe.student.quantise_from * recipe.steps) >= recipe.steps:
        raise DfadcError(
            f"{recipe.steps} steps are too few: with student.quantise_from = {recipe.student.quantise_from:g} the "
            "student would never play in INT8",
            "give the run more steps, or --set student.quantise_from=1",
        )
    if not start:
        return ()
    images = min(start * recipe.batch_size, recipe.replay.capacity)
    updates = (recipe.steps - start) * recipe.student.steps
    filled = f"the first {start} of {recipe.steps} steps fill the ring with {images:,} images"
    return (f"warm-up: {filled}; the student's {updates:,} updates follow",)


def fit_hints(recipe: Recipe, architecture: str, num_layers: int) -> Recipe:
    """The recipe as a student can play it that shares so many layers with its teacher.

    Raises:
        DfadcError: the user asks for hints, and there is no layer to compare.
    """
    path = "student.hints"
    if recipe.student.hints == 0 or num_layers:
        return recipe
    if path in recipe.pinned or not recipe.adapt:
        raise DfadcError(
            f"{path} = {recipe.student.hints:g} compares the student's layers with the teacher's, and {architecture} "
            "is not the teacher made narrower",
            f"--set {path}=0, or a student of the teacher's own family",
        )
    return change_recipe(recipe, {path: 0.0})


def slow_down(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe for a student that starts from its teacher's weights, which a rate for random ones would destroy.

    Returns:
        The recipe, its factor used up, so that a resumed run is not slowed down again; and what was changed and why.
    """
    path, factor = "student.optimizer.learning_rate", recipe.student.inherited_rate
    if factor == 1 or path in recipe.pinned:
        return recipe, ()
    rate = factor * recipe.student.optimizer.learning_rate
    note = f"a student that starts from the teacher's weights needs smaller steps: {path} = {rate:g}"
    return change_recipe(recipe, {path: rate, "student.inherited_rate": 1.0}), (note,)


def _take_settings(
    recipe: Recipe, shipped: Recipe, other: Recipe, because: str, *, contract: ImageContract, notes: list[str]
) -> Recipe:
    """Recipe ``auto`` with another's settings where it is neither changed nor pinned; as it was where they collide."""
    changes: dict[str, object] = {}
    for path, *_ in describe_fields():
        get = attrgetter(path)
        is_pinned = any(f"{path}.".startswith(f"{pin}.") for pin in ("name", "description", "pinned", *recipe.pinned))
        if not is_pinned and get(recipe) == get(shipped) != get(other):
            changes[path] = get(other)
    if not changes:
        return recipe
    changes |= _make_room(change_recipe(recipe, changes))
    changed = change_recipe(recipe, changes)
    if find_conflicts(changed, contract) and not find_conflicts(recipe, contract):
        way = f"recipe {other.name} is for such teachers, and its settings and yours cannot be combined"
        notes.append(f"{because}: {way}")
        return recipe
    said = ", ".join(f"{path} = {value}" for path, value in changes.items())
    notes.append(
        f"{because}: where recipe {_AUTO} was left as it is, the settings of {other.name} are taken ({said}); "
        f"--recipe {other.name} leaves all to you"
    )
    return changed


def _adapt(recipe: Recipe, contract: ImageContract, num_batch_norms: int, notes: list[str]) -> Recipe:
    """Drops what this teacher cannot give."""
    changes: dict[str, object] = {}
    if recipe.prior.batch_norm > 0 and num_batch_norms == 0:
        if not recipe.adapt:
            raise DfadcError(
                f"recipe {recipe.name} matches batch-norm statistics, and the teacher has no batch-norm layer with any",
                "--set prior.batch_norm=0, or --recipe auto",
            )
        changes |= {"prior.batch_norm": 0.0, "prior.batch_norm_momentum": 0.0}
        notes.append("the teacher has no batch-norm statistics: prior.batch_norm is off")
        changes |= _scale_l1(recipe)
        notes.append(
            "nothing then holds the images to the teacher's scale, so L1 is taken in units of its logits "
            "(student.scaled_l1, generator.discrepancy), as in recipe dfad+; --set adapt=false leaves that to you"
        )
    elif recipe.prior.batch_norm > 0:
        notes.append(f"the teacher has {num_batch_norms} batch-norm layers: their statistics guide the generator")
    if recipe.generator.output == "pixels" and not contract.has_pixels and recipe.adapt:
        changes["generator.output"] = "standardised"
        notes.append("mean and std are unknown: the generator's images are standardised instead of bounded to pixels")
    if recipe.replay.balanced and contract.task == "segmentation" and recipe.adapt:
        changes["replay.balanced"] = False
        notes.append("the teacher has a class for every pixel and none for an image: replay.balanced is off")
    if room := _make_room(recipe):
        changes |= room
        notes.append(f"other images leave no more of a batch: {', '.join(f'{path} = {room[path]:g}' for path in room)}")
    if recipe.adapt and any(echo_conflicts(recipe)):
        changes["replay.echoes"] = 0
        notes.extend(f"{problem}: it is 0" for problem, _ in echo_conflicts(recipe))
    return change_recipe(recipe, changes) if changes else recipe


def _make_room(recipe: Recipe) -> dict[str, float]:
    """Procedural images give way to the others that the user asks for."""
    path, replay = "replay.procedural_share", recipe.replay
    left = round(1 - replay.share - replay.average_share, 9)
    gives_way = recipe.adapt and path not in recipe.pinned and 0 <= left < replay.procedural_share
    return {path: left} if gives_way else {}


def _scale_l1(recipe: Recipe) -> dict[str, object]:
    """Turns plain L1 terms into scaled ones."""
    changes: dict[str, object] = {}
    if recipe.student.l1 > 0:
        changes |= {"student.l1": 0.0, "student.scaled_l1": recipe.student.l1 + recipe.student.scaled_l1}
    if recipe.generator.discrepancy == "l1":
        changes["generator.discrepancy"] = "scaled_l1"
    return changes
