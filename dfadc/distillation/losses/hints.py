"""What the teacher's layers answer, for a student whose layers are the teacher's made narrower; a scalar in fp32."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dfadc.student.inherit import Correspondence

#: Least variance of a teacher's layer: one that answers the same to everything gives no unit.
_LEAST_VARIANCE = 1e-6


class LayerHints:
    """Distance of the student's layers to the teacher's channels that they correspond to.

    Mean over the layers of E[(student - teacher)²] / Var[teacher]. Logits alone leave a student free to answer
    generated images in a way of its own, which real images then show.

    The hooks stay on both networks until :meth:`close`; they compute nothing but of images that the teacher was watched
    on, and that the student is asked about next.

    Args:
        layers: the pairs.

    Source: hints (FitNets, Romero et al. 2015, arXiv 1412.6550, eq. 3). Deviations: at every layer and beside the
    logits instead of at one layer before them; no regressor, for the channels are known; in units of the teacher's
    variance.
    """

    def __init__(self, layers: list[Correspondence]) -> None:
        self._watching = False
        self._axes = [layer.axis for layer in layers]
        self._channels = [layer.channels for layer in layers]
        self._expected: list[Tensor | None] = [None] * len(layers)
        self._distances: list[Tensor] = []
        self._handles = [
            module.register_forward_hook(partial(observe, index))
            for index, layer in enumerate(layers)
            for module, observe in ((layer.teacher, self._expect), (layer.student, self._compare))
        ]

    def close(self) -> None:
        """Takes the hooks off both networks."""
        for handle in self._handles:
            handle.remove()

    def watch(self, teacher: nn.Module, images: Tensor) -> Tensor:
        """The teacher's logits to images (N, C, H, W), its layers' answers being kept for the student."""
        self._watching = True
        logits: Tensor = teacher(images)
        self._watching = False
        return logits

    def take(self) -> Tensor | None:
        """The distance on what the teacher was watched on; None where it was not. Forgets it."""
        distance = torch.stack(self._distances).mean() if self._distances else None
        self._distances.clear()
        return distance

    def _expect(self, index: int, _: nn.Module, __: tuple[Tensor, ...], answers: Tensor) -> None:
        if self._watching:
            self._expected[index] = answers.index_select(self._axes[index], self._channels[index]).float()

    def _compare(self, index: int, _: nn.Module, __: tuple[Tensor, ...], answers: Tensor) -> None:
        """The teacher may have been asked about the first images alone."""
        expected = self._expected[index]
        if expected is None:
            return
        self._expected[index] = None
        error = (answers[: len(expected)].float() - expected).square().mean()
        self._distances.append(error / expected.var(correction=0).clamp_min(_LEAST_VARIANCE))
