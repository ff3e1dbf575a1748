"""The ``openvino`` package: its import, its shared core, and a check for INT8 kernels that saturate.

x86 CPUs without VNNI multiply 8-bit values by an instruction that adds pairs of products in 16 bits. Two products of
8-bit values need 17, so large sums are cut off: a 1x1 convolution of 64 channels of 255 with weights of 127 gives
1,048,544 instead of 2,072,640 there, and of signed activations as little as 8,128 instead of 1,032,256.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.errors import RequirementMissing

if TYPE_CHECKING:
    from types import ModuleType

INSTALL = "pip install openvino"
CAUSE = "OpenVINO's INT8 kernels saturate on this CPU, which lacks VNNI"
#: Keeps the quantised values and computes on them in fp32, so without INT8's speed.
EXACT_SETTINGS = {"LP_TRANSFORMS_MODE": "NO"}
REMARK = (
    f"{CAUSE}: judged with LP_TRANSFORMS_MODE=NO, which computes the INT8 graph in fp32; with OpenVINO's defaults its "
    "answers are wrong on such CPUs, so set this property there, or deploy openvino:fp16"
)


def import_openvino() -> ModuleType:
    """The package.

    Raises:
        RequirementMissing: it is not installed.
    """
    try:
        return import_module("openvino")
    except (ImportError, OSError) as exc:
        raise RequirementMissing(f"openvino is not installed: {exc}", INSTALL) from exc


@cache
def shared_core() -> Any:
    """The one ``openvino.Core`` of this process.

    Each CPU plugin (2026.4) sets the signal stack of its thread and resets it when it is destroyed. If several are
    destroyed in another order than they were created, the thread is left with a freed stack, and the next signal, such
    as Ctrl-C, is a segmentation fault.
    """
    return import_module("openvino").Core()


def exact_settings(model: Any, device_name: str = "CPU") -> dict[str, str]:
    """Properties with which an ``openvino.Model`` does not saturate on a device; none where it would not."""
    quantised = any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
    return dict(EXACT_SETTINGS) if quantised and device_name == "CPU" and saturates() else {}


@cache
def saturates() -> bool:
    """True if a small INT8 convolution on the CPU plugin gives less than the right sum.

    The CPU's features do not tell: OpenVINO reports INT8 as a capability of CPUs that saturate, too.
    """
    return bool(_sum_of_products({}) < 0.99 * _RIGHT_SUM)


_CHANNELS, _ACTIVATION, _WEIGHT = 64, 255, 127
_RIGHT_SUM = _CHANNELS * _ACTIVATION * _WEIGHT


def _sum_of_products(settings: dict[str, str]) -> float:
    """Output of a 1x1 convolution of the largest unsigned activations and the largest signed weights."""
    operators = import_module("openvino.opset13")
    images = operators.parameter([1, _CHANNELS, 8, 8], np.float32)
    low, high = np.float32(0), np.float32(_ACTIVATION)
    activations = operators.fake_quantize(images, low, high, low, high, 256)
    stored = operators.constant(np.full((_CHANNELS, _CHANNELS, 1, 1), _WEIGHT, np.int8))
    scale = operators.constant(np.ones((_CHANNELS, 1, 1, 1), np.float32))
    weights = operators.multiply(operators.convert(stored, np.float32), scale)
    sums = operators.convolution(activations, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    model = import_module("openvino").Model([sums], [images])
    compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **settings})
    return float(compiled(np.full((1, _CHANNELS, 8, 8), high, np.float32))[0].min())
