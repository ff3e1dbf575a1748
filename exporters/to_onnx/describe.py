"""Description of an ONNX file: inputs, outputs, dtypes, operators and metadata. Free of torch."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import onnx

from exporters.to_onnx.file import graph_inputs, load_onnx, operator_counts, opset_of, read_metadata

if TYPE_CHECKING:
    from pathlib import Path


def describe_onnx(path: Path) -> dict[str, Any]:
    """Inputs, outputs, opset, dtypes, operators and metadata of an ONNX file, as plain JSON values.

    ``weight_dtypes`` counts the elements stored in each dtype, ``tensor_dtypes`` the tensors computed in each.

    Raises:
        DfadcError: the file is missing or not ONNX.
    """
    model = load_onnx(path)
    return {
        "inputs": [_describe_value(value) for value in graph_inputs(model)],
        "outputs": [_describe_value(value) for value in model.graph.output],
        "opset": opset_of(model),
        "ir_version": model.ir_version,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "size_bytes": path.stat().st_size,
        "num_weights": sum(_weight_dtypes(model).values()),
        "weight_dtypes": _weight_dtypes(model),
        "tensor_dtypes": _tensor_dtypes(model),
        "operators": operator_counts(model),
        "metadata": read_metadata(model),
    }


def _weight_dtypes(model: onnx.ModelProto) -> dict[str, int]:
    """Elements of the initializers by dtype."""
    counts: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        counts[_dtype_name(tensor.data_type)] += math.prod(tensor.dims)
    return dict(sorted(counts.items()))


def _tensor_dtypes(model: onnx.ModelProto) -> dict[str, int]:
    """Number of node outputs by dtype, after type inference; "unknown" where it finds none."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    outputs = (name for node in inferred.node for name in node.output if name)
    return dict(sorted(Counter(_dtype_name(types.get(name, 0)) for name in outputs).items()))


def _dtype_name(elem_type: int) -> str:
    """ONNX dtype in lower case: "float" is fp32, "float16" fp16; "unknown" for 0."""
    return "unknown" if elem_type == 0 else onnx.TensorProto.DataType.Name(elem_type).lower()


def _describe_value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [side.dim_param or side.dim_value if side.WhichOneof("value") else "?" for side in tensor.shape.dim]
    return {"name": value.name, "dtype": _dtype_name(tensor.elem_type), "shape": shape}
