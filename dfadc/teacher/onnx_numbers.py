"""Number formats of ONNX graphs: half precision is widened to float32, and quantisation becomes float32 arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray
    from torch import fx

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
#: Integers of a quantised tensor by its zero point's type.
_RANGES: dict[int, tuple[int, int]] = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
}


def widen_(model: onnx.ModelProto) -> list[str]:
    """Turns 16-bit floating-point weights, casts and values into float32, in place; the notes say so."""
    graph = model.graph
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    tensors = [*graph.initializer, *(each.t for each in attributes if each.HasField("t"))]
    half = [tensor for tensor in tensors if tensor.data_type in _HALF]
    every_value = [value.type.tensor_type for value in (*graph.input, *graph.output)]
    values = [value for value in every_value if value.elem_type in _HALF]
    kinds = [*(value.elem_type for value in values), *(tensor.data_type for tensor in half)]
    if not kinds:
        return []
    for tensor in half:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for attribute in attributes:
        if attribute.name in ("to", "dtype") and attribute.i in _HALF:
            attribute.i = TensorProto.FLOAT
    for value in values:
        value.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    return [f"its {TensorProto.DataType.Name(kinds[0])} values are computed in float32"]


def compute_quantisation_(model: onnx.ModelProto, path: Path) -> bool:
    """Turns quantised weights into float32, and pairs of QuantizeLinear and DequantizeLinear into arithmetic, in place.

    Returns:
        True where there were any.

    Raises:
        DfadcError: quantisation stands in another form, through which no gradient flows.
    """
    graph = model.graph
    if not any(_is_quantised(node) for node in graph.node):
        return False
    constants = constants_of(model)
    made: list[onnx.NodeProto] = []
    quantised: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            quantised[node.output[0]] = node
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            weights = _dequantised(node, constants)
            graph.initializer.append(numpy_helper.from_array(weights, node.output[0]))
        elif node.op_type == "DequantizeLinear" and node.input[0] in quantised:
            made += _rounded(graph, quantised[node.input[0]], node, constants, path)
        elif _is_quantised(node):
            raise _no_gradient(node.op_type, path)
        else:
            made.append(node)
    used = {name for node in made for name in node.input} | {value.name for value in graph.output}
    if alone := used & quantised.keys():
        raise _no_gradient(f"QuantizeLinear {sorted(alone)[0]} without DequantizeLinear", path)
    set_nodes_(graph, made)
    return True


def set_nodes_(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Gives a graph other nodes, its own among them, in place."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def pass_gradients_(module: fx.GraphModule) -> None:
    """Lets gradients pass through rounding as if it were not there (straight-through), in place."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.meta.get("onnx_op_type") == "Round":
            node.target = _round_straight_through
    module.recompile()


def constants_of(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Tensors that the graph holds, by name: initializers and Constant nodes."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return constants | {
        node.output[0]: attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }


def _round_straight_through(values: Tensor) -> Tensor:
    return values + (torch.round(values) - values).detach()


def _is_quantised(node: onnx.NodeProto) -> bool:
    return any(word in node.op_type for word in ("Quantize", "QLinear", "Integer", "QGemm"))


def _no_gradient(operator: str, path: Path) -> DfadcError:
    return DfadcError(
        f"{path} is quantised, and no gradient flows through its {operator}; adversarial distillation needs one",
        "give the float32 file that it was quantised from",
    )


def _dequantised(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> NDArray[np.float32]:
    """The floating-point weights of a DequantizeLinear node."""
    values, scale, *zero = (numpy_helper.to_array(constants[name]).astype(np.float32) for name in node.input if name)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    form = [1] * values.ndim
    if scale.size > 1:
        form[axis] = -1
    shifted = values - zero[0].reshape(form) if zero else values
    return np.asarray(shifted * scale.reshape(form), np.float32)


def _rounded(
    graph: onnx.GraphProto,
    first: onnx.NodeProto,
    last: onnx.NodeProto,
    constants: dict[str, onnx.TensorProto],
    path: Path,
) -> list[onnx.NodeProto]:
    """Nodes that compute a QuantizeLinear and its DequantizeLinear in float32."""
    if any(name not in constants for name in first.input[1:] if name):
        raise _no_gradient("QuantizeLinear with a computed scale", path)
    scale = numpy_helper.to_array(constants[first.input[1]]).astype(np.float32)
    zero = constants[first.input[2]] if len(first.input) > 2 and first.input[2] else None
    kind = TensorProto.UINT8 if zero is None else zero.data_type
    if scale.size > 1 or kind not in _RANGES:
        raise _no_gradient(f"QuantizeLinear per channel or of type {TensorProto.DataType.Name(kind)}", path)
    offset = 0.0 if zero is None else float(numpy_helper.to_array(zero).ravel()[0])
    name = last.output[0]
    numbers = {"step": float(scale.ravel()[0]), "offset": offset, "low": _RANGES[kind][0], "high": _RANGES[kind][1]}
    for key, number in numbers.items():
        graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), f"{name}_{key}"))
    chain = [("Div", "step"), ("Round", ""), ("Add", "offset"), ("Max", "low"), ("Min", "high"), ("Sub", "offset")]
    nodes, source = [], first.input[0]
    for number, (operator, key) in enumerate(chain):
        inputs = [source, *([f"{name}_{key}"] if key else [])]
        nodes.append(helper.make_node(operator, inputs, [source := f"{name}_{number}"]))
    return [*nodes, helper.make_node("Mul", [source, f"{name}_step"], [name])]
