"""What a student update is drawn from, all of it random and none of it traced by a compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dfadc.distillation.images import augmentation
from dfadc.distillation.images.procedural import draw_procedural

if TYPE_CHECKING:
    from dfadc.contract import ImageContract
    from dfadc.distillation.state import Players
    from dfadc.recipe.schema import Recipe


class StudentBatch(NamedTuple):
    """N = F + P + R images, or what a generator draws them from; there may be none of a source.

    Args:
        latents: (F, Z), for F images of the generator.
        procedural: (P, C, H, W), images that are drawn by rule.
        replayed: (R, C, H, W), images of earlier steps, already augmented.
        answers: (R, K, ...), the teacher's logits to the replayed images where they are known, else (0, ...).
        mixup: scalar, the weight of each image itself in the mixture; 1: not mixed.
    """

    latents: Tensor
    procedural: Tensor
    replayed: Tensor
    answers: Tensor
    mixup: Tensor


def draw_student_batch(players: Players, recipe: Recipe, contract: ImageContract) -> StudentBatch:
    """A batch as the recipe composes it; the ring gives its part once it holds any image.

    Args:
        players: with their dice and memory.
        recipe: the shares.
        contract: what an image is.
    """
    size, replay = recipe.batch_size, recipe.replay
    num_replayed = 0
    if replay.share == 1:
        num_replayed = size
    elif len(players.ring):
        num_replayed = min(round(size * replay.share), size - 1)
    most = size - num_replayed - 1  # one is the generator's
    num_procedural = max(0, min(round(size * replay.procedural_share), most))
    replayed, answers = _draw_replayed(num_replayed, players, contract)
    weight = augmentation.draw_mixup(recipe.augmentation.mixup, players.rng)
    return StudentBatch(
        latents=_draw_latents(size - num_replayed - num_procedural, players),
        procedural=_draw_procedural(num_procedural, players, contract),
        replayed=replayed,
        answers=answers,
        mixup=torch.tensor(weight, device=players.device),
    )


def draw_echo_batch(players: Players, batch_size: int) -> StudentBatch:
    """Images that the student was shown before, as it was shown them, and what the teacher answered then."""
    images, answers = players.echo.draw(batch_size, players.rng)
    latents = _draw_latents(0, players)
    return StudentBatch(latents, images[:0], images, answers, mixup=torch.tensor(1.0, device=players.device))


def _draw_latents(count: int, players: Players) -> Tensor:
    return players.draw_latents(count) if count else torch.empty((0, players.latent_dim), device=players.device)


def _draw_procedural(count: int, players: Players, contract: ImageContract) -> Tensor:
    if not count:
        return torch.empty((0, *contract.input_size), device=players.device)
    return draw_procedural(count, contract, players.rng).to(players.device)


def _draw_replayed(count: int, players: Players, contract: ImageContract) -> tuple[Tensor, Tensor]:
    """Images of the ring, shifted; the teacher's answers to them hold no more."""
    if not count:
        empty = torch.empty((0, *contract.input_size), device=players.device)
        return empty, torch.empty((0, 0), device=players.device)
    images, answers = players.ring.draw(count, players.rng)
    return augmentation.shift(images, augmentation.most_pixels(contract), players.rng), answers[:0]
