"""Hints: distance of the student's layers to the teacher's, where the student is the teacher made narrower."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from dfadc.student.inherit import Correspondence

#: Least variance of a teacher's layer: one whose output never changes gives no unit.
_LEAST_VARIANCE = 1e-6


class LayerHints:
    """Distance of the student's layers to the teacher's channels that they correspond to.

    E[(student - teacher)²] / Var[teacher] of each layer. Logits alone leave a student free to answer generated images
    in a way of its own, which real images then show.

    Within its context hooks are on both networks; they compute nothing but within :meth:`comparing`.

    Args:
        layers: the pairs.

    Source: hints (FitNets, Romero et al. 2015, arXiv 1412.6550, eq. 3). Deviations: at every layer and beside the
    logits instead of at one layer before them; no regressor, for the channels are known; in units of the teacher's
    variance.
    """

    def __init__(self, layers: Sequence[Correspondence]) -> None:
        self._layers = layers
        self._attached = self._comparing = False
        self._expected: list[Tensor | None] = [None] * len(layers)
        self._distances: list[Tensor] = []
        self._handles = ExitStack()

    def __enter__(self) -> Self:
        for index, layer in enumerate(self._layers):
            for module, observe in ((layer.teacher, self._expect), (layer.student, self._compare)):
                self._handles.callback(module.register_forward_hook(partial(observe, index)).remove)
        self._attached = True
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the hooks off both networks."""
        self._handles.close()
        self._attached = False

    @contextmanager
    def comparing(self) -> Iterator[list[Tensor]]:
        """Gives the distances, scalars in fp32, of the layers that first the teacher and then the student ran within.

        There are none where the teacher did not run.
        """
        assert self._attached, "hints are compared within their context"  # noqa: S101
        self._comparing = True
        try:
            yield self._distances
        finally:
            self._comparing, self._distances = False, []
            self._expected = [None] * len(self._layers)

    def _expect(self, index: int, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        if self._comparing and self._expected[index] is None:  # the first images that the teacher sees
            layer = self._layers[index]
            self._expected[index] = output.index_select(layer.axis, layer.channels).float()

    def _compare(self, index: int, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        """The teacher may have seen the first images alone."""
        expected = self._expected[index]
        if not self._comparing or expected is None:
            return
        error = (output[: len(expected)].float() - expected).square().mean()
        self._distances.append(error / expected.var(correction=0).clamp_min(_LEAST_VARIANCE))
