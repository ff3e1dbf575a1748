"""Augmentation of the student's images: small shifts of replayed ones, mixup of whole batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dfadc.distillation.compute.transfer import send

if TYPE_CHECKING:
    from dfadc.contract import ImageContract

#: Pixels that a replayed image moves by at most. No shipped recipe ever had another number.
_SHIFT = 2


def most_pixels(contract: ImageContract) -> int:
    """Largest shift of a replayed image: less than a side."""
    return min(_SHIFT, *(side - 1 for side in contract.input_size[1:]))


def shift(images: Tensor, pixels: int, rng: torch.Generator) -> Tensor:
    """Moves each image by up to ``pixels`` in both directions; what enters repeats the border.

    Args:
        images: (N, C, H, W).
        pixels: largest shift; 0 returns the images as they are.
        rng: a CPU generator.
    """
    if pixels == 0:
        return images
    count, _, height, width = images.shape
    offsets = send(torch.randint(2 * pixels + 1, (2, count, 1), generator=rng), images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    padded = functional.pad(images, (pixels,) * 4, mode="replicate")
    samples = torch.arange(count, device=images.device)
    # Advanced indices around the sliced channel axis put that axis last: (N, H, W, C).
    return padded[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def draw_mixup(share: float, rng: torch.Generator) -> float:
    """The weight of a batch's own images: uniform in [0, 1] with probability ``share``, else 1 (no mixing)."""
    mixed, weight = torch.rand(2, generator=rng).tolist()
    return weight if mixed < share else 1.0


def mixup(images: Tensor, weight: Tensor) -> Tensor:
    """Blends images with the same images in another order, weight to 1 - weight (Zhang et al. 2018, on images alone).

    The teacher labels the mixture, so no label is mixed. The other order is a rotation by half the batch, which pairs
    a fresh image with a replayed one where the batch holds both.

    Args:
        images: (N, C, H, W).
        weight: scalar tensor in [0, 1]; 1 leaves the images as they are.
    """
    return weight * images + (1 - weight) * images.roll(len(images) // 2, dims=0)
