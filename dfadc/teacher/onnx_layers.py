"""Layers of converted ONNX graphs: nodes with constant weights, turned back into what can be found and watched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from dfadc.teacher.exported_norms import ExportedBatchNorm


def restore_layers_(module: fx.GraphModule) -> int:
    """Replaces batch norms, two-dimensional convolutions and products with a bias by calls of layers, in place.

    A student that is the teacher made smaller starts from such layers, and the generator follows their statistics. What
    is computed otherwise (padded on one side, by weights that are computed themselves) stays a node.

    Args:
        module: as onnx2fx gives it.

    Returns:
        The number of batch norms.
    """
    builders = {"BatchNormalization": _batch_norm, "Conv": _convolution, "Gemm": _linear}
    num_norms = number = 0
    for node in list(module.graph.nodes):
        build = builders.get(node.meta.get("onnx_op_type", ""))
        if node.op != "call_function" or build is None or (layer := build(module, node.args)) is None:
            continue
        name = f"layer_{number}"
        number += 1
        num_norms += isinstance(layer, ExportedBatchNorm)
        module.add_submodule(name, layer.eval().requires_grad_(requires_grad=False))
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.call_module(name, (node.args[0],)))
        module.graph.erase_node(node)
    return num_norms


def _constants(module: fx.GraphModule, sources: tuple[Any, ...]) -> list[Tensor] | None:
    """The tensors that nodes stand for; None where one of them is computed."""
    if not all(isinstance(source, fx.Node) and source.op == "get_attr" for source in sources):
        return None
    tensors = [getattr(module, source.target) for source in sources]
    return tensors if all(tensor.is_floating_point() for tensor in tensors) else None


def _batch_norm(module: fx.GraphModule, args: tuple[Any, ...]) -> nn.Module | None:
    _, *sources, epsilon, trains = args
    tensors = _constants(module, tuple(sources))
    if trains or tensors is None:
        return None
    weight, bias = (nn.Parameter(tensor, requires_grad=False) for tensor in tensors[:2])
    named = {"weight": weight, "bias": bias, "running_mean": tensors[2], "running_var": tensors[3]}
    return ExportedBatchNorm(named, epsilon)


def _convolution(module: fx.GraphModule, args: tuple[Any, ...]) -> nn.Module | None:
    _, *sources, strides, dilations, groups, pads, auto_pad, _ = args
    tensors = _constants(module, tuple(source for source in sources if source is not None))
    if tensors is None or tensors[0].ndim != 4 or auto_pad not in ("NOTSET", "VALID"):
        return None
    top, left, bottom, right = pads or (0, 0, 0, 0)
    if (top, left) != (bottom, right):
        return None
    outputs, inputs, height, width = tensors[0].shape
    geometry = {"stride": tuple(strides), "padding": (top, left), "dilation": tuple(dilations), "groups": groups}
    with torch.device("meta"):
        layer = nn.Conv2d(inputs * groups, outputs, (height, width), **geometry, bias=len(tensors) > 1)
    return _with_weights(layer, tensors)


def _linear(module: fx.GraphModule, args: tuple[Any, ...]) -> nn.Module | None:
    _, *sources, alpha, beta, transposes_input, transposes_weight = args
    tensors = _constants(module, tuple(source for source in sources if source is not None))
    if tensors is None or transposes_input or (alpha, beta) != (1, 1):
        return None
    weight, *bias = tensors
    weight = weight if transposes_weight else weight.T.contiguous()
    if bias and bias[0].shape != (len(weight),):
        return None
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], len(weight), bias=bool(bias))
    return _with_weights(layer, [weight, *bias])


def _with_weights(layer: nn.Module, tensors: list[Tensor]) -> nn.Module:
    for name, tensor in zip(("weight", "bias"), tensors, strict=False):
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return layer
