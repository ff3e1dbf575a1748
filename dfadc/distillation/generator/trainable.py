"""The generator with its latents: a step's latents are renewed, and it begins anew after a collapse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dfadc.distillation.generator.networks import build_generator
from dfadc.distillation.trainable import TrainableNetwork, forget_
from dfadc.recipe.schema import ScheduleSettings

if TYPE_CHECKING:
    from dfadc.contract import ImageContract
    from dfadc.distillation.compute.policy import ComputePolicy
    from dfadc.distillation.generator.latents import FreshLatents
    from dfadc.recipe.schema import Recipe


class TrainableGenerator(TrainableNetwork):
    """The generator, and the latents that may be trained with it.

    Args:
        module: latents (N, Z) -> images (N, C, H, W).
        recipe: of the run.
        policy: how tensors are computed.
        latents: where its latents come from.
        contract: what an image is, for a generator that begins anew.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        policy: ComputePolicy,
        *,
        latents: FreshLatents,
        contract: ImageContract,
    ) -> None:
        self.rules = recipe.generator
        super().__init__(
            module,
            self.rules.optimizer,
            policy,
            schedule=_schedule(recipe),
            ema_decay=self.rules.ema_decay,
            extra=list(latents.parameters()),
        )
        self.latents = latents
        self.contract = contract

    def renew_latents_(self) -> None:
        """Before the updates of a step: draws anew the latents that last for a step, and forgets their momentum."""
        self.latents.renew_()
        if self.latents.are_trained:
            forget_(self.optimizer)

    def reset(self, rng: torch.Generator) -> None:
        """Begins anew: other initial weights, no momentum, no average."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            fresh = build_generator(self.rules, self.contract)
        self.module.load_state_dict(fresh.state_dict())
        forget_(self.optimizer)
        self.skipped.zero_()
        if self.ema is not None:
            self.ema.module.load_state_dict(fresh.state_dict())
            self.ema.n_averaged.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The network's and its latents'."""
        return {**super().state_dict(), "latents": self.latents.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.latents.load_state_dict(state["latents"])


def _schedule(recipe: Recipe) -> ScheduleSettings:
    """The generator's learning-rate schedule: the student's without its warm-up, or a constant rate."""
    if recipe.generator.schedule == "constant":
        return ScheduleSettings()
    return recipe.student.schedule.model_copy(update={"warmup": 0.0})
