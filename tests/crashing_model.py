"""An ONNX file that ends the process of ONNX Runtime 1.23 to 1.32 with a segmentation fault when it is opened."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from pathlib import Path

_OPEN = "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"


def transpose_before_matmul(dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """images (N, 2, 4, 4) -> (8, N, 4) -> Transpose (N, 8, 4) -> MatMul with a constant -> mean -> logits (N, 3).

    With a ``dtype`` of fp16 its nodes compute in that, between casts.
    """
    half = dtype == TensorProto.FLOAT16
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float16 if half else np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["typed"], name="cast_in", to=dtype),
        helper.make_node("Reshape", ["typed", "shape"], ["rows"], name="reshape"),
        helper.make_node("Transpose", ["rows"], ["tokens"], name="transpose", perm=[1, 0, 2]),
        helper.make_node("MatMul", ["tokens", "weight"], ["scores"], name="matmul"),
        helper.make_node("Cast", ["scores"], ["single"], name="cast_out", to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["single", "axis"], ["logits"], name="mean", keepdims=0),
    ]
    if not half:
        nodes = [node for node in nodes if node.op_type != "Cast"]
        nodes[0].input[0], nodes[-1].input[0] = "images", "scores"
    graph = helper.make_graph(
        nodes,
        "transpose_before_matmul",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 2, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(np.array([8, -1, 4]), "shape"),
            numpy_helper.from_array(np.array([1]), "axis"),
            numpy_helper.from_array(weight, "weight"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def write_crashing_model(path: Path) -> None:
    """Writes it; the test is skipped where the installed ONNX Runtime does not crash."""
    onnx.save(transpose_before_matmul(TensorProto.FLOAT16), path)
    done = subprocess.run([sys.executable, "-c", _OPEN, path], capture_output=True, check=False)  # noqa: S603
    if done.returncode == 0:
        pytest.skip("this ONNX Runtime opens the graph")
