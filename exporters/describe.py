"""What an artifact is, read off its bytes; no backend and no torch is needed."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import onnx

from dfadc.errors import DfadcError
from exporters.sessions.openvino_session import check_ir
from exporters.sessions.tensorrt_session import read_sidecar
from exporters.to_onnx.file import (
    INPUT_NAME,
    METADATA_PREFIX,
    graph_inputs,
    load_onnx,
    operator_counts,
    opset_of,
    parse_onnx,
    read_metadata,
)

if TYPE_CHECKING:
    from pathlib import Path


def describe_artifact(path: Path) -> dict[str, Any]:
    """Inputs, outputs, dtypes, operators and metadata of an artifact, as plain JSON values.

    Raises:
        DfadcError: the file is missing, damaged, or neither .onnx, .xml (OpenVINO) nor .engine.
    """
    match path.suffix:
        case ".onnx":
            return {"kind": "ONNX", **describe_onnx(path)}
        case ".xml":
            return {"kind": "OpenVINO IR", **describe_ir(path)}
        case ".engine":
            return {"kind": "TensorRT engine", **describe_engine(path)}
        case _:
            raise DfadcError(f"{path} is not an artifact", "give a .onnx, .xml or .engine file")


def artifact_metadata(path: Path) -> dict[str, str]:
    """An artifact's own ``dfadc.*`` metadata: what it takes and answers, and its precision.

    Raises:
        DfadcError: the file is missing, damaged, or no artifact.
    """
    if path.suffix == ".onnx":  # Its graph is left to the runtime, which may know more operators than onnx.
        return read_metadata(parse_onnx(path))
    metadata: dict[str, str] = describe_artifact(path)["metadata"]
    return metadata


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


def describe_ir(path: Path) -> dict[str, Any]:
    """The same of an OpenVINO IR, from its XML; ``weight_dtypes`` counts the elements of the .bin file.

    Raises:
        DfadcError: a file is missing or the XML is damaged.
    """
    check_ir(path)
    try:
        net = ET.parse(path).getroot()  # noqa: S314 - a file that the user names; expat limits expansion
        layers = net.findall("./layers/layer")
        found = {
            "inputs": [_describe_port(e, "output") for e in layers if e.get("type") == "Parameter"],
            "outputs": [_describe_port(e, "input") for e in layers if e.get("type") == "Result"],
            "ir_version": int(net.get("version", 0)),
            "weight_dtypes": _constant_dtypes(layers),
            "tensor_dtypes": _layer_dtypes(layers),
            "operators": dict(Counter(e.get("type", "") for e in layers if e.get("type") != "Const").most_common()),
            "metadata": {METADATA_PREFIX + e.tag: e.get("value", "") for e in net.findall("./rt_info/dfadc/*")},
        }
    except (ET.ParseError, ValueError, AttributeError) as exc:
        raise DfadcError(f"{path} is a damaged OpenVINO IR: {exc}", "export it again") from exc
    return found | {"size_bytes": path.stat().st_size + path.with_suffix(".bin").stat().st_size}


def describe_engine(path: Path) -> dict[str, Any]:
    """The same of an engine, from its sidecar: engines are native code and say nothing unless they are loaded.

    Raises:
        DfadcError: engine or sidecar is missing or damaged, or they do not belong together.
    """
    facts = read_sidecar(path)
    metadata = {**facts["metadata"], f"{METADATA_PREFIX}precision": facts["precision"]}
    contract = json.loads(metadata.get(f"{METADATA_PREFIX}contract", "{}"))
    batch = f"{facts['batch'][0]} to {facts['batch'][2]}"
    answer = metadata.get(f"{METADATA_PREFIX}output", "logits")
    dense = contract["input_size"][1:] if contract.get("task") == "segmentation" else []
    return {
        "inputs": [{"name": INPUT_NAME, "dtype": "float", "shape": [batch, *contract.get("input_size", ["?"])]}],
        "outputs": [{"name": answer, "dtype": "float", "shape": [batch, contract.get("num_classes", "?"), *dense]}],
        "size_bytes": path.stat().st_size,
        "effective_precision": facts["effective_precision"],
        "tensor_dtypes": facts["layer_dtypes"],
        "gpus": facts["gpus"],
        "versions": facts["versions"],
        "metadata": metadata,
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


#: OpenVINO's names of dtypes -> ONNX's, so that a census reads the same for both.
_IR_DTYPES = {"f32": "float", "f16": "float16", "i8": "int8", "u8": "uint8", "i32": "int32", "i64": "int64"}


def _describe_port(layer: ET.Element, side: str) -> dict[str, Any]:
    """The one port of a Parameter's output or a Result's input."""
    port = layer.find(f"./{side}/port")
    sides = [int(dim.text or 0) for dim in ([] if port is None else port.findall("dim"))]
    precision = "" if port is None else port.get("precision", "").lower().replace("fp", "f")
    name = (layer.get("name") or "").partition("/sink_port")[0]
    shape = ["batch" if length == -1 else length for length in sides]
    return {"name": name, "dtype": _IR_DTYPES.get(precision, precision), "shape": shape}


def _constant_dtypes(layers: list[ET.Element]) -> dict[str, int]:
    """Elements of the constants by dtype."""
    counts: Counter[str] = Counter()
    for layer in layers:
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            size = 1
            for side in filter(str.strip, data.get("shape", "").split(",")):
                size *= int(side)
            counts[_IR_DTYPES.get(data.get("element_type", ""), data.get("element_type", ""))] += size
    return dict(sorted(counts.items()))


def _layer_dtypes(layers: list[ET.Element]) -> dict[str, int]:
    """How many layers that compute put out each dtype."""
    counts: Counter[str] = Counter()
    for layer in layers:
        for port in layer.findall("./output/port"):
            if layer.get("type") not in ("Const", "Parameter"):
                precision = port.get("precision", "").lower().replace("fp", "f")
                counts[_IR_DTYPES.get(precision, precision)] += 1
    return dict(sorted(counts.items()))
