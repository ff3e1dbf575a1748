"""Generators trained after the game, which ask a finished student what the game itself did not."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from dfadc.distillation.generator.networks import build_generator
from dfadc.distillation.images.procedural import draw_procedural
from dfadc.distillation.loop import update_generator
from dfadc.distillation.objectives import Game
from dfadc.distillation.state import Players
from dfadc.recipe.load import change_recipe
from dfadc.sampling.class_balance import take_turns
from dfadc.sampling.refine import sharpen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dfadc.recipe.schema import Recipe

_OPTIMIZER = {"kind": "adam", "learning_rate": 4e-3, "momentum": 0.5, "clip_norm": 5.0}
#: How every examiner is trained, whatever the recipe of the game: as recipe `auto` trains its generator, with every
#: prior that the teacher can give. The prior generator leaves the adversarial term out.
_RULES: dict[str, Any] = {
    "student.ema_decay": 0.0,
    "student.quantise_from": 1.0,
    "student.hints": 0.0,
    "generator": {
        "optimizer": _OPTIMIZER,
        "schedule": {"kind": "cosine"},
    },
    "prior": {"one_hot": 1.0, "balance": 5.0},
    "replay": {"share": 0.0, "reservoir": 0},
    "augmentation": {},
}
#: The prior generator follows nobody and can move faster.
_PRIOR_RATE = 1e-2
#: Whatever the run's own seed: students of a teacher whose runs are equally long (or long enough for all of
#: ``verify.prior_steps``) are then asked the same, and their agreements compare. Over 30
#: students of the digits teacher (examples/believability) the rank correlation with real accuracy, the mean over 200
#: halves of them, is 0.97; with a prior generator for each of their three seeds it was 0.95.
PRIOR_SEED = 11
#: What they may take of the game's own generator updates, so that finishing costs a fraction of the game: a step of
#: `auto` asks the teacher about six batches, an update of an examiner about one.
_PRIOR_SHARE, _ADVERSARY_SHARE = 1 / 3, 1 / 10
#: The same for the pixels of the samples, of all images that the teacher answers in the game.
_SHARPEN_SHARE = 1 / 4
#: Procedural images that are drawn for each that is taken.
_DRAWN_FOR_EACH = 8
#: Length of their latents where the game's generator has none.
_LATENT_DIM = 256
#: Images on which the restarts of the adversary are compared, at most: no more than verification takes in all.
_TRIAL_SIZE = 512


def train_prior(game: Game) -> Players:
    """A fresh generator trained against the teacher alone: neither the student nor the run's seed has a say in it.

    Args:
        game: finished; nobody in it moves.

    Returns:
        Players whose generator draws, on latents of a stream of their own.
    """
    rules = {"adversarial": 0.0, "optimizer": {**_OPTIMIZER, "learning_rate": _PRIOR_RATE}}
    return _train(game, seed=PRIOR_SEED, steps=examiner_steps(game.recipe)[0], rules=rules)


def train_adversary(game: Game) -> Players:
    """A fresh generator trained to make teacher and finished student disagree; the most harmful of several restarts.

    Which one that is, is decided on images that are not drawn again.
    """
    steps = examiner_steps(game.recipe)[1]
    adversaries = [
        _train(game, seed=game.recipe.seed + 101 + restart, steps=steps, rules={"adversarial": 1.0})
        for restart in range(game.recipe.verify.adversary_restarts)
    ]
    return min(adversaries, key=lambda players: _agreement(game, players))


def examiner_steps(recipe: Recipe) -> tuple[int, int]:
    """Updates of the prior generator and of each adversary: the recipe's, within their shares of the game's."""
    updates = recipe.steps * recipe.generator.steps
    prior, adversary = (max(1, int(share * updates)) for share in (_PRIOR_SHARE, _ADVERSARY_SHARE))
    return min(recipe.verify.prior_steps, prior), min(recipe.verify.adversary_steps, adversary)


@torch.no_grad()
def draw(players: Players, count: int, batch_size: int = 128) -> Iterator[Tensor]:
    """``count`` images of the averaged generator on latents that no training saw: batches (n, C, H, W) on the CPU."""
    generator = players.generator.average.eval()
    for latents in players.draw_unseen_latents(count).split(batch_size):
        yield generator(latents).float().cpu()


def draw_prior(game: Game, prior: Players, count: int, batch_size: int = 128) -> Iterator[Tensor]:
    """``count`` images of the prior generator, as :func:`draw` draws them, and of procedural ones, sharpened.

    Where nothing is to be sharpened (:func:`sharpen_steps`), all are the generator's.
    """
    steps, policy = sharpen_steps(game, count), game.policy
    if not steps:
        yield from draw(prior, count, batch_size)
        return
    num_procedural = int(game.recipe.verify.procedural_share * count)
    drawn = draw(prior, count - num_procedural, batch_size)
    for images in chain(drawn, draw_procedural_classes(game, num_procedural).split(batch_size)):
        if len(images):
            asked = images.to(policy.device, memory_format=policy.memory_format)
            yield sharpen(asked, game.teacher, game.batch_norms, contract=game.contract, steps=steps).cpu()


@torch.no_grad()
def draw_procedural_classes(game: Game, count: int) -> Tensor:
    """Procedural images of the classes that the teacher sees in them, as evenly as they come.

    Neither the student nor the run's seed has a say in them.

    Args:
        game: whose teacher is asked.
        count: N.

    Returns:
        (N, C, H, W) in the contract's value range, on the CPU.
    """
    rng = torch.Generator().manual_seed(PRIOR_SEED)
    kept, classes = torch.empty(0, *game.contract.input_size), torch.empty(0, dtype=torch.long)
    for _ in range(_DRAWN_FOR_EACH if count else 0):
        drawn = draw_procedural(count, game.contract, rng)
        parts = (part.to(game.policy.device) for part in drawn.split(game.images_at_once))
        answers = torch.cat([game.teacher(part).argmax(dim=1).cpu() for part in parts])
        kept, classes = torch.cat([kept, drawn]), torch.cat([classes, answers])
        chosen = take_turns(classes.tolist())[:count]
        kept, classes = kept[chosen], classes[chosen]
    return kept


def sharpen_steps(game: Game, count: int) -> int:
    """Updates of the pixels of ``count`` samples; none for dense answers and without batch norms (not measured)."""
    recipe = game.recipe
    if not game.batch_norms or game.contract.task == "segmentation":
        return 0
    answered = recipe.steps * (recipe.student.steps + recipe.generator.steps) * recipe.batch_size
    return min(recipe.verify.sharpen_steps, int(_SHARPEN_SHARE * answered / max(1, count)))


def _train(game: Game, *, seed: int, steps: int, rules: dict[str, Any]) -> Players:
    """A generator trained for ``steps`` updates by ``_RULES`` and further ``rules`` for the generator."""
    changes = {**_RULES, "seed": seed, "steps": max(1, steps)}
    kept = {"output": game.recipe.generator.output, "latent_dim": game.recipe.generator.latent_dim or _LATENT_DIM}
    changes["generator"] = {**_RULES["generator"], **kept, **rules}
    if game.batch_norms:
        changes["prior"] = {**_RULES["prior"], "batch_norm": 1.0}
    recipe = change_recipe(game.recipe, changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = build_generator(recipe.generator, game.contract)
    players = Players(
        game.players.student.average, generator, recipe=recipe, contract=game.contract, policy=game.policy
    )
    trial = Game(
        game.teacher,
        game.batch_norms,
        players=players,
        recipe=recipe,
        contract=game.contract,
        policy=game.policy,
    )
    for step in range(steps):
        players.generator.set_learning_rate(step / steps)
        update_generator(trial)
    trial.close()
    return players


@torch.no_grad()
def _agreement(game: Game, players: Players) -> float:
    networks = (game.teacher, players.student.module.eval())
    agreed, count = 0, min(_TRIAL_SIZE, game.recipe.verify.num_samples)
    for images in draw(players, count, game.images_at_once):
        teacher_classes, student_classes = (
            network(images.to(game.policy.device)).argmax(dim=1) for network in networks
        )
        agreed += int((teacher_classes == student_classes).sum())
    return agreed / count
