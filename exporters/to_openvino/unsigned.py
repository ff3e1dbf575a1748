"""Signed activations of an INT8 graph made unsigned for OpenVINO, with the same steps between their values.

OpenVINO (2024.6 to 2026.4) rounds a signed 8-bit activation that goes through a Concat to whole numbers, not to steps
of its scale: two convolutions, their Concat and a third convolution end 13 dB from what the graph says, at a step of
0.08. As unsigned values the same graph is exact. TensorRT takes signed ones only, so the ONNX keeps them.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from exporters.to_onnx.int8.rounding import without_rounding

#: Operators that OpenVINO fuses into the layer before them: nothing is gained by rounding in between.
_ACTIVATIONS = frozenset({"Clip", "Relu"})
#: Operators whose results are not negative, whatever they read.
_NON_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs"})
#: Operators that pass on values of their first input, or means of them.
_CARRIERS = frozenset(
    {
        *("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMax", "ReduceMean"),
        *("DequantizeLinear", "Flatten", "Gather", "Identity", "QuantizeLinear", "Reshape"),
        *("Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    }
)
#: Operators whose result is not negative if no input is.
_OF_ALL_INPUTS = frozenset({"Add", "Concat", "Max", "Mul"})
#: Operators between a Concat and the next QuantizeLinear.
_PASSED = _CARRIERS | _ACTIVATIONS


def with_unsigned_activations(source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of an INT8 graph for OpenVINO; of its signed activations, with zero point 0, two kinds become unsigned.

    Those that cannot be negative get zero point 0: what was at most 127 steps is the same number, and what was cut off
    there reaches further. OpenVINO runs them faster than signed ones: a ResNet-18 at 64 px in 11 instead of 14 ms on
    a Xeon with VNNI. Any others that go through a Concat get zero point 128, which gives the same numbers; it would
    cost time elsewhere.
    """
    # OpenVINO 2026.4 crashes on a Concat that is rounded before a ReLU and after it with different zero points.
    model = without_rounding(source, {node.name for node in source.graph.node if node.op_type in _ACTIVATIONS})
    graph = _Graph(model.graph)
    joined = graph.quantisers_at_concats()
    changed = set()
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or not graph.is_signed(node):
            continue
        if graph.is_non_negative(node.input[0]):
            zero_point = 0
        elif node.output[0] in joined:
            zero_point = 128
        else:
            continue
        for reader in (node, *graph.readers[node.output[0]]):
            reader.input[2] = f"zero_point_{zero_point}"
        changed.add(node.output[0])
    zero_points = [numpy_helper.from_array(np.array(value, np.uint8), f"zero_point_{value}") for value in (0, 128)]
    model.graph.initializer.extend(zero_points)
    kept = [value for value in model.graph.value_info if value.name not in changed]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return model


class _Graph:
    """Producers and readers of a graph's tensors."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._non_negative: dict[str, bool] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)

    def is_signed(self, quantise: onnx.NodeProto) -> bool:
        """True for an int8 activation with zero point 0 that only DequantizeLinear reads."""
        zero_point = self._constants.get(quantise.input[2]) if len(quantise.input) > 2 else None
        if zero_point is None or zero_point.data_type != TensorProto.INT8 or numpy_helper.to_array(zero_point).any():
            return False
        return all(reader.op_type == "DequantizeLinear" for reader in self.readers[quantise.output[0]])

    def is_non_negative(self, name: str) -> bool:
        """True for a tensor that cannot be negative, by the operators that it comes from."""
        if name not in self._non_negative:
            self._non_negative[name] = False  # for the recursion, which cannot come here again: graphs have no cycles
            self._non_negative[name] = self._cannot_be_negative(self._producers.get(name))
        return self._non_negative[name]

    def _cannot_be_negative(self, node: onnx.NodeProto | None) -> bool:
        if node is None:
            return False
        if node.op_type == "Clip":
            low = self._constants.get(node.input[1]) if len(node.input) > 1 else None
            return low is not None and bool(numpy_helper.to_array(low) >= 0)
        if node.op_type in _CARRIERS:
            return self.is_non_negative(node.input[0])
        if node.op_type in _OF_ALL_INPUTS:
            return all(map(self.is_non_negative, node.input))
        return node.op_type in _NON_NEGATIVE

    def quantisers_at_concats(self) -> set[str]:
        """Outputs of the QuantizeLinear nodes next to a Concat, or with nothing but carriers and ReLU between them."""
        found: set[str] = set()
        concats = [node for node in self._graph.node if node.op_type == "Concat"]
        above = [name for node in concats for name in node.input]
        while above:
            node = self._producers.get(above.pop())
            if node is not None and node.op_type == "QuantizeLinear":
                found.add(node.output[0])
            elif node is not None and node.op_type in _PASSED:
                above.append(node.input[0])
        below = [node.output[0] for node in concats]
        while below:
            for node in self.readers[below.pop()]:
                if node.op_type == "QuantizeLinear":
                    found.add(node.output[0])
                elif node.op_type in _PASSED:
                    below += node.output
        return found
