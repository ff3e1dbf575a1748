"""Rounding in INT8 graphs: which nodes read activations as they are before QuantizeLinear. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import onnx


def bypass_rounding(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Lets named nodes and the graph's outputs read activations as they are before QuantizeLinear, in place.

    ONNX Runtime replaces a quantised activation for all its readers, those that are excluded from quantisation too.
    """
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
    _drop_unread(graph)


def dequantised_inputs(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]
) -> Iterator[tuple[int, onnx.NodeProto]]:
    """Position of each input that comes out of a DequantizeLinear, and that node."""
    for position, name in enumerate(node.input):
        if (producer := producers.get(name)) is not None and producer.op_type == "DequantizeLinear":
            yield position, producer


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Removes QuantizeLinear and DequantizeLinear nodes that nothing reads, with their constants."""
    outputs = {value.name for value in graph.output}
    while True:
        read = {name for node in graph.node for name in node.input} | outputs
        linear = (node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear"))
        unread = [node for node in linear if not read.intersection(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    written = {name for node in graph.node for name in node.output}
    for tensors, alive in ((graph.initializer, read), (graph.value_info, written)):
        kept = [tensor for tensor in tensors if tensor.name in alive]
        del tensors[:]
        tensors.extend(kept)
