"""Who plays: student and generator, their memory, their dice, and all that a run carries on."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dfadc.distillation.generator.latents import build_latents
from dfadc.distillation.generator.trainable import TrainableGenerator
from dfadc.distillation.images.replay import RESERVOIR_SIZE, STORED_DTYPE, ImageStore, Reservoir, build_echo, build_ring
from dfadc.distillation.trainable import TrainableNetwork

if TYPE_CHECKING:
    from dfadc.contract import ImageContract
    from dfadc.distillation.compute.policy import ComputePolicy
    from dfadc.recipe.schema import Recipe

#: The name under which the state to go back to is carried: it is no part of itself.
MONITOR = "monitor"
#: Images of each student update that are offered to the reservoir; it still sees the whole run.
RESERVOIR_OFFER = 4


class Stateful(Protocol):
    """What has a state of tensors and plain values."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""


class Players:
    """Both players, their memory and their dice: one ``state_dict`` is everything a run needs to go on bit by bit.

    Args:
        student: the student network, (N, C, H, W) -> logits.
        generator: the generator network, latents (N, Z) -> (N, C, H, W).
        recipe: the run's settings.
        contract: what an image is.
        policy: how tensors are computed.
        logit_size: (h, w) of the teacher's logits where it answers every pixel.
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
        self.student_start = recipe.student.start
        self.student = TrainableNetwork(
            student,
            recipe.student.optimizer,
            policy,
            schedule=recipe.student.schedule,
            ema_decay=recipe.student.ema_decay,
        )
        self.generator = TrainableGenerator(generator, recipe, policy, latents=latents, contract=contract)
        self.ring = build_ring(recipe, contract, policy.device)
        self.echo = build_echo(recipe, contract, policy.device, logit_size)
        self.reservoir = Reservoir(reservoir_size, contract.input_size, policy.device)
        self.set_aside = torch.empty((0, *contract.input_size), dtype=STORED_DTYPE)
        self.step = 0
        self._carried: dict[str, Stateful] = {}
        #: Of a state that was loaded: what nobody has asked for yet.
        self._unclaimed: dict[str, Any] = {}

    def set_learning_rates(self, progress: float) -> None:
        """Sets both rates for a share of the run in [0, 1); the student's schedule begins where it does."""
        start = self.student_start
        self.student.set_learning_rate(max(0.0, (progress - start) / (1 - start)))
        self.generator.set_learning_rate(progress)

    def carry(self, name: str, part: Stateful) -> None:
        """Makes the state of ``part`` a part of the players' own; it takes what a loaded state holds of it."""
        self._carried[name] = part
        if name in self._unclaimed:
            part.load_state_dict(self._unclaimed.pop(name))

    def snapshot(self) -> dict[str, Any]:
        """A copy of all that updates move, to go back to; the replay buffers are marked, and not copied."""
        for store in self.stores:
            store.mark()
        carried = {name: part.state_dict() for name, part in self._carried.items() if name != MONITOR}
        students = {"student": self.student.state_dict(), "generator": self.generator.state_dict()}
        return copy.deepcopy({**students, "carried": carried, "num_aside": len(self.set_aside)})

    def go_back(self, snapshot: dict[str, Any]) -> None:
        """Goes back to the last snapshot. Steps and dice go on: what led here is not drawn again."""
        snapshot = copy.deepcopy(snapshot)
        self.student.load_state_dict(snapshot["student"])
        self.generator.load_state_dict(snapshot["generator"])
        for name, state in snapshot["carried"].items():
            self._carried[name].load_state_dict(state)
        for store in self.stores:
            store.go_back()
        self.set_aside = self.set_aside[: snapshot["num_aside"]]

    @property
    def stores(self) -> tuple[ImageStore, ...]:
        """All that holds images of earlier steps."""
        return self.ring, self.echo, self.reservoir

    def remember(self, images: Tensor, answers: Tensor | None = None, *, offer: int = RESERVOIR_OFFER) -> None:
        """Keeps images (N, C, H, W): all in the ring, the first ``offer`` of them in the reservoir.

        Args:
            images: that the student was shown, or will be.
            answers: the teacher's logits (N, ...), where the ring keeps them.
            offer: images for the reservoir.
        """
        self.ring.push(images, answers)
        if len(self.reservoir.images):
            self.reservoir.offer(images[:offer], self.rng)

    def draw_latents(self, count: int) -> Tensor:
        """Latents (count, Z) for training, from where the recipe takes them."""
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
            "ring": self.ring.state_dict(),
            "echo": self.echo.state_dict(),
            "reservoir": self.reservoir.state_dict(),
            "set_aside": self.set_aside,
            "step": self.step,
            "carried": {**self._unclaimed, **{name: part.state_dict() for name, part in self._carried.items()}},
            # Dropout in a student draws from torch's global stream.
            "global_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            **{name: stream.get_state() for name, stream in streams.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.student.load_state_dict(state["student"])
        self.generator.load_state_dict(state["generator"])
        self.ring.load_state_dict(state["ring"])
        self.echo.load_state_dict(state["echo"])
        self.reservoir.load_state_dict(state["reservoir"])
        self.set_aside = state["set_aside"].clone()
        self.step = state["step"]
        self._unclaimed = dict(state["carried"])
        for name, part in self._carried.items():
            part.load_state_dict(self._unclaimed.pop(name))
        torch.set_rng_state(state["global_rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.rng.set_state(state["rng"])
        self.latent_rng.set_state(state["latent_rng"])
        self.sample_rng.set_state(state["sample_rng"])
