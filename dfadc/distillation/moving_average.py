"""The moving average of a network that moves."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

if TYPE_CHECKING:
    from torch import Tensor, nn


class MovingAverage(AveragedModel):
    """An exponential moving average of a network's parameters and buffers; what counts is copied.

    torch's own looks every tensor up again at every update, which takes longer than to average those of a small
    network.

    Args:
        module: the network, whose tensors stay the same ones as long as it moves.
        decay: share of the average that an update leaves, in [0, 1].
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self._averaged, self._counted = _tensors(self.module)
        self._current, self._current_counts = _tensors(module)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the network as it is now; the first time it becomes it."""
        if self.n_averaged == 0:
            torch._foreach_copy_(self._averaged, self._current)
        else:
            assert self.multi_avg_fn is not None  # noqa: S101
            self.multi_avg_fn(self._averaged, self._current, self.n_averaged)
        for counted, current in zip(self._counted, self._current_counts, strict=True):
            counted.copy_(current)
        self.n_averaged += 1


def _tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers: those in floating point, and those that count."""
    found = [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
    return [t for t in found if t.is_floating_point()], [t for t in found if not t.is_floating_point()]
