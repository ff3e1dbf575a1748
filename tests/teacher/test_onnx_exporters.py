"""ONNX teachers as other exporters write them: graphs by hand, node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import (
    SIZE,
    graph_of,
    of_runtime,
    saved,
)

from dfadc.teacher.load import load_teacher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytest.importorskip("onnx2fx")


def _graph_of_tf2onnx(generator: np.random.Generator) -> onnx.ModelProto:
    """As tf2onnx 1.16 writes a Keras classifier: NHWC input with a colon, squeezed mean, MatMul, Add, Softmax."""
    weights = {
        "StatefulPartitionedCall/m/conv/Conv2D/ReadVariableOp:0": generator.normal(size=(4, 3, 3, 3)).astype(
            np.float32
        ),
        "StatefulPartitionedCall/m/conv/BiasAdd": generator.normal(size=4).astype(np.float32),
        "const_axes__12": np.array([2, 3], np.int64),
        "StatefulPartitionedCall/m/dense/MatMul/ReadVariableOp:0": generator.normal(size=(4, 5)).astype(np.float32),
        "StatefulPartitionedCall/m/dense/BiasAdd/ReadVariableOp:0": generator.normal(size=5).astype(np.float32),
    }
    names = list(weights)
    nodes = [
        helper.make_node("Transpose", ["input_1:0"], ["Conv2D__6:0"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "Conv",
            ["Conv2D__6:0", *names[:2]],
            ["BiasAdd:0"],
            auto_pad="SAME_UPPER",
            strides=[2, 2],
            kernel_shape=[3, 3],
        ),
        helper.make_node("Relu", ["BiasAdd:0"], ["Relu:0"]),
        helper.make_node("ReduceMean", ["Relu:0"], ["Mean:0"], axes=[2, 3], keepdims=1),
        helper.make_node("Squeeze", ["Mean:0", names[2]], ["Mean_Squeeze__13:0"]),
        helper.make_node("MatMul", ["Mean_Squeeze__13:0", names[3]], ["MatMul:0"]),
        helper.make_node("Add", ["MatMul:0", names[4]], ["Add:0"]),
        helper.make_node("Softmax", ["Add:0"], ["dense"]),
    ]
    inputs = [("input_1:0", TensorProto.FLOAT, ["unk__16", 32, 32, 3])]
    outputs = [("dense", TensorProto.FLOAT, ["unk__17", 5])]
    model = graph_of(nodes, weights, inputs=inputs, outputs=outputs, opset=15)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    model.producer_name = "tf2onnx"
    return model


def _graph_of_paddle(generator: np.random.Generator) -> onnx.ModelProto:
    """As paddle2onnx 1.0 writes one: batch -1, weights in Constant nodes, batch norm, pooling to 1x1, Softmax."""
    weights: dict[str, Any] = {
        "conv2d_0.w_0": generator.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "batch_norm_0.w_0": generator.random(4, np.float32),
        "batch_norm_0.b_0": generator.random(4, np.float32),
        "batch_norm_0.w_1": generator.random(4, np.float32),
        "batch_norm_0.w_2": 1 + generator.random(4, np.float32),
        "shape": np.array([0, 4], np.int64),
        "linear_0.w_0": generator.normal(size=(4, 5)).astype(np.float32),
        "linear_0.b_0": generator.normal(size=5).astype(np.float32),
        "six": np.array(6, np.float32),
        "zero": np.array(0, np.float32),
    }
    constants = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in weights.items()
    ]
    norms = ["batch_norm_0.w_0", "batch_norm_0.b_0", "batch_norm_0.w_1", "batch_norm_0.w_2"]
    nodes = [
        *constants,
        helper.make_node("Conv", ["x", "conv2d_0.w_0"], ["conv2d_0.tmp_0"], pads=[1, 1, 1, 1], strides=[2, 2], group=1),
        helper.make_node("BatchNormalization", ["conv2d_0.tmp_0", *norms], ["batch_norm_0.tmp_3"], epsilon=1e-5),
        helper.make_node("Clip", ["batch_norm_0.tmp_3", "zero", "six"], ["relu6_0.tmp_0"]),
        helper.make_node("GlobalAveragePool", ["relu6_0.tmp_0"], ["pool2d_0.tmp_0"]),
        helper.make_node("Reshape", ["pool2d_0.tmp_0", "shape"], ["flatten_0.tmp_0"]),
        helper.make_node("MatMul", ["flatten_0.tmp_0", "linear_0.w_0"], ["linear_0.tmp_0"]),
        helper.make_node("Add", ["linear_0.tmp_0", "linear_0.b_0"], ["linear_0.tmp_1"]),
        helper.make_node("Softmax", ["linear_0.tmp_1"], ["softmax_0.tmp_0"], axis=1),
    ]
    inputs = [("x", TensorProto.FLOAT, [-1, 3, 32, 32])]
    model = graph_of(nodes, {}, inputs=inputs, outputs=[("softmax_0.tmp_0", TensorProto.FLOAT, [-1, 5])], opset=11)
    model.producer_name = "PaddlePaddle"
    return model


@pytest.mark.parametrize("make", [_graph_of_tf2onnx, _graph_of_paddle])
def test_graphs_of_other_exporters(make: Callable[[np.random.Generator], onnx.ModelProto], tmp_path: Path) -> None:
    path = saved(make(np.random.default_rng(0)), tmp_path)
    teacher = load_teacher(path)
    images = torch.rand(3, *SIZE)
    given = images.permute(0, 2, 3, 1).contiguous() if make is _graph_of_tf2onnx else images
    torch.testing.assert_close(teacher.logits(images).softmax(1), of_runtime(path, given))
    assert len(teacher.batch_norms) == (make is _graph_of_paddle)
