"""Training state: student, generator, replay buffer, random streams. This is what a checkpoint saves."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dfadc.distillation.generator.latents import build_latents
from dfadc.distillation.generator.trainable import TrainableGenerator
from dfadc.distillation.images.replay import (
    RESERVOIR_SIZE,
    STORED_DTYPE,
    ImageStore,
    Reservoir,
    build_repeats,
    build_replay,
)
from dfadc.distillation.trainable import TrainableNetwork

if TYPE_CHECKING:
    from dfadc.contract import ImageContract
    from dfadc.distillation.compute.policy import ComputePolicy
    from dfadc.recipe.schema import Recipe

#: The name under which the state to go back to is registered: it is no part of itself.
MONITOR = "monitor"
#: Images of each student update that are offered to the reservoir; it still sees the whole run.
RESERVOIR_OFFER = 4
#: Of fewer procedural images than these a student learns each by heart.
LEAST_STOCK = 1000


class Stateful(Protocol):
    """An object with a state of tensors and plain values."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""


class TrainingState:
    """Student, generator, replay buffer and random streams: with this ``state_dict`` a run goes on bit by bit.

    Args:
        student: the student network, (N, C, H, W) -> logits.
        generator: the generator network, latents (N, Z) -> (N, C, H, W).
        recipe: the run's settings.
        contract: what an image is.
        policy: how tensors are computed.
        logit_size: (h, w) of the teacher's logits where it answers every pixel.
        stock: procedural images (N, C, H, W), normalised, to train on; None, or too few: new ones are drawn each time.
        reservoir_size: images kept over the whole run, for calibration.
    """

    def __init__(
        self,
        student: nn.Module,
        generator: nn.Module,
        *,
        recipe: Recipe,
        contract: ImageContract,
        policy: ComputePolicy,
        logit_size: tuple[int, ...] = (),
        stock: Tensor | None = None,
        reservoir_size: int = RESERVOIR_SIZE,
    ) -> None:
        self.device = policy.device
        self.latent_dim = recipe.generator.latent_dim
        self.rng = torch.Generator().manual_seed(recipe.seed)
        self.latent_rng = torch.Generator(policy.device).manual_seed(recipe.seed + 1)
        #: Verification draws from a stream of its own: its latents are never those of training.
        self.sample_rng = torch.Generator(policy.device).manual_seed(recipe.seed + 2)
        latents = build_latents(
            recipe.generator.latents,
            self.latent_dim,
            self.latent_rng,
            batch_size=recipe.batch_size,
            num_classes=contract.num_classes,
        )
        self._first_update = recipe.first_update
        self.student = TrainableNetwork(
            student,
            recipe.student.optimizer,
            policy,
            schedule=recipe.student.schedule,
            ema_decay=recipe.student.ema_decay,
        )
        self.generator = TrainableGenerator(generator, recipe, policy, latents=latents, contract=contract)
        self.replay = build_replay(recipe, contract, policy.device)
        self.repeats = build_repeats(recipe, contract, policy.device, logit_size)
        self.reservoir = Reservoir(reservoir_size, contract.input_size, policy.device)
        self.stock = stock.to(policy.device, STORED_DTYPE) if stock is not None and len(stock) >= LEAST_STOCK else None
        self.snapshots = torch.empty((0, *contract.input_size), dtype=STORED_DTYPE)
        self.step = 0
        #: Steps of the whole run; a time budget sets them before the first one.
        self.num_steps = recipe.steps
        self._registered: dict[str, Stateful] = {}
        #: Parts of a loaded state that were not registered yet.
        self._unclaimed: dict[str, Any] = {}

    def set_learning_rates(self) -> None:
        """Sets both rates for the share of the run that is done; the student's schedule begins with its updates."""
        progress, start = self.step / self.num_steps, self._first_update
        self.student.set_learning_rate(max(0.0, (progress - start) / (1 - start)))
        self.generator.set_learning_rate(progress)

    def register_state(self, name: str, part: Stateful) -> None:
        """Makes the state of ``part`` a part of this one; it takes what a loaded state holds of it."""
        self._registered[name] = part
        if name in self._unclaimed:
            part.load_state_dict(self._unclaimed.pop(name))

    def snapshot(self) -> dict[str, Any]:
        """A copy of all that updates change, to go back to; the stores of images are marked, and not copied."""
        for store in self.stores:
            store.mark()
        registered = {name: part.state_dict() for name, part in self._registered.items() if name != MONITOR}
        students = {"student": self.student.state_dict(), "generator": self.generator.state_dict()}
        return copy.deepcopy({**students, "registered": registered, "num_snapshots": len(self.snapshots)})

    def go_back(self, snapshot: dict[str, Any]) -> None:
        """Goes back to the last snapshot. Steps and random streams go on: what led here is not drawn again."""
        snapshot = copy.deepcopy(snapshot)
        self.student.load_state_dict(snapshot["student"])
        self.generator.load_state_dict(snapshot["generator"])
        for name, state in snapshot["registered"].items():
            self._registered[name].load_state_dict(state)
        for store in self.stores:
            store.go_back()
        self.snapshots = self.snapshots[: snapshot["num_snapshots"]]

    @property
    def stores(self) -> tuple[ImageStore, ...]:
        """All stores of images of earlier steps."""
        return self.replay, self.repeats, self.reservoir

    def store(self, images: Tensor, logits: Tensor | None = None, *, offer: int = RESERVOIR_OFFER) -> None:
        """Stores images (N, C, H, W): all in the replay buffer, the first ``offer`` of them in the reservoir.

        Args:
            images: that the student is trained on.
            logits: the teacher's (N, ...), where the replay buffer stores them.
            offer: images for the reservoir.
        """
        self.replay.push(images, logits)
        if len(self.reservoir.images):
            self.reservoir.offer(images[:offer], self.rng)

    def draw_latents(self, count: int) -> Tensor:
        """Latents (count, Z) for training, from the recipe's source."""
        return self.generator.latents.draw(count)

    def draw_unseen_latents(self, count: int) -> Tensor:
        """Standard-normal latents (count, Z) from the stream that training never uses."""
        return torch.randn(count, self.latent_dim, generator=self.sample_rng, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes in a run; references, not copies, except where stated by the parts."""
        streams = {"rng": self.rng, "latent_rng": self.latent_rng, "sample_rng": self.sample_rng}
        return {
            "student": self.student.state_dict(),
            "generator": self.generator.state_dict(),
            "replay": self.replay.state_dict(),
            "repeats": self.repeats.state_dict(),
            "reservoir": self.reservoir.state_dict(),
            "snapshots": self.snapshots,
            "step": self.step,
            "registered": {**self._unclaimed, **{name: part.state_dict() for name, part in self._registered.items()}},
            # Dropout in a student draws from torch's global stream.
            "global_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            **{name: stream.get_state() for name, stream in streams.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.student.load_state_dict(state["student"])
        self.generator.load_state_dict(state["generator"])
        self.replay.load_state_dict(state["replay"])
        self.repeats.load_state_dict(state["repeats"])
        self.reservoir.load_state_dict(state["reservoir"])
        self.snapshots = state["snapshots"].clone()
        self.step = state["step"]
        self._unclaimed = dict(state["registered"])
        for name, part in self._registered.items():
            part.load_state_dict(self._unclaimed.pop(name))
        torch.set_rng_state(state["global_rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.rng.set_state(state["rng"])
        self.latent_rng.set_state(state["latent_rng"])
        self.sample_rng.set_state(state["sample_rng"])
