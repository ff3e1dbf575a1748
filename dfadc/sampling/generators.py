"""Verification generators: trained after the run, to draw samples that the run itself did not draw."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from dfadc.distillation.distillation import Distillation
from dfadc.distillation.generator.networks import build_generator, draws_pixels
from dfadc.distillation.images.balanced import draw_balanced
from dfadc.distillation.loop import update_generator
from dfadc.distillation.state import TrainingState
from dfadc.networks.logits import same_predictions
from dfadc.recipe.load import change_recipe
from dfadc.sampling.lengths import ADVERSARY_RESTARTS, refine_steps, verification_steps
from dfadc.sampling.refine import refine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


_OPTIMIZER = {"learning_rate": 4e-3, "momentum": 0.5, "clip_norm": 5.0}
#: Settings of every verification generator, whatever the recipe of the run: as recipe `auto` trains its generator, with
#: every prior that the teacher can give. The prior generator leaves the adversarial term out.
_SETTINGS: dict[str, Any] = {
    "student.ema_decay": 0.0,
    "student.hints": 0.0,
    "student.schedule": {"kind": "cosine"},
    "prior": {"one_hot": 1.0, "balance": 5.0},
    "replay": {"share": 0.0},
    "augmentation": {},
}
#: Share of the prior's samples, where they are refined, that are procedural images.
PROCEDURAL_SHARE = 0.25
#: The prior generator has no opponent and can take larger steps.
_PRIOR_RATE = 1e-2
#: Whatever the run's own seed: students of a teacher whose runs are equally long (or long enough for all of
#: PRIOR_STEPS) are then asked the same, and their agreements compare. Over 30
#: students of the digits teacher (examples/believability) the rank correlation with real accuracy, the mean over 200
#: halves of them, is 0.97; with a prior generator for each of their three seeds it was 0.95.
PRIOR_SEED = 11
#: Images on which the restarts of the adversary are compared, at most: no more than verification takes in all.
_TRIAL_SIZE = 512


def train_prior(run: Distillation, steps: int | None = None) -> TrainingState:
    """A fresh generator trained against the teacher alone, independent of the student and of the run's seed.

    Args:
        run: finished; nothing in it is trained.
        steps: updates; None: as many as the run's length allows.

    Returns:
        A state whose generator draws, on latents of a stream of its own.
    """
    steps = verification_steps(run.recipe)[0] if steps is None else steps
    optimizer = {**_OPTIMIZER, "learning_rate": _PRIOR_RATE}
    return _train(run, seed=PRIOR_SEED, steps=steps, adversarial=0.0, optimizer=optimizer)


def train_adversary(run: Distillation, steps: int | None = None, restarts: int = ADVERSARY_RESTARTS) -> TrainingState:
    """A fresh generator trained to make teacher and finished student disagree; the most harmful of several restarts.

    Which one that is, is decided on images that are not drawn again.
    """
    steps = verification_steps(run.recipe)[1] if steps is None else steps
    adversaries = [
        _train(run, seed=run.recipe.seed + 101 + restart, steps=steps, adversarial=1.0, optimizer=_OPTIMIZER)
        for restart in range(restarts)
    ]
    return min(adversaries, key=lambda state: _agreement(run, state))


@torch.no_grad()
def draw(state: TrainingState, count: int, batch_size: int = 128) -> Iterator[Tensor]:
    """``count`` images of the averaged generator on latents that no training saw: batches (n, C, H, W) on the CPU."""
    generator = state.generator.average.eval()
    for latents in state.draw_unseen_latents(count).split(batch_size):
        yield generator(latents).float().cpu()


def draw_prior(
    run: Distillation,
    prior: TrainingState | None,
    count: int,
    batch_size: int = 128,
    *,
    steps: int | None = None,
    procedural_share: float = PROCEDURAL_SHARE,
) -> Iterator[Tensor]:
    """``count`` images of the prior generator, as :func:`draw` draws them, and of procedural ones, refined.

    Where nothing is to be refined, all are the generator's. Without a generator all begin as procedural ones.
    """
    steps = refine_steps(run.recipe, count) if steps is None else steps
    if prior is not None and not (steps and can_refine(run)):
        yield from draw(prior, count, batch_size)
        return
    num_procedural = count if prior is None else int(procedural_share * count)
    drawn = draw(prior, count - num_procedural, batch_size) if prior is not None else iter(())
    # Neither the student nor the run's seed has a say in them.
    procedural = draw_balanced(num_procedural, run.teacher, torch.Generator().manual_seed(PRIOR_SEED))
    for images in chain(drawn, procedural.split(batch_size)):
        if len(images):
            yield refine(images, run.teacher, run.batch_norms, steps=steps).cpu()


def needs_prior(run: Distillation) -> bool:
    """True if a prior generator is trained: not for a classifier without batch norm.

    Such a generator draws what no image looks like, and good students disagree with their teacher there
    (docs/results/no_batch_norm.md). Refined procedural images tell good from bad.
    """
    return bool(run.batch_norms) or run.teacher.contract.is_dense


def can_refine(run: Distillation) -> bool:
    """True if samples are refined: not for segmentation, where it was not measured."""
    return not run.teacher.contract.is_dense


def _train(run: Distillation, *, seed: int, steps: int, adversarial: float, optimizer: dict[str, Any]) -> TrainingState:
    """A generator trained for ``steps`` updates by ``_SETTINGS`` and its own optimizer."""
    settings = run.recipe.generator
    changes = {**_SETTINGS, "seed": seed, "steps": max(1, steps)}
    changes["generator"] = {"optimizer": optimizer, "latent_dim": settings.latent_dim}
    if run.batch_norms:
        changes["prior"] = {**_SETTINGS["prior"], "batch_norm": 1.0}
    recipe = change_recipe(run.recipe, changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = build_generator(
            recipe.generator, run.teacher.contract, bounded=draws_pixels(settings, run.teacher.contract)
        )
    state = TrainingState(
        run.state.student.average,
        generator,
        recipe=recipe,
        contract=run.teacher.contract,
        policy=run.policy,
        reservoir_size=0,
    )
    trial = Distillation(run.teacher, run.batch_norms, state, recipe=recipe, policy=run.policy, adversarial=adversarial)
    with trial:
        for step in range(steps):
            state.generator.set_learning_rate(step / steps)
            update_generator(trial)
    return state


@torch.no_grad()
def _agreement(run: Distillation, state: TrainingState) -> float:
    student, task = state.student.module.eval(), run.teacher.contract.task
    agreed, count = 0, min(_TRIAL_SIZE, run.recipe.verify.num_samples)
    for images in draw(state, count, run.teacher.placement.images_at_once or count):
        placed = images.to(run.policy.device)
        agreed += int(same_predictions(student(placed), run.teacher.logits(placed, in_fp32=True), task).sum())
    return agreed / count
