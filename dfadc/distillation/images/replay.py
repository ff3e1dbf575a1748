"""Images of earlier steps: a replay buffer of recent ones, a reservoir over the whole run for calibration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfadc.distillation.compute.transfer import send
from dfadc.networks.logits import predict

if TYPE_CHECKING:
    from dfadc.contract import ImageContract, Task
    from dfadc.recipe.schema import Recipe

#: Normalised images lie within a few units of 0, where half precision is finer than 8-bit pixels.
STORED_DTYPE = torch.float16
#: Steps that a repeated batch may come from.
REPEAT_STEPS = 10
#: Bound on the memory of a store; its capacity is cut to it.
MOST_BYTES = 512 * 2**20
#: Images kept over the whole run, for calibration.
RESERVOIR_SIZE = 1024


class ImageStore:
    """A bounded number of images in half precision, and the number of those offered.

    Args:
        capacity: images at most.
        input_size: (C, H, W) of an image.
        device: where the images stay.
    """

    def __init__(self, capacity: int, input_size: tuple[int, int, int], device: torch.device) -> None:
        self.images = torch.empty((capacity, *input_size), dtype=STORED_DTYPE, device=device)
        self.seen = self._marked = 0
        #: What was overwritten since the mark: slots, and what they held, the oldest first.
        self._overwritten: list[tuple[Tensor, ...]] = []

    def __len__(self) -> int:
        return min(self.seen, len(self.images))

    def mark(self) -> None:
        """Marks the content as it is; from now on the content that is overwritten is kept as well."""
        self._marked = self.seen
        self._overwritten = []

    def go_back(self) -> None:
        """Restores the content that was marked."""
        for slots, *rows in reversed(self._overwritten):
            for tensor, row in zip(self._tensors, rows, strict=True):
                tensor[slots] = row
        self.seen = self._marked
        self._overwritten = []

    def mark_state(self) -> dict[str, Any]:
        """State that :meth:`go_back` restores."""
        return {"marked": self._marked, "overwritten": [list(each) for each in self._overwritten]}

    def load_mark_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`mark_state`, after the content was loaded."""
        self._marked = state["marked"]
        self._overwritten = [tuple(t.to(self.images.device) for t in each) for each in state["overwritten"]]

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        """Stored tensors, by slot."""
        return (self.images,)

    def _will_overwrite(self, slots: Tensor) -> None:
        """Keeps what slots (CPU) hold, if they do and it is that of the mark."""
        slots = slots[slots < min(self._marked, len(self.images))]
        if len(slots):
            slots = send(slots, self.images.device)
            self._overwritten.append((slots, *(tensor[slots] for tensor in self._tensors)))

    def state_dict(self) -> dict[str, Any]:
        """Stored part of the buffer."""
        return {"images": self.images[: len(self)].clone(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.seen = state["seen"]
        self.images[: len(self)] = state["images"]


class ReplayBuffer(ImageStore):
    """The most recent images, and the teacher's logits to them where those are needed.

    Args:
        capacity: images at most.
        input_size: (C, H, W) of an image.
        device: where the images stay.
        logit_shape: of the teacher's logits to one image, (K,) or (K, h, w), where they are stored with it; (0,): they
            are not.
        balanced: drawing gives every class that the teacher saw the same chance, however many images it has.
        task: of the teacher.
    """

    def __init__(
        self,
        capacity: int,
        input_size: tuple[int, int, int],
        device: torch.device,
        *,
        logit_shape: tuple[int, ...] = (0,),
        balanced: bool = False,
        task: Task = "classification",
    ) -> None:
        super().__init__(capacity, input_size, device)
        self.logits = torch.zeros((capacity, *logit_shape), device=device)
        self.balanced = balanced
        self.task = task

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.images, self.logits

    @property
    def keeps_logits(self) -> bool:
        """True if images are stored with the teacher's logits."""
        return bool(self.logits.shape[1])

    def push(self, images: Tensor, logits: Tensor | None = None) -> None:
        """Stores images (N, C, H, W), and logits (N, ...) where it keeps them; the oldest give way."""
        if not len(self.images) or not len(images):
            return
        # Of more images than fit only the last ones stay; the same slot twice in one assignment would be undefined.
        kept = images.detach()[-len(self.images) :]
        rows = [kept.to(STORED_DTYPE)]
        if self.keeps_logits:
            assert logits is not None, "the buffer stores the teacher's logits"  # noqa: S101
            rows.append(logits.detach()[-len(kept) :].float())
        newest = (self.seen - 1) % len(self.images)
        before = [tensor[newest] if self.seen else torch.zeros_like(tensor[0]) for tensor in self._tensors]
        first = self.seen + len(images) - len(kept)
        slots = torch.arange(first, first + len(kept)) % len(self.images)
        # Whatever is overwritten for the first time since the mark: later it is no longer what was there then.
        self._will_overwrite(slots[(slots - self._marked) % len(self.images) >= self.seen - self._marked])
        slots = send(slots, self.images.device)
        self.seen += len(images)
        # A value that is not finite would spoil every batch that replays it: the image before is stored once more.
        is_finite = torch.stack([row.isfinite().flatten(1).all(dim=1) for row in rows]).all(dim=0)
        for tensor, row, other in zip(self._tensors, rows, before, strict=False):
            tensor[slots] = torch.where(is_finite.view(-1, *[1] * (row.dim() - 1)), row, other)

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Stored images, with replacement, in fp32 (count, C, H, W), and their logits (count, ...), or (count, 0)."""
        if self.balanced:
            slots = self._draw_balanced(count, rng)
        else:
            slots = send(torch.randint(len(self), (count,), generator=rng), self.images.device)
        return self.images[slots].float(), self.logits[slots]

    def newest(self, count: int) -> Tensor:
        """The last images pushed, in fp32, as many as there are up to ``count``."""
        slots = torch.arange(max(0, self.seen - min(count, len(self))), self.seen) % len(self.images)
        return self.images[slots.to(self.images.device)].float()

    def _draw_balanced(self, count: int, rng: torch.Generator) -> Tensor:
        """Slots drawn with a chance of 1 / images of the class; nothing here waits for the device.

        Of several labels the chance is the sum over them of 1 / images that have the label in the same state.
        """
        predictions = predict(self.logits[: len(self)], self.task)
        if self.task == "multilabel":
            num_on = predictions.sum(dim=0)
            chances = torch.where(predictions, 1 / num_on, 1 / (len(self) - num_on)).sum(dim=1)
        else:
            counts = torch.zeros(self.logits.shape[1], device=self.logits.device)
            counts.index_add_(0, predictions, torch.ones_like(predictions, dtype=counts.dtype))
            chances = counts[predictions].reciprocal()
        reached = chances.cumsum(0)
        drawn = send(torch.rand(count, generator=rng), reached.device) * reached[-1]
        return torch.searchsorted(reached, drawn).clamp_max(len(self) - 1)

    def state_dict(self) -> dict[str, Any]:
        """Stored part of the buffer."""
        return {**super().state_dict(), "logits": self.logits[: len(self)].clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.logits[: len(self)] = state["logits"]


def build_repeats(
    recipe: Recipe, contract: ImageContract, device: torch.device, logit_size: tuple[int, ...] = ()
) -> ReplayBuffer:
    """The student's last new batches with the teacher's logits, for repeated updates; of no capacity without any."""
    logit_shape = (contract.num_classes, *logit_size)
    capacity = REPEAT_STEPS * recipe.student.steps * recipe.batch_size if recipe.replay.repeats else 0
    bounded = bounded_capacity(capacity, contract.input_size, logit_shape=logit_shape)
    return ReplayBuffer(min(capacity, bounded), contract.input_size, device, logit_shape=logit_shape)


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
            self._will_overwrite(slots[position : position + 1])
            self.images[slots[position]] = finite(images[position].detach().to(STORED_DTYPE))
        self.seen += len(images)


def finite(values: Tensor) -> Tensor:
    """The values, with 0 for those that are not finite."""
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def build_replay(recipe: Recipe, contract: ImageContract, device: torch.device) -> ReplayBuffer:
    """The replay buffer of a recipe; of no capacity where nothing is replayed.

    The teacher's logits are stored where drawing needs their classes; they are not those to the shifted images.
    """
    logit_shape = (contract.num_classes if recipe.replay.balanced else 0,)
    capacity = bounded_capacity(recipe.replay.capacity, contract.input_size, logit_shape=logit_shape)
    return ReplayBuffer(
        capacity if recipe.replay.share > 0 else 0,
        contract.input_size,
        device,
        logit_shape=logit_shape,
        task=contract.task,
        balanced=recipe.replay.balanced,
    )


def bounded_capacity(
    wanted: int, input_size: tuple[int, int, int], *, logit_shape: tuple[int, ...] = (0,), most_bytes: int = MOST_BYTES
) -> int:
    """Images of this size that a buffer holds: ``wanted``, or as many as fit the memory bound (at least one)."""
    image_bytes = math.prod(input_size) * STORED_DTYPE.itemsize + math.prod(logit_shape) * torch.float32.itemsize
    return max(1, min(wanted, most_bytes // image_bytes))
