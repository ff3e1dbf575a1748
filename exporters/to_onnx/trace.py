"""Tracing of a torch module to an ONNX graph that does not depend on the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch.onnx import OnnxExporterError

from dfadc.errors import ExportFailed
from exporters.to_onnx.file import INPUT_NAME, OPSET, quiet

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

#: Elements of a constant that replaces what computes it, at most.
_LARGEST_CONSTANT = 2**20


def trace(network: nn.Module, images: Tensor, output_name: str, *, dynamic_size: bool) -> onnx.ModelProto:
    """Traces ``network`` to ONNX and removes everything that names this machine or its source files.

    The network is in eval mode and on the CPU; images: (N, C, H, W), N above 1. With ``dynamic_size`` height and width
    are dynamic too, not only the batch.

    Raises:
        ExportFailed: torch cannot export the network, or its batch size is fixed.
    """
    dynamic = {0: "batch", 2: "height", 3: "width"} if dynamic_size else {0: "batch"}
    try:
        with quiet():
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=[output_name],
                dynamic_shapes=(dynamic,),
                external_data=False,
                verbose=False,
            )
    except OnnxExporterError as exc:
        raise ExportFailed(
            f"torch cannot export {type(network).__name__} to ONNX: {_root_cause(exc)}",
            "the forward pass must not branch on tensor values or use operators that ONNX lacks",
        ) from exc
    if program is None:
        raise ExportFailed(f"torch exported nothing for {type(network).__name__}")
    model = program.model
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None or isinstance(value.shape[0], int):
            raise ExportFailed(
                f"the batch of {value.name!r} is fixed: {value.shape}",
                "the forward pass contains the batch size as a constant; use images.shape[0] or flatten(1)",
            )
    _name_nodes(model.graph)
    _fold(model)
    ClearMetadataAndDocStringPass()(model)
    model.producer_version = (model.producer_version or "").partition("+")[0]
    return onnx_ir.to_proto(model)


def _fold(model: onnx_ir.Model) -> None:
    """Replaces what does not depend on the images by its value, such as the attention mask of a shifted window.

    torch leaves it in the graph. In INT8 it was quantised as if images went through it, and OpenVINO (2026.4) did not
    compile the sum of such a mask and the attention.
    """
    fold_constants(
        model, input_size_limit=_LARGEST_CONSTANT, output_size_limit=_LARGEST_CONSTANT, should_fold=lambda _: True
    )
    remove_unused_nodes(model)


def _name_nodes(graph: onnx_ir.Graph) -> None:
    """Names each node after its place in the module ("features.0.0/Conv"), so that reports can name layers.

    The weight's name takes precedence: a batch norm that was folded leaves its own scope on the convolution.
    """
    seen: dict[str, int] = {}
    for node in graph:
        weights = (value.name or "" for value in node.inputs if value is not None and value.is_initializer())
        owner = next((name.rpartition(".")[0] for name in weights if name.endswith(".weight")), "")
        if not owner:
            scopes = [
                part.strip(" '\"")
                for part in node.metadata_props.get("pkg.torch.onnx.name_scopes", "").strip("[]").split(",")
            ]
            owner = scopes[-2] if len(scopes) > 1 else ""
        name = f"{owner}/{node.op_type}".lstrip("/")
        seen[name] = seen.get(name, 0) + 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _root_cause(error: BaseException) -> str:
    """The first two lines of the exception that started the chain: often a heading and its first point."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
