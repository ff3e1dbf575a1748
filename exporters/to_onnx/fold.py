"""Folding of the batch norms that follow a matrix product with a constant. Free of torch.

torch folds those after convolutions only. Transformers such as LeViT normalise the output of a linear layer, flattened
to (N * T, C): ONNX Runtime 1.17 and 1.18 merge the two into a Gemm of three dimensions, which they then refuse to load.
In INT8 a batch norm of its own rounds its input once more.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from exporters.to_onnx.file import without_unread

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

_DEFAULT_EPSILON = 1e-5


class _Affine(NamedTuple):
    """A batch norm in eval mode: x * scale + shift for each channel."""

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]


def fold_batch_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """Multiplies weights by the scales of their batch norms, which become additions; ``model`` is used up.

    Between the matrix product and the batch norm there may be reshapes and transpositions that keep the channels.
    """
    graph = _Graph(model.graph)
    for node in model.graph.node:
        affine = graph.affine(node)
        product = graph.product_before(node) if affine is not None else None
        if affine is None or product is None:
            continue
        weight = numpy_helper.to_array(graph.constants[product.input[1]]).astype(np.float64)
        product.input[1] = graph.add_constant(product.input[1], weight * affine.scale)
        rank = len(graph.shapes[node.input[0]])
        shift = graph.add_constant(node.input[2], affine.shift.reshape(-1, *[1] * (rank - 2)))
        sides = [node.input[0], shift]
        node.CopyFrom(helper.make_node("Add", sides, list(node.output), name=f"{node.name.rpartition('/')[0]}/Add"))
    return without_unread(model)


class _Graph:
    """Constants, shapes, producers and readers of a graph's tensors."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.shapes = {
            value.name: [side.dim_value or side.dim_param for side in value.type.tensor_type.shape.dim]
            for value in graph.value_info
        }
        self._producers = {name: node for node in graph.node for name in node.output}
        self._num_readers: dict[str, int] = defaultdict(int)
        for name in [name for node in graph.node for name in node.input] + [value.name for value in graph.output]:
            self._num_readers[name] += 1

    def affine(self, node: onnx.NodeProto) -> _Affine | None:
        """Scale and shift of a batch norm of constants; None for anything else."""
        if node.op_type != "BatchNormalization" or not all(name in self.constants for name in node.input[1:]):
            return None
        if node.input[0] not in self.shapes:
            return None
        gamma, beta, mean, variance = (
            numpy_helper.to_array(self.constants[name]).astype(np.float64) for name in node.input[1:]
        )
        epsilon = next((entry.f for entry in node.attribute if entry.name == "epsilon"), _DEFAULT_EPSILON)
        scale = gamma / np.sqrt(variance + epsilon)
        return _Affine(scale, beta - mean * scale)

    def product_before(self, batch_norm: onnx.NodeProto) -> onnx.NodeProto | None:
        """The matrix product whose columns are the channels of a batch norm, its only reader; None without one."""
        name, axis = batch_norm.input[0], 1
        while self._num_readers[name] == 1 and (node := self._producers.get(name)) is not None:
            source, shape = self.shapes.get(node.input[0]), self.shapes.get(name)
            if node.op_type == "MatMul":
                weight = self.constants.get(node.input[1])
                two_sided = weight is not None and weight.data_type == TensorProto.FLOAT and len(weight.dims) == 2
                return node if two_sided and shape is not None and axis == len(shape) - 1 else None
            if source is None or shape is None:
                return None
            if node.op_type == "Transpose":
                axis = next(entry.ints for entry in node.attribute if entry.name == "perm")[axis]
            elif node.op_type == "Reshape" and axis == len(shape) - 1 and source[-1] == shape[-1]:
                axis = len(source) - 1
            else:
                return None
            name = node.input[0]
        return None

    def add_constant(self, like: str, values: NDArray[np.float64]) -> str:
        """Adds an fp32 constant; its name begins with that of another."""
        name = next(f"{like}_folded{n or ''}" for n in count() if f"{like}_folded{n or ''}" not in self.constants)
        tensor = numpy_helper.from_array(values.astype(np.float32), name)
        self.constants[name] = tensor
        self._graph.initializer.append(tensor)
        return name
