"""Nodes that are in fp32 in every INT8 graph. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

#: Operators that pass values on.
_CARRIERS = frozenset(
    {"Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)


def never_quantised(source: onnx.ModelProto) -> set[str]:
    """Names of the nodes of an fp32 graph that INT8 would harm and that gain nothing from it."""
    # Batch norms that could not be folded, as DenseNet's before its convolutions; no runtime computes them in INT8.
    # Their weights would be INT8 per tensor, and what they read rounded once more: a DenseNet-121 has 2 dB less, and
    # takes a fifth longer in OpenVINO.
    batch_norms = {node.name for node in source.graph.node if node.op_type == "BatchNormalization"}
    return batch_norms | _layer_norms_and_their_sums(source) | _softmaxes_of_one(source)


def _layer_norms_and_their_sums(source: onnx.ModelProto) -> set[str]:
    """Layer norms, and the additions whose sums they read: the residual stream of a transformer.

    Every block adds to one stream, so that its rounding adds up, and a layer norm's weights would be INT8 per tensor.
    A small vision transformer (``small_vit`` of the examples, 600 steps on digits of 32 px) comes to 28.5 instead of
    20.9 dB in ``portable`` and 32.2 instead of 22.7 dB in ``ort-cpu``, and takes no longer on ONNX Runtime: matrix
    products are its work, and stay in INT8.
    """
    producers = {name: node for node in source.graph.node for name in node.output}
    norms = [node for node in source.graph.node if node.op_type == "LayerNormalization"]
    found = {node.name for node in norms}
    pending, seen = [node.input[0] for node in norms], set()
    while pending:
        node = producers.get(name := pending.pop())
        if node is None or name in seen or node.op_type not in _CARRIERS | {"Add"}:
            continue
        seen.add(name)
        pending += node.input
        if node.op_type == "Add":
            found.add(node.name)
    return found


def _softmaxes_of_one(source: onnx.ModelProto) -> set[str]:
    """Softmaxes over a single element, as attention has in a stage of one token: ONNX Runtime to 1.23 makes 0 of its 1.

    Its kernel for uint8 overflows there.
    """
    shapes = {value.name: value.type.tensor_type.shape.dim for value in source.graph.value_info}
    found = set()
    for node in source.graph.node:
        if node.op_type == "Softmax" and node.output[0] in shapes:
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), -1)
            if shapes[node.output[0]][axis].dim_value == 1:
                found.add(node.name)
    return found
