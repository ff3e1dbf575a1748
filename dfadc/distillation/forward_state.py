"""State that forward passes move, such as running statistics, and the way back where an update is skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


class ForwardState:
    """Buffers that forward passes write to. Nothing here waits for the device.

    Args:
        tensors: on one device; they stay the same ones.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.dtype, []).append(tensor)
        self._groups = list(groups.values())
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Remembers the values as they are."""
        self._kept = [_flat(group) for group in self._groups]

    @torch.no_grad()
    def is_spoiled(self) -> Tensor | None:
        """True (a scalar tensor) where a value that was finite when kept is not any more; None where there are none."""
        found = [
            (kept.isfinite() & ~_flat(group).isfinite()).any()
            for kept, group in zip(self._kept, self._groups, strict=True)
            if kept.is_floating_point()
        ]
        return torch.stack(found).any() if found else None

    @torch.no_grad()
    def undo(self, skipped: Tensor) -> None:
        """Puts the kept values back where ``skipped`` (scalar) is above 0."""
        for kept, group in zip(self._kept, self._groups, strict=True):
            values = torch.where(skipped > 0, kept, _flat(group)).split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [value.view_as(tensor) for value, tensor in zip(values, group, strict=True)])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
