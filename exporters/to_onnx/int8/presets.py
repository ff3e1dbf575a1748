"""INT8 presets, and the check that a quantised graph keeps what its preset promises. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import QuantType

from dfadc.errors import ExportFailed
from exporters.to_onnx.file import OPSET, opset_of

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Preset:
    """Dtype of the activations, ONNX Runtime's extra options, and symmetry: zero points are 0 and biases fp32."""

    activations: QuantType
    options: dict[str, Any]
    symmetric: bool


PRESETS = {
    # Parses in TensorRT and runs on ONNX Runtime: every zero point is 0, biases stay in fp32.
    "portable": Preset(
        QuantType.QInt8, {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}, symmetric=True
    ),
    # Faster on ONNX Runtime's CPU kernels, which prefer unsigned activations; TensorRT does not parse it.
    "ort-cpu": Preset(QuantType.QUInt8, {"ActivationSymmetric": False, "WeightSymmetric": True}, symmetric=False),
}


def check_preset(model: onnx.ModelProto, preset: str) -> None:
    """Checks that a quantised graph keeps what its preset promises.

    Raises:
        ExportFailed: nothing is quantised, the opset is not 20, or (portable) a zero point is not 0 or an int32 tensor,
            a quantised bias, is dequantised, which TensorRT does not parse.
    """
    if opset_of(model) != OPSET:
        raise ExportFailed(f"quantisation left opset {opset_of(model)}, not {OPSET}")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    linear = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if not linear:
        raise ExportFailed("nothing was quantised", "does the network have convolutions or matrix products in fp32?")
    if not PRESETS[preset].symmetric:
        return
    for node in linear:
        tensors = [constants[name] for name in node.input if name in constants]
        if any(tensor.data_type == TensorProto.INT32 for tensor in tensors):
            raise ExportFailed(f"{node.name} dequantises int32, which TensorRT does not parse")
        zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero_point is not None and np.any(numpy_helper.to_array(zero_point) != 0):
            raise ExportFailed(f"{node.name} has a zero point other than 0, which TensorRT does not parse")
