"""The generator as a player: its latents, and what begins and ends a turn of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfadc.distillation.generator.meta import MetaGenerator
from dfadc.distillation.generator.networks import build_generator
from dfadc.distillation.trainable import Player, forget_

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dfadc.contract import ImageContract
    from dfadc.distillation.compute.policy import ComputePolicy
    from dfadc.distillation.forward_state import ForwardState
    from dfadc.distillation.generator.latents import FreshLatents
    from dfadc.recipe.schema import GeneratorSettings


class GeneratorPlayer(Player):
    """The generator, the latents that may move with it, and the recipe's policies of what a turn begins from.

    Args:
        module: latents (N, Z) -> images (N, C, H, W).
        settings: its side of the recipe.
        policy: how tensors are computed.
        latents: where its latents come from.
        contract: what an image is, for a generator that begins anew.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: GeneratorSettings,
        policy: ComputePolicy,
        *,
        latents: FreshLatents,
        contract: ImageContract,
    ) -> None:
        super().__init__(module, settings, policy, extra=list(latents.parameters()), extra_rate=settings.latent_rate)
        self.rules = settings
        self.latents = latents
        self.contract = contract
        self.meta: MetaGenerator | None = None
        if settings.meta != "off":
            betas = (settings.optimizer.momentum, settings.optimizer.second_beta)
            network = [parameter for parameter in module.parameters() if parameter.requires_grad]
            self.meta = MetaGenerator(network, settings.meta, betas=betas, updates=settings.steps)

    def begin_turn(self, step: int, rng: torch.Generator) -> None:
        """Renews what lasts for a turn, and the generator itself where its time has come.

        Args:
            step: steps of the game that are done.
            rng: seeds a generator that begins anew.
        """
        if self.rules.reset_every and step and step % self.rules.reset_every == 0:
            self.reset(rng)
        self.latents.renew_()
        if self.meta is not None:
            self.meta.begin_turn()
        if self.latents.move or self.meta is not None:
            forget_(self.optimizer)

    def move(self, losses: Tensor | Iterable[Tensor], forward_state: ForwardState | None = None) -> None:
        """One update, which a meta-generator learns from."""
        super().move(losses, forward_state)
        if self.meta is not None:
            self.meta.gather(self.skipped)

    def end_turn(self) -> None:
        """Moves the meta-generator, where there is one."""
        if self.meta is not None:
            self.meta.end_turn(self.optimizer.param_groups[0]["lr"])

    def reset(self, rng: torch.Generator) -> None:
        """Begins anew: other initial weights, no momentum, no average.

        Source: CMI (2105.08584) for every turn, NAYER (2310.00258) for every tenth.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            fresh = build_generator(self.rules, self.contract)
        self.module.load_state_dict(fresh.state_dict())
        forget_(self.optimizer)
        self.skipped.zero_()
        if self.ema is not None:
            self.ema.module.load_state_dict(fresh.state_dict())
            self.ema.n_averaged.zero_()
        if self.meta is not None:
            self.meta.restart()

    def state_dict(self) -> dict[str, Any]:
        """The player's, its latents' and its meta-generator's."""
        meta = None if self.meta is None else self.meta.state_dict()
        return {**super().state_dict(), "latents": self.latents.state_dict(), "meta": meta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.latents.load_state_dict(state["latents"])
        if self.meta is not None:
            self.meta.load_state_dict(state["meta"])
