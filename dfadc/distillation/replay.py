"""Images of earlier steps: a ring of recent ones for the student, a reservoir over the whole run for calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Normalised images lie within a few units of 0, where half precision is finer than 8-bit pixels.
STORED_DTYPE = torch.float16


class ImageStore:
    """A bounded number of images in half precision, and how many it was shown.

    Args:
        capacity: images at most.
        input_size: (C, H, W) of an image.
        device: where the images stay.
    """

    def __init__(self, capacity: int, input_size: tuple[int, int, int], device: torch.device) -> None:
        self.images = torch.empty((capacity, *input_size), dtype=STORED_DTYPE, device=device)
        self.seen = 0

    def __len__(self) -> int:
        return min(self.seen, len(self.images))

    def state_dict(self) -> dict[str, Any]:
        """What is stored, without the empty part."""
        return {"images": self.images[: len(self)].clone(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.seen = state["seen"]
        self.images[: len(self)] = state["images"]


class ReplayRing(ImageStore):
    """The most recent images; drawing is uniform."""

    def push(self, images: Tensor) -> None:
        """Stores images (N, C, H, W), the oldest giving way."""
        # Of more images than fit only the last ones stay; the same slot twice in one assignment would be undefined.
        kept = images.detach()[-len(self.images) :]
        self.seen += len(images)
        slots = torch.arange(self.seen - len(kept), self.seen) % len(self.images)
        self.images[slots.to(self.images.device)] = kept.to(STORED_DTYPE)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """``count`` stored images, uniformly and with replacement, as fp32 (count, C, H, W)."""
        slots = torch.randint(len(self), (count,), generator=rng)
        return self.images[slots.to(self.images.device)].float()


class Reservoir(ImageStore):
    """A uniform sample of everything offered over the run (Vitter 1985, algorithm R)."""

    def offer(self, images: Tensor, rng: torch.Generator) -> None:
        """Offers images (N, C, H, W); each ends up kept with probability capacity / offered."""
        order = self.seen + torch.arange(len(images), dtype=torch.float64)
        drawn = (torch.rand(len(images), generator=rng, dtype=torch.float64) * (order + 1)).long()
        slots = torch.where(order < len(self.images), order.long(), drawn)
        kept = (slots < len(self.images)).nonzero().squeeze(1)
        # One at a time where two fall on one slot: the later must win, as it would have, one by one.
        for position in kept.tolist():
            self.images[slots[position]] = images[position].detach().to(STORED_DTYPE)
        self.seen += len(images)


def ring_capacity(wanted: int, input_size: tuple[int, int, int], max_mebibytes: int) -> int:
    """How many images of this size the ring holds: ``wanted``, or as many as fit the memory bound (at least one)."""
    channels, height, width = input_size
    image_bytes = channels * height * width * STORED_DTYPE.itemsize
    return max(1, min(wanted, max_mebibytes * 2**20 // image_bytes))
