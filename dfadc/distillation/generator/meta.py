"""A meta-generator: weights from which a few updates lead to good images of any latents."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn


class MetaGenerator:
    """The weights that every turn of the generator begins from, themselves moved once after the turn.

    Source: FastDFKD (2112.06253, algorithm 1), with FOMAML (the sum of the turn's gradients) or Reptile (the way that
    the turn went, backwards) for a gradient, and Adam at the generator's rate times the updates of a turn, as in the
    authors' code. Its factor of 67 on Reptile's gradient is left away: Adam does not see it.

    Args:
        parameters: the generator's.
        kind: how the meta-gradient is made.
        betas: Adam's.
        updates: of the generator in a turn.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        kind: Literal["fomaml", "reptile"],
        *,
        betas: tuple[float, float],
        updates: int,
    ) -> None:
        self.parameters = parameters
        self.kind = kind
        self.updates = updates
        self.weights = [parameter.detach().clone() for parameter in parameters]
        self.gradients = [torch.zeros_like(parameter) for parameter in parameters]
        self.optimizer = torch.optim.Adam(self.weights, betas=betas, fused=True)

    @torch.no_grad()
    def begin_turn(self) -> None:
        """Puts the generator on the meta-weights."""
        for weight, gradient, parameter in zip(self.weights, self.gradients, self.parameters, strict=True):
            parameter.copy_(weight)
            gradient.zero_()

    def gather(self, found_inf: Tensor) -> None:
        """Takes in the gradient of an update, unless that was skipped.

        Args:
            found_inf: scalar, 1 where the gradient was not finite.
        """
        if self.kind != "fomaml":
            return
        for total, parameter in zip(self.gradients, self.parameters, strict=True):
            if parameter.grad is not None:
                total.add_(torch.where(found_inf > 0, 0.0, parameter.grad))

    @torch.no_grad()
    def end_turn(self, learning_rate: float) -> None:
        """Moves the meta-weights.

        Args:
            learning_rate: of the generator in this turn.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * self.updates
        for weight, gradient, parameter in zip(self.weights, self.gradients, self.parameters, strict=True):
            weight.grad = gradient if self.kind == "fomaml" else weight - parameter
        self.optimizer.step()

    def restart(self) -> None:
        """Begins anew from the generator as it is."""
        self.optimizer.state.clear()
        for weight, parameter in zip(self.weights, self.parameters, strict=True):
            weight.copy_(parameter.detach())

    def state_dict(self) -> dict[str, Any]:
        """The meta-weights and what moves them; gradients begin with each turn."""
        return {"weights": self.weights, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for weight, saved in zip(self.weights, state["weights"], strict=True):
            weight.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
