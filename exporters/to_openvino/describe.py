"""Description of an OpenVINO IR, from its XML; openvino is not needed."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from dfadc.errors import DfadcError
from exporters.sessions.openvino_session import check_ir
from exporters.to_onnx.file import METADATA_PREFIX

if TYPE_CHECKING:
    from pathlib import Path

#: OpenVINO's names of dtypes -> ONNX's.
_IR_DTYPES = {"f32": "float", "f16": "float16", "i8": "int8", "u8": "uint8", "i32": "int32", "i64": "int64"}


def describe_ir(path: Path) -> dict[str, Any]:
    """Inputs, outputs, dtypes, operators and metadata; ``weight_dtypes`` counts the elements of the .bin file.

    Raises:
        DfadcError: a file is missing or the XML is damaged.
    """
    check_ir(path)
    try:
        net = ET.parse(path).getroot()  # noqa: S314 - a file that the user names; expat limits expansion
        layers = net.findall("./layers/layer")
        facts = {
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
    return facts | {"size_bytes": path.stat().st_size + path.with_suffix(".bin").stat().st_size}


def _describe_port(layer: ET.Element, side: str) -> dict[str, Any]:
    """The one port of a Parameter's output or a Result's input."""
    port = layer.find(f"./{side}/port")
    sides = [int(dim.text or 0) for dim in ([] if port is None else port.findall("dim"))]
    dtype = _onnx_dtype("" if port is None else port.get("precision", ""))
    name = (layer.get("name") or "").partition("/sink_port")[0]
    shape = ["batch" if length == -1 else length for length in sides]
    return {"name": name, "dtype": dtype, "shape": shape}


def _constant_dtypes(layers: list[ET.Element]) -> dict[str, int]:
    """Elements of the constants by dtype."""
    counts: Counter[str] = Counter()
    for layer in layers:
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            size = math.prod(int(side) for side in data.get("shape", "").split(",") if side.strip())
            counts[_onnx_dtype(data.get("element_type", ""))] += size
    return dict(sorted(counts.items()))


def _layer_dtypes(layers: list[ET.Element]) -> dict[str, int]:
    """Number of computing layers by output dtype."""
    computing = (layer for layer in layers if layer.get("type") not in ("Const", "Parameter"))
    ports = (port for layer in computing for port in layer.findall("./output/port"))
    return dict(sorted(Counter(_onnx_dtype(port.get("precision", "")) for port in ports).items()))


def _onnx_dtype(name: str) -> str:
    """ONNX's name of a dtype, so that a census reads the same for both."""
    short = name.lower().replace("fp", "f")
    return _IR_DTYPES.get(short, short)
