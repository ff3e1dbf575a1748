"""What an ONNX artifact is, read off its bytes. Free of torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import onnx

from exporters.onnx_file import graph_inputs, load_onnx, operator_counts, opset_of, read_metadata

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
        "num_weights": sum(weight_dtypes(model).values()),
        "weight_dtypes": weight_dtypes(model),
        "tensor_dtypes": tensor_dtypes(model),
        "operators": operator_counts(model),
        "metadata": read_metadata(model),
    }


def weight_dtypes(model: onnx.ModelProto) -> dict[str, int]:
    """Elements of the initializers by dtype."""
    counts: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        size = 1
        for side in tensor.dims:
            size *= side
        counts[dtype_name(tensor.data_type)] += size
    return dict(sorted(counts.items()))


def tensor_dtypes(model: onnx.ModelProto) -> dict[str, int]:
    """How many node outputs have each dtype, after type inference; "unknown" where it finds none."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    outputs = (name for node in inferred.node for name in node.output if name)
    return dict(sorted(Counter(dtype_name(types.get(name, 0)) for name in outputs).items()))


def dtype_name(elem_type: int) -> str:
    """ONNX dtype in lower case: "float" is fp32, "float16" fp16; "unknown" for 0."""
    return "unknown" if elem_type == 0 else onnx.TensorProto.DataType.Name(elem_type).lower()


def _describe_value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [side.dim_param or side.dim_value if side.WhichOneof("value") else "?" for side in tensor.shape.dim]
    return {"name": value.name, "dtype": dtype_name(tensor.elem_type), "shape": shape}
