"""INT8 graphs in which some layers are back in fp32. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:
    from collections.abc import Iterable


def in_fp32(quantised: onnx.ModelProto, source: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of an INT8 graph in which the named layers read fp32 activations and the source's fp32 weights.

    What carries an activation to them (ReLU, reshape, pooling) goes along: it would read rounded values otherwise.

    Args:
        quantised: the INT8 graph.
        source: the fp32 graph that it was made of.
        names: nodes that both graphs have.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantised)
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    originals = {node.name: node for node in source.graph.node}
    makers = {name: node for node in source.graph.node for name in node.output}
    names_here = {node.name for node in graph.node}
    pending = [node for node in graph.node if node.name in set(names)]
    while pending:
        node = pending.pop()
        for position, dequantise in _dequantised_inputs(node, producer):
            name = originals[node.name].input[position]
            node.input[position] = name
            quantise = producer.get(dequantise.input[0])
            if quantise is None:  # a weight, or a bias
                if dequantise.output[0] == name and dequantise in graph.node:
                    graph.node.remove(dequantise)  # ONNX Runtime gives a dequantised bias the name of the bias
                _bring_back_weights(graph, source, [name])
                continue
            if name in makers and makers[name].name not in names_here:
                _unfold(graph, source, makers[name], producer)
                names_here.add(makers[name].name)
            carrier = producer.get(quantise.input[0])
            if carrier is not None and len(_dequantised_inputs(carrier, producer)) == 1:
                pending.append(carrier)
    _drop_unread(graph)
    return model


def answers_in_fp32(quantised: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of an INT8 graph whose outputs are not rounded: in 256 steps the two highest logits are often one.

    Rounding them saves nothing, for no layer reads them, and cost .1 to .2 points of real accuracy.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantised)
    producer = {name: node for node in model.graph.node for name in node.output}
    last = []
    for output in model.graph.output:
        node = producer[output.name]
        if node.op_type == "DequantizeLinear":
            rounded = producer[node.input[0]]
            node.output[0] += "_unread"
            node = producer[rounded.input[0]]
            position = list(node.output).index(rounded.input[0])
            rounded.input[0] = node.output[position] = output.name
        if len(_dequantised_inputs(node, producer)) == 1:  # it only carries what a layer before it computed
            last.append(node.name)
    return in_fp32(model, source, last)


def layer_names(model: onnx.ModelProto) -> list[str]:
    """Nodes that compute on several quantised inputs: convolutions and matrix products, additions, ..."""
    producer = {name: node for node in model.graph.node for name in node.output}
    return [node.name for node in model.graph.node if len(_dequantised_inputs(node, producer)) > 1]


def _dequantised_inputs(node: onnx.NodeProto, producer: dict[str, onnx.NodeProto]) -> list[tuple[int, onnx.NodeProto]]:
    """Position of each input that comes out of a DequantizeLinear, and that node."""
    found = ((position, producer.get(name)) for position, name in enumerate(node.input))
    return [(position, made_by) for position, made_by in found if made_by and made_by.op_type == "DequantizeLinear"]


def _bring_back_weights(graph: onnx.GraphProto, source: onnx.ModelProto, names: Iterable[str]) -> None:
    missing = set(names) - {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(tensor for tensor in source.graph.initializer if tensor.name in missing)


def _unfold(
    graph: onnx.GraphProto, source: onnx.ModelProto, activation: onnx.NodeProto, producer: dict[str, onnx.NodeProto]
) -> None:
    """Brings back a ReLU that the quantiser had made the lower end of a range, writing under the ReLU's name."""
    name, before = activation.output[0], activation.input[0]
    writer = producer[name]
    position = list(graph.node).index(writer) + 1
    writer.output[list(writer.output).index(name)] = before
    graph.node.insert(position, activation)
    _bring_back_weights(graph, source, activation.input)
    producer.update({before: writer, name: graph.node[position]})


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Removes quantisation that nobody reads any more, and its weights."""
    outputs = {value.name for value in graph.output}
    while True:
        read = {name for node in graph.node for name in node.input} | outputs
        unread = [
            node
            for node in graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not read.intersection(node.output)
        ]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    written = {name for node in graph.node for name in node.output}
    values = [value for value in graph.value_info if value.name in written]
    del graph.value_info[:]
    graph.value_info.extend(values)
