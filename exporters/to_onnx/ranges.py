"""Activation ranges of an fp32 graph, and the headroom that fp16 has above them. Free of torch.

They are measured on the fp32 graph: ONNX Runtime computes fp16 graphs in fp32 on a CPU, so what overflows on a device
stays finite here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from dfadc.errors import DfadcError
from exporters.sessions.onnx_runtime import OnnxRuntimeSession

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

#: The largest finite half-precision number.
FP16_MAX = 65504.0
#: Below this the headroom is small. Real images reached up to 2.8 times what a layer shows on the samples (the whole
#: Fashion-MNIST test set through students of recipes ``auto``, 1.7, and ``dfad``, 2.8); the rest is for sums in fp16
#: whose partial sums exceed the result.
SMALL_HEADROOM = 8.0
#: Bytes of images in a batch: all activations of a batch are in memory at once, 50 times the images in a MobileNetV2.
_BATCH_BYTES = 2**22
_MAX_BATCH = 32


@dataclass(frozen=True, slots=True)
class ActivationRanges:
    """The largest magnitude that each node of a graph reads or writes on a number of images.

    It is infinite if a NaN or infinity was among the values.
    """

    peaks: Mapping[str, float]
    num_images: int

    @property
    def worst_node(self) -> str:
        """The first node with the largest magnitude."""
        return max(self.peaks, key=lambda node: self.peaks[node])

    @property
    def headroom(self) -> float:
        """Largest number of fp16 over the largest magnitude; below 1 the graph overflows."""
        peak = self.peaks[self.worst_node]
        return FP16_MAX / peak if peak else float("inf")

    @property
    def is_headroom_small(self) -> bool:
        """True if other images may overflow."""
        return self.headroom < SMALL_HEADROOM

    def beyond(self, limit: float) -> dict[str, float]:
        """Nodes that read or write a magnitude above ``limit``."""
        return {name: peak for name, peak in self.peaks.items() if peak > limit}

    def __str__(self) -> str:
        peak = self.peaks[self.worst_node]
        text = (
            f"fp16 headroom {_short(self.headroom)}x: activations reach {_short(peak)} ({self.worst_node}) on "
            f"{self.num_images:,} verification samples, fp16 ends at {FP16_MAX:,.0f}"
        )
        if self.headroom < 1:
            return f"warning: {text}; right only where those layers are computed in fp32"
        if self.is_headroom_small:
            return f"warning: {text}; below {SMALL_HEADROOM:.0f}x other images may overflow"
        return text


def measure_activations(
    model: onnx.ModelProto, batches: Iterable[NDArray[np.float32]], *, threads: int = 1
) -> ActivationRanges:
    """Runs an fp32 graph on the CPU and records the largest magnitude of every fp32 tensor that a node writes.

    A node that reads a tensor counts like the one that writes it: in fp16 it would be given infinity. Batches are
    images (n, C, H, W) float32 as the graph takes them; with 0 threads ONNX Runtime chooses.

    Raises:
        DfadcError: there are no images.
    """
    exposed, names = _with_all_outputs(model)
    tensors: dict[str, float] = {}
    num_images = 0
    with _AllOutputsSession(exposed.SerializeToString(), threads=threads) as session:
        for images in batches:
            size = max(1, min(_MAX_BATCH, _BATCH_BYTES // max(1, images[:1].nbytes)))
            for start in range(0, len(images), size):
                outputs = session.all_outputs(images[start : start + size])
                for name, value in zip(names, outputs, strict=True):
                    tensors[name] = max(tensors.get(name, 0.0), _magnitude(value))
            num_images += len(images)
    if not num_images:
        raise DfadcError("there are no images to measure the activation ranges on")
    peaks = {
        node.name: max((tensors.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0)
        for node in model.graph.node
    }
    return ActivationRanges(peaks, num_images)


class _AllOutputsSession(OnnxRuntimeSession):
    """A session of a graph whose every tensor is an output."""

    _num_outputs = None

    def all_outputs(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Every output for one batch."""
        outputs: list[NDArray[np.float32]] = self._session.run(None, {self._input_name: images})
        return outputs


def _with_all_outputs(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of ``model`` with every node's outputs as graph outputs, and their names in order."""
    exposed = onnx.shape_inference.infer_shapes(model)
    inferred = {value.name: value for value in (*exposed.graph.value_info, *exposed.graph.output)}
    names = [name for node in exposed.graph.node for name in node.output if name]
    del exposed.graph.output[:]
    exposed.graph.output.extend(inferred.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return exposed, names


def _magnitude(value: NDArray[np.float32]) -> float:
    """The largest absolute value of an fp32 tensor; infinity for NaN, 0 for any other dtype."""
    if value.dtype != np.float32 or not value.size:
        return 0.0
    peak = max(float(value.max()), -float(value.min()))
    return float("inf") if np.isnan(peak) else peak


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
