"""Inputs of a student update: all of them random, none of them traced by a compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dfadc.distillation.compute.transfer import send
from dfadc.distillation.images import augmentation
from dfadc.distillation.images.procedural import draw_procedural

if TYPE_CHECKING:
    from dfadc.contract import ImageContract
    from dfadc.distillation.state import TrainingState
    from dfadc.recipe.schema import Recipe


class StudentBatch(NamedTuple):
    """N = F + P + R images, or the latents that a generator draws them from; there may be none of a source.

    Args:
        latents: (F, Z), for F images of the generator.
        procedural: (P, C, H, W), images drawn by rule.
        replayed: (R, C, H, W), images of earlier steps, already augmented.
        stored_logits: (R, K, ...), the teacher's logits to the replayed images where they still hold, else (0, ...).
        mixup: scalar, weight of each image itself in the mixture; 1: not mixed.
    """

    latents: Tensor
    procedural: Tensor
    replayed: Tensor
    stored_logits: Tensor
    mixup: Tensor


def draw_student_batch(state: TrainingState, recipe: Recipe, contract: ImageContract) -> StudentBatch:
    """A batch as the recipe composes it; the replay buffer gives its part once it holds any image.

    Args:
        state: with its random streams and replay buffer.
        recipe: the shares.
        contract: what an image is.
    """
    size = recipe.batch_size
    num_replayed, num_procedural = _count(state, recipe)
    replayed, stored_logits = _draw_replayed(num_replayed, state, contract)
    weight = augmentation.draw_mixup(recipe.augmentation.mixup, state.rng)
    return StudentBatch(
        latents=_draw_latents(size - num_replayed - num_procedural, state),
        procedural=_draw_procedural(num_procedural, state, contract),
        replayed=replayed,
        stored_logits=stored_logits,
        mixup=torch.full((), weight, device=state.device),
    )


def _count(state: TrainingState, recipe: Recipe) -> tuple[int, int]:
    """Replayed and procedural images of a batch; of the generator's there is one at least, once it is asked."""
    size, replay = recipe.batch_size, recipe.replay
    if replay.procedural_share and state.step < recipe.student.start * state.num_steps:
        return 0, size
    if replay.share == 1:
        return size, 0
    num_replayed = min(round(size * replay.share), size - 1) if len(state.replay) else 0
    return num_replayed, min(round(size * replay.procedural_share), size - num_replayed - 1)


def draw_repeated_batch(state: TrainingState, batch_size: int) -> StudentBatch:
    """Images that the student was trained on before, as it saw them, and the teacher's logits to them."""
    images, logits = state.repeats.draw(batch_size, state.rng)
    latents = _draw_latents(0, state)
    return StudentBatch(latents, images[:0], images, logits, mixup=torch.ones((), device=state.device))


def _draw_latents(count: int, state: TrainingState) -> Tensor:
    return state.draw_latents(count) if count else torch.empty((0, state.latent_dim), device=state.device)


def _draw_procedural(count: int, state: TrainingState, contract: ImageContract) -> Tensor:
    if not count:
        return torch.empty((0, *contract.input_size), device=state.device)
    if state.stock is not None:
        chosen = send(torch.randint(len(state.stock), (count,), generator=state.rng), state.device)
        return augmentation.shift(state.stock[chosen].float(), augmentation.most_pixels(contract), state.rng)
    # A core would take longer to draw them than a GPU for the step.
    pixel_rng = state.latent_rng if state.device.type == "cuda" else state.rng
    return draw_procedural(count, contract, state.rng, pixel_rng).to(state.device)


def _draw_replayed(count: int, state: TrainingState, contract: ImageContract) -> tuple[Tensor, Tensor]:
    """Images of the replay buffer, shifted; the stored logits hold no more."""
    if not count:
        empty = torch.empty((0, *contract.input_size), device=state.device)
        return empty, torch.empty((0, 0), device=state.device)
    images, logits = state.replay.draw(count, state.rng)
    return augmentation.shift(images, augmentation.most_pixels(contract), state.rng), logits[:0]
