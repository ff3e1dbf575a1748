"""How far a student's activations stay from the end of fp16, measured where no runtime can hide it: in torch, in fp32.

ONNX Runtime computes fp16 graphs in fp32 on a CPU, so what overflows on a device comes back finite here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dfadc.errors import DfadcError
from exporters.to_onnx.fp16 import FP16_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

#: Below this the headroom is small. Real images reached up to 2.8 times what a layer shows on the samples (the whole
#: Fashion-MNIST test set through students of recipes ``auto``, 1.7, and ``dfad``, 2.8); the rest is for sums in fp16
#: that pass their result on the way to it.
SMALL_HEADROOM = 8.0


@dataclass(frozen=True, slots=True)
class Headroom:
    """What the layers of a student put out and take in.

    Args:
        peaks: layer -> its largest magnitude; infinite where a NaN or infinity was among them.
        num_images: over how many images.
    """

    peaks: Mapping[str, float]
    num_images: int

    @property
    def worst_layer(self) -> str:
        """The layer with the largest magnitude."""
        return max(self.peaks, key=lambda layer: self.peaks[layer])

    @property
    def factor(self) -> float:
        """How often the largest magnitude fits into fp16's range; below 1 it does not."""
        peak = self.peaks[self.worst_layer]
        return FP16_MAX / peak if peak else float("inf")

    @property
    def is_small(self) -> bool:
        """Whether images that reach further than these may leave fp16."""
        return self.factor < SMALL_HEADROOM

    def __str__(self) -> str:
        peak = self.peaks[self.worst_layer]
        text = (
            f"fp16 headroom {_short(self.factor)}x: activations reach {_short(peak)} ({self.worst_layer}) on "
            f"{self.num_images:,} verification samples, fp16 ends at {FP16_MAX:,.0f}"
        )
        if self.factor < 1:
            return f"warning: {text}; right only where those layers are computed in fp32"
        if self.is_small:
            return f"warning: {text}; below {SMALL_HEADROOM:.0f}x other images may overflow"
        return text


def measure_headroom(student: nn.Module, batches: Iterable[NDArray[np.float32]]) -> Headroom:
    """Runs the student with a forward hook on every layer (module without children), in fp32.

    A batch norm right behind a convolution is part of it in every artifact, so it counts as that convolution, and
    what passes between the two does not count.

    Args:
        student: in eval mode, on the CPU; its hooks are removed again.
        batches: images (n, C, H, W) float32 as the student takes them, some at a time.

    Raises:
        DfadcError: there are no images.
    """
    peaks, num_images = _Peaks(), 0
    handles = [
        layer.register_forward_hook(peaks.hook(name or type(layer).__name__))
        for name, layer in student.named_modules()
        if not any(layer.children())
    ]
    try:
        with torch.inference_mode():
            for images in batches:
                student(torch.from_numpy(images))
                num_images += len(images)
        peaks.flush()
    finally:
        for handle in handles:
            handle.remove()
    if not num_images:
        raise DfadcError("there are no samples to measure the fp16 headroom on")
    return Headroom(peaks.found, num_images)


class _Peaks:
    """Largest magnitudes by layer, gathered by forward hooks."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self._convolved: tuple[str, Tensor, float] | None = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """The forward hook of one layer."""

        def record(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(layer, nn.BatchNorm2d) and self._convolved is not None and inputs[0] is self._convolved[1]:
                self._add(self._convolved[0], _magnitude(output))
                self._convolved = None
                return
            self.flush()
            for tensor in inputs:
                self._add(name, _magnitude(tensor))
            if isinstance(layer, nn.Conv2d):
                self._convolved = (name, output, _magnitude(output))
            else:
                self._add(name, _magnitude(output))

        return record

    def flush(self) -> None:
        """Counts the last convolution's output, behind which no batch norm came."""
        if self._convolved is not None:
            self._add(self._convolved[0], self._convolved[2])
            self._convolved = None

    def _add(self, name: str, magnitude: float) -> None:
        self.found[name] = max(self.found.get(name, 0.0), magnitude)


def _magnitude(value: object) -> float:
    """The largest absolute value of a float tensor; infinity for NaN, 0 for anything else."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return 0.0
    peak = float(value.abs().max())
    return math.inf if math.isnan(peak) else peak


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
