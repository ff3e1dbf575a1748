"""Constants of graphs before quantisation: one for each reader, and weights that are INT8 already. Free of torch."""

from __future__ import annotations

from copy import deepcopy
from itertools import count
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto
from onnxruntime.quantization.quant_utils import DEQUANT_OUTPUT_SUFFIX

from exporters.to_onnx.file import all_nodes

if TYPE_CHECKING:
    from collections.abc import Collection


def with_separate_constants(source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph in which no two inputs read the same fp32 constant.

    Equal tensors are stored once, and a layer may be used twice. Quantised, a shared weight has one DequantizeLinear,
    which ONNX Runtime cannot load with ``session.x64quantprecision``; a shared bias has the scale of one reader only,
    and cannot go back to fp32 for one of them.
    """
    model = deepcopy(source)
    constants = {tensor.name: tensor for tensor in source.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    taken = {name for node in all_nodes(source.graph) for name in (*node.input, *node.output)}
    read: set[str] = set()
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name in read and name in constants:
                own = next(f"{name}_{n}" for n in count(2) if f"{name}_{n}" not in taken)
                taken.add(own)
                copy = model.graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[position] = own
            read.add(name)
    return model


def with_int8_weights(int8: onnx.ModelProto, source: onnx.ModelProto, excluded: Collection[str]) -> onnx.ModelProto:
    """A copy of an fp32 graph with the INT8 weights of another, except in excluded nodes."""
    model = deepcopy(source)
    constants = {tensor.name: tensor for tensor in int8.graph.initializer}
    dequantised = {
        node.output[0]: node
        for node in int8.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
        if constants[node.input[0]].data_type == TensorProto.INT8
    }
    weights = {tensor.name for tensor in source.graph.initializer}
    added = []
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            dequantise = dequantised.get(f"{name}{DEQUANT_OUTPUT_SUFFIX}") if name in weights else None
            if dequantise is not None and node.name not in excluded:
                node.input[position] = dequantise.output[0]
                added.append(dequantise)
    nodes = [*added, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants[name] for node in added for name in node.input)
    return model
