"""Exponential moving average of a network in training."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dfadc.distillation.forward_state import ForwardState

if TYPE_CHECKING:
    from torch import Tensor, nn


class MovingAverage(AveragedModel):
    """An exponential moving average of a network's parameters and buffers; what counts is copied.

    torch's own looks every tensor up again at every update, which takes longer than to average those of a small
    network.

    Args:
        module: the network, whose tensors stay the same ones as long as it is trained.
        decay: share of the average that an update leaves, in [0, 1].
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self._decay = decay
        self._averaged, self._counted = _tensors(self.module)
        self._current, self._current_counts = _tensors(module)
        self._counts = ForwardState(self._counted)
        if self._averaged:
            self.n_averaged = self.n_averaged.to(self._averaged[0].device)

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Moves the average towards the network as it is now; the first time it becomes it.

        Args:
            skipped: scalar; where it is 1, the network did not move, and nor does the average.
        """
        weight = torch.where(self.n_averaged == 0, 1.0, 1 - self._decay) * (1 - skipped)
        if self._averaged:
            moves = torch._foreach_sub(self._current, self._averaged)  # noqa: SLF001 -- it has no public name
            torch._foreach_mul_(moves, weight)
            torch._foreach_add_(self._averaged, moves)
        if self._counted:
            self._counts.keep()
            torch._foreach_copy_(self._counted, self._current_counts)
            self._counts.undo(skipped)
        self.n_averaged += 1 - skipped.long()


def _tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers: those that can be averaged, and those that count or, as masks do, hold infinities."""
    found = [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
    can_average = [tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in found]
    pairs = list(zip(found, can_average, strict=True))
    return [tensor for tensor, can in pairs if can], [tensor for tensor, can in pairs if not can]
