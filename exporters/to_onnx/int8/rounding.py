"""Rounding in INT8 graphs: which nodes read activations as they are before QuantizeLinear. Free of torch."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

from exporters.to_onnx.file import without_unread

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import onnx


def without_rounding(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy whose named nodes and outputs read activations as they are before QuantizeLinear.

    ONNX Runtime replaces a quantised activation for all its readers, those that are excluded from quantisation too.
    """
    copy = deepcopy(model)
    graph = copy.graph
    producers = {name: node for node in graph.node for name in node.output}
    for output in graph.output:
        dequantise = producers[output.name]
        if dequantise.op_type == "DequantizeLinear":
            quantise = producers[dequantise.input[0]]
            writer = producers[quantise.input[0]]
            dequantise.output[0] += "_unread"
            position = list(writer.output).index(quantise.input[0])
            quantise.input[0] = writer.output[position] = output.name
    for node in graph.node:
        if node.name in names:
            for position, dequantise in dequantised_inputs(node, producers):
                quantise_node = producers.get(dequantise.input[0])
                if quantise_node is not None:
                    node.input[position] = quantise_node.input[0]
    return without_unread(copy)


def dequantised_inputs(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]
) -> Iterator[tuple[int, onnx.NodeProto]]:
    """Position of each input that comes out of a DequantizeLinear, and that node."""
    for position, name in enumerate(node.input):
        if (producer := producers.get(name)) is not None and producer.op_type == "DequantizeLinear":
            yield position, producer
