"""Reader of ONNX files: a torch module by onnx2fx, checked against ONNX Runtime before it teaches.

onnx2fx 0.0.1 was chosen over onnx2pytorch 0.6.0 (torch 2.14.1, ONNX Runtime 1.32, resnet18, mobilenet_v3_small and
shufflenet_v2_x0_5 at 32 px, opset 13, 17 and 20, both exporters of torch, batches of 1, 2 and 7): its outputs are
within 5.8e-7 of their range of ONNX Runtime's and its input gradients within 8.4e-7 of the original network's in all
18 files. onnx2pytorch is as exact in 15 of them, but fails on mobilenet_v3_small of the TorchScript exporter ("Conv2d
.forward() takes 2 positional arguments but 3 were given").
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError
from dfadc.networks.construct import import_extra
from dfadc.networks.logits import Wrapper, unwrap_logits
from dfadc.networks.norm_layers import find_norm_layers
from dfadc.teacher.file_kind import FileKind
from dfadc.teacher.onnx_check import EXPORT_AGAIN, FOREIGN_ERRORS, check_against_runtime, named_outputs
from dfadc.teacher.onnx_graph import read_graph
from dfadc.teacher.onnx_layers import restore_layers_
from dfadc.teacher.onnx_numbers import pass_gradients_
from dfadc.teacher.outputs import choose_output
from dfadc.teacher.teacher_file import TeacherFile, first_line
from dfadc.teacher.training_arguments import TrainingArguments

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.teacher.onnx_graph import OnnxGraph

#: Operators whose outputs are sizes where all their inputs are.
_ON_SIZES = (
    *("Shape", "Size", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Cast", "Identity"),
    *("Add", "Sub", "Mul", "Div", "Min", "Max", "Equal", "Where", "ReduceProd"),
)
#: Operators whose inputs after the first are sizes, axes or positions.
_TAKING_SIZES = (
    *("Reshape", "Expand", "Slice", "Tile", "Unsqueeze", "Squeeze", "Split", "Pad", "Resize", "Upsample", "TopK"),
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "CumSum"),
)


def read_onnx(path: Path, *, output: str | None = None) -> TeacherFile:
    """Reads an ONNX file, which holds no code and needs no trust.

    Args:
        path: the file.
        output: output to take where the graph gives several (``--output``).

    Raises:
        RequirementMissing: onnx2fx is not installed.
        DfadcError: the file is damaged, is no network from one image to logits, or cannot be converted exactly.
    """
    graph = read_graph(path)
    chosen, choice = _choose(graph, output)
    if chosen is not None:
        graph = read_graph(path, output=chosen)
    try:
        module, worst = _convert_and_check(graph)
    except DfadcError:
        if graph.batch != 1:
            raise
        graph = read_graph(path, output=chosen, frees_batch=False)
        module, worst = _convert_and_check(graph)
    within = f"converted by onnx2fx; outputs within {worst:.0e} of their range of ONNX Runtime's"
    notes = [within, *choice, *graph.notes]
    if isinstance(module, MappedOverImages):
        notes.append("its batch of 1 is part of the graph: it is mapped over the images")
    if not find_norm_layers(module):
        notes.append("it holds no batch norm (exporters fold them into convolutions): the teacher has no statistics")
    values = {"mean": (0.0,) * graph.channels, "std": (1.0,) * graph.channels}
    return TeacherFile(
        path,
        FileKind.ONNX,
        module=module.eval(),
        input_size=None if graph.side is None else (graph.channels, *graph.side),
        channels=graph.channels,
        notes=tuple(notes),
        cut_head=graph.head,
        has_chosen_output=chosen is not None,
        arguments=TrainingArguments("the graph's uint8 input", values) if graph.is_uint8 else None,
    )


def _choose(graph: OnnxGraph, wanted: str | None) -> tuple[str | None, list[str]]:
    """The output to keep and a note; None where there is one."""
    if len(graph.original.graph.output) == 1:
        return None, []
    outputs, images = named_outputs(graph)
    chosen = choose_output(outputs, images, wanted, ContractFields())
    if chosen is None:
        chosen = next(name for name, tensor in outputs.items() if tensor is unwrap_logits(outputs))
    return chosen, [f"of several outputs {chosen} is taken (--output {chosen})"]


class MappedOverImages(Wrapper):
    """Network whose graph takes one image; all images of a batch go through it at once, by ``torch.vmap``.

    Args:
        wrapped: images (1, C, H, W) -> logits (1, K).
    """

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        logits: Tensor = torch.vmap(self.wrapped)(images.unsqueeze(1))
        return logits.flatten(0, 1)


def _convert_and_check(graph: OnnxGraph) -> tuple[nn.Module, float]:
    """The graph as a module, and the largest difference to ONNX Runtime as a share of the outputs' range."""
    onnx2fx = import_extra(
        "onnx2fx", "onnx-teacher", f"{graph.path} is an ONNX file, and onnx2fx, which converts it, is not installed"
    )
    try:
        converted: fx.GraphModule = onnx2fx.convert(graph.model)
    except (onnx2fx.Onnx2FxError, *FOREIGN_ERRORS) as exc:
        raise DfadcError(f"{graph.path} cannot be converted: {first_line(exc)}", EXPORT_AGAIN) from exc
    num_norms = restore_layers_(converted)
    _recompile_(converted)
    _keep_sizes_on_cpu_(converted)
    _register_parameters_(converted)
    pass_gradients_(converted)
    is_fixed = graph.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    # A hook inside the map would see single images, whose statistics are none of a batch.
    module: nn.Module = MappedOverImages(converted) if is_fixed and not num_norms else converted
    # torch.fx prints generated code where a forward fails; the error says what is needed.
    with contextlib.redirect_stderr(io.StringIO()):
        return module, check_against_runtime(module, graph)


def _recompile_(module: fx.GraphModule) -> None:
    """Puts a changed graph into force and drops tensors that nothing uses any more."""
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in list(module.named_buffers(recurse=False)):
        if name not in used:
            delattr(module, name)
    module.graph.lint()
    module.recompile()


def _register_parameters_(module: fx.GraphModule) -> None:
    """Makes parameters of floating-point tensors with axes, in place; onnx2fx registers all tensors as buffers."""
    for name, tensor in list(module.named_buffers(recurse=False)):
        if tensor.is_floating_point() and tensor.ndim:
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _keep_sizes_on_cpu_(module: fx.GraphModule) -> None:
    """Makes literals of constants that are sizes, axes or positions, in place.

    onnx2fx computes with shapes on the CPU; a buffer moves with the network to another device, where it could not be
    combined with them, and would be copied back in every forward.
    """
    sizes: set[fx.Node] = set()
    for node in module.graph.nodes:
        kind = node.meta.get("onnx_op_type")
        inputs = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if kind in ("Shape", "Size") or (kind in _ON_SIZES and inputs and sizes.issuperset(inputs)):
            sizes.add(node)
    for node in list(module.graph.nodes):
        takes_sizes = node in sizes or node.meta.get("onnx_op_type") in _TAKING_SIZES
        for source in node.all_input_nodes[0 if node in sizes else 1 :] if takes_sizes else ():
            if source.op != "get_attr" or (tensor := getattr(module, str(source.target))).ndim > 1:
                continue
            if node.meta.get("onnx_op_type") == "Reshape":
                node.update_arg(1, tensor.tolist())  # onnx2fx takes a list as well, and no tensor is read back
                continue
            with module.graph.inserting_before(node):
                literal = module.graph.call_function(torch.tensor, (tensor.tolist(),), {"dtype": tensor.dtype})
            node.replace_input_with(source, literal)
    _recompile_(module)
