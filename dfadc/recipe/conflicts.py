"""What a recipe cannot combine, within itself and with its teacher's contract, and the way out of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfadc.recipe.schema import TEMPERED, num_micro_batches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfadc.contract import ImageContract
    from dfadc.recipe.schema import Recipe

#: A conflict, and the way out of it.
Conflict = tuple[str, str]


def find_conflicts(recipe: Recipe, contract: ImageContract) -> list[Conflict]:
    """Everything about a recipe that cannot be combined."""
    return [
        *_student_conflicts(recipe, contract),
        *echo_conflicts(recipe),
        *_generator_conflicts(recipe),
        *_term_conflicts(recipe),
        *_class_conflicts(recipe, contract),
        *_batch_conflicts(recipe),
    ]


def _student_conflicts(recipe: Recipe, contract: ImageContract) -> Iterator[Conflict]:
    """About the student's images and its loss."""
    student, replay, rules = recipe.student, recipe.replay, recipe.augmentation
    if student.l1 == student.scaled_l1 == student.kl == 0:
        yield "student.l1, scaled_l1 and kl are all 0: the student would learn nothing", "set one above 0"
    if student.kl == 0 and student.temperature != 1:
        yield "student.temperature softens the KL term, and student.kl is 0", "--set student.kl=1"
    if rules.shift >= min(contract.input_size[1:]):
        yield f"augmentation.shift = {rules.shift} is not below the image's side {contract.input_size[1:]}", "lower it"
    if (rules.shift or rules.flip) and replay.share == 0:
        way = "--set replay.share=0.5, or --set augmentation.shift=0"
        yield "augmentation.shift and flip move replayed images, and replay.share is 0", way
    if replay.balanced and replay.share == 0:
        yield "replay.balanced chooses among replayed images, and replay.share is 0", "--set replay.balanced=false"
    yield from _share_conflicts(recipe)
    if replay.share == 1 and student.start == 0:
        way = "--set student.start=0.1 fills it first"
        yield "with replay.share = 1 the student would begin on an empty ring", way


def _share_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """About where the images of a student's batch come from."""
    replay = recipe.replay
    total = replay.share + replay.average_share + replay.procedural_share
    if total > 1:
        shares = f"replay.share + replay.average_share + replay.procedural_share = {total:g}"
        yield f"{shares} is more than a whole batch", "lower one of them"
    if replay.average_share > 0 and recipe.generator.ema_decay == 0:
        way = "--set generator.ema_decay=0.99"
        yield "replay.average_share is drawn by the averaged generator, and none is kept", way
    if replay.share == 1 and recipe.generator.low_resolution > 0:
        problem = "the ring holds images of the input size alone, and with replay.share = 1 the student sees no others"
        yield f"{problem}: generator.low_resolution is for lower shares", "--set generator.low_resolution=0"


def echo_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """About what the student is shown again as it was."""
    replay, student = recipe.replay, recipe.student
    if replay.echoes and replay.share == 1:
        problem = "replay.echoes repeats what the student was shown, and with replay.share = 1 it sees only repetitions"
        yield problem, f"--set student.steps={student.steps + replay.echoes}, --set replay.echoes=0"


def _generator_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """About the generator and its latents."""
    rules = recipe.generator
    moves = rules.latents in ("optimised", "noisy")
    if moves and recipe.replay.share < 1:
        problem = f"latents that are {rules.latents} belong to one batch, which reaches the student through the ring"
        yield f"{problem}: replay.share is {recipe.replay.share:g}", "--set replay.share=1"
    if not moves and rules.latent_rate != 1:
        yield f"generator.latent_rate moves latents, and {rules.latents} ones stay", "--set generator.latents=optimised"
    if rules.width != 1 and rules.architecture != "scalable":
        way = "--set generator.width=1, --set generator.architecture=scalable"
        yield f"generator.width is for scalable generators, not for {rules.architecture}", way
    if rules.architecture != "free_pixels":
        if rules.latent_dim == 0:
            yield "generator.latent_dim = 0 is for free_pixels alone", "--set generator.latent_dim=256"
        return
    if rules.latents != "optimised":
        yield "free_pixels have nothing that moves but latents", "--set generator.latents=optimised"
    if rules.latent_dim:
        yield "the latents of free_pixels are as long as the image is large", "--set generator.latent_dim=0"
    if rules.low_resolution:
        yield "free_pixels have no layers that take any size", "--set generator.low_resolution=0"
    if rules.meta != "off" or rules.reset_every:
        way = "--set generator.meta=off, --set generator.reset_every=0"
        yield "free_pixels have no weights that could be meta-learned or begin anew", way


def _term_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """About the generator's terms: each needs a weight, and a setting the term that it sets."""
    rules, prior = recipe.generator, recipe.prior
    weights = (prior.batch_norm, prior.one_hot, prior.balance, prior.activation, prior.total_variation, prior.l2)
    if not any((rules.adversarial, *weights)):
        yield "generator.adversarial and all priors are 0: the generator would learn nothing", "set one above 0"
    if rules.temperature != 1 and rules.discrepancy not in TEMPERED:
        way = f"--set generator.discrepancy={' or '.join(TEMPERED)}"
        yield f"generator.temperature softens no {rules.discrepancy}", way
    if rules.adversarial_start > 0 and rules.adversarial == 0:
        yield "generator.adversarial_start is set, and generator.adversarial is 0", "--set generator.adversarial=1"
    if prior.batch_norm_momentum > 0 and prior.batch_norm == 0:
        yield "prior.batch_norm_momentum is set, and prior.batch_norm is 0", "--set prior.batch_norm=1"
    if prior.balance_momentum > 0 and prior.balance == 0:
        yield "prior.balance_momentum is set, and prior.balance is 0", "--set prior.balance=1"


def _class_conflicts(recipe: Recipe, contract: ImageContract) -> Iterator[Conflict]:
    """About classes that images are to be of."""
    given = recipe.prior.targets == "balanced"
    if given and recipe.generator.latents in ("fresh", "shared"):
        problem = f"prior.targets = balanced gives each latent a class, and {recipe.generator.latents} ones have none"
        yield problem, "--set generator.latents=noisy or optimised"
    if given and recipe.prior.one_hot == 0:
        yield "prior.targets are what one_hot asks for, and prior.one_hot is 0", "--set prior.one_hot=0.5"
    if contract.task == "classification":
        return
    asked = {
        "generator.latents = noisy": recipe.generator.latents == "noisy",
        "prior.targets = balanced": given,
        "replay.balanced": recipe.replay.balanced,
    }
    for field, is_set in asked.items():
        if is_set:
            yield f"{field} needs one class an image, and this teacher has one for every pixel", "leave it away"


def _batch_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """About the parts that a batch is cut into."""
    size = recipe.compute.micro_batch
    if recipe.batch_size // num_micro_batches(recipe.batch_size, size) < 2:
        problem = f"compute.micro_batch = {size} leaves a single image of {recipe.batch_size}, and batch norm needs two"
        yield problem, f"--set compute.micro_batch={max(4, size)}"
