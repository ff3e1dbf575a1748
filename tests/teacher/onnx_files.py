"""ONNX files for the tests of ONNX teachers: exported by torch, or written by hand."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torchvision.models import get_model

if TYPE_CHECKING:
    from pathlib import Path


SIZE = (3, 32, 32)


def export(module: nn.Module, path: Path, *, opset: int = 20, dynamic: bool = True, **settings: Any) -> Path:
    """Exports a network by torch's present exporter."""
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    settings = {"external_data": False, "verbose": False, "dynamic_shapes": shapes, **settings}
    return _export(module, path, 2 if dynamic else 1, dynamo=True, opset_version=opset, **settings)


def export_by_tracing(module: nn.Module, path: Path, *, opset: int, **settings: Any) -> Path:
    """Exports a network by torch's older exporter."""
    axes = {"x": {0: "n"}, "y": {0: "n"}}
    settings = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes, **settings}
    return _export(module, path, 2, dynamo=False, opset_version=opset, **settings)


def _export(module: nn.Module, path: Path, count: int, **settings: Any) -> Path:
    images = torch.rand(count, *settings.pop("size", SIZE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (images,), path, **settings)
    return path


def small_network(last: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)]
    return nn.Sequential(*layers, *([last] if last is not None else []))


def torchvision_network(name: str) -> nn.Module:
    """A random network with statistics unlike those of a fresh one."""
    torch.manual_seed(0)
    network: nn.Module = get_model(name, num_classes=10).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return network


def graph_of(nodes: list[onnx.NodeProto], weights: dict[str, Any], **settings: Any) -> onnx.ModelProto:
    """A graph by hand: images -> logits."""
    inputs = settings.pop("inputs", [("images", TensorProto.FLOAT, ["N", 3, 32, 32])])
    outputs = settings.pop("outputs", [("logits", TensorProto.FLOAT, None)])
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(
        nodes,
        "by_hand",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", settings.pop("opset", 17))], ir_version=8)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "teacher.onnx")
    return folder / "teacher.onnx"


def classifier(weights: dict[str, Any], *, images: str = "images", channels: int = 3) -> list[onnx.NodeProto]:
    """Convolution, mean over the image and logits; ``weights`` is filled."""
    generator = np.random.default_rng(0)
    weights["kernel"] = generator.normal(size=(4, channels, 3, 3)).astype(np.float32)
    return [
        helper.make_node("Conv", [images, "kernel"], ["maps"]),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]


def of_runtime(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
