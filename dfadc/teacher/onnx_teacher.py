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

import numpy as np
import onnxruntime
import torch
from torch import Tensor, fx, nn

from dfadc.errors import DfadcError, RequirementMissing
from dfadc.networks.norm_layers import find_norm_layers
from dfadc.teacher.exported_norms import ExportedBatchNorm
from dfadc.teacher.file_kind import FileKind
from dfadc.teacher.onnx_graph import read_graph
from dfadc.teacher.teacher_file import TeacherFile
from dfadc.teacher.training_arguments import TrainingArguments

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dfadc.teacher.onnx_graph import OnnxGraph

#: Largest difference to ONNX Runtime, as a share of the outputs' range; a correct conversion stays below 1e-6.
_TOLERANCE = 1e-4
#: Sides of images that are tried where a graph takes images of any size.
_SIDES = (64, 224, 32)
#: Numbers of images in the check.
_BATCHES = (1, 3)
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
_NO_RUN = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
_EXPORT_AGAIN = "export it again, e.g. with torch.onnx.export(..., opset_version=17), or give the PyTorch weights"


def read_onnx(path: Path) -> TeacherFile:
    """Reads an ONNX file, which holds no code and needs no trust.

    Raises:
        RequirementMissing: onnx2fx is not installed.
        DfadcError: the file is damaged, is no network from one image to logits, or cannot be converted exactly.
    """
    graph = read_graph(path)
    try:
        module, worst = _convert_and_check(graph)
    except DfadcError:
        if graph.batch != 1:
            raise
        graph = read_graph(path, frees_batch=False)
        module, worst = _convert_and_check(graph)
    is_mapped = isinstance(module, MappedOverImages)
    notes = [
        f"converted by onnx2fx; outputs within {worst:.0e} of their range of ONNX Runtime's",
        *graph.notes,
        *(("its batch of 1 is part of the graph: it is mapped over the images",) if is_mapped else ()),
    ]
    if not find_norm_layers(module):
        notes.append("its exporter has folded all batch norms: the teacher has no statistics")
    values = {"mean": (0.0,) * graph.channels, "std": (1.0,) * graph.channels}
    return TeacherFile(
        path,
        FileKind.ONNX,
        module=module.eval(),
        input_size=None if graph.side is None else (graph.channels, *graph.side),
        channels=graph.channels,
        notes=tuple(notes),
        arguments=TrainingArguments("the graph's uint8 input", values) if graph.is_uint8 else None,
    )


class MappedOverImages(nn.Module):
    """Network whose graph takes one image; all images of a batch go through it at once, by ``torch.vmap``.

    Args:
        network: images (1, C, H, W) -> logits (1, K).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        logits: Tensor = torch.vmap(self.network)(images.unsqueeze(1))
        return logits.flatten(0, 1)


def _convert_and_check(graph: OnnxGraph) -> tuple[nn.Module, float]:
    """The graph as a module, and the largest difference to ONNX Runtime as a share of the outputs' range.

    Raises:
        RequirementMissing: onnx2fx is not installed.
        DfadcError: it cannot be converted exactly for any number of images.
    """
    converted = _convert(graph)
    num_norms = _restore_norms_(converted)
    _keep_sizes_on_cpu_(converted)
    _register_parameters_(converted)
    is_fixed = graph.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    # A hook inside the map would see single images, whose statistics are none of a batch.
    module: nn.Module = MappedOverImages(converted) if is_fixed and not num_norms else converted
    vars(module)["original_name"] = f"ONNX graph {graph.model.graph.name}".strip()
    # torch.fx prints generated code where a forward fails; the error says what is needed.
    with contextlib.redirect_stderr(io.StringIO()):
        return module, _check(module, graph)


def _convert(graph: OnnxGraph) -> fx.GraphModule:
    """The graph as a torch module.

    Raises:
        RequirementMissing: onnx2fx is not installed.
        DfadcError: it does not know an operator.
    """
    try:
        import onnx2fx  # noqa: PLC0415 -- an extra
    except ImportError as exc:
        raise RequirementMissing(
            f"{graph.path} is an ONNX file, and onnx2fx, which converts it, is not installed",
            "pip install 'dfadc[onnx-teacher]'",
        ) from exc
    try:
        module: fx.GraphModule = onnx2fx.convert(graph.model)
    except (onnx2fx.Onnx2FxError, *_NO_RUN) as exc:
        raise DfadcError(f"{graph.path} cannot be converted: {_reason(exc)}", _EXPORT_AGAIN) from exc
    return module


def _restore_norms_(module: fx.GraphModule) -> int:
    """Turns batch-norm nodes with constant statistics into layers, in place, so that they can be found and watched."""
    restored = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.meta.get("onnx_op_type") != "BatchNormalization":
            continue
        images, *sources, epsilon, trains = node.args
        if trains or any(source.op != "get_attr" for source in sources):
            continue
        container = nn.Module()
        tensors = [getattr(module, source.target) for source in sources]
        for name, tensor in zip(("weight", "bias"), tensors[:2], strict=True):
            container.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        for name, tensor in zip(("running_mean", "running_var"), tensors[2:], strict=True):
            container.register_buffer(name, tensor)
        name = f"batch_norm_{restored}"
        module.add_submodule(name, ExportedBatchNorm(container, epsilon))
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.call_module(name, (images,)))
        module.graph.erase_node(node)
        restored += 1
    _recompile_(module)
    return restored


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


def _check(module: nn.Module, graph: OnnxGraph) -> float:
    """Compares the module's outputs with ONNX Runtime's for several numbers of images, and asks for its gradients.

    Returns:
        The largest difference as a share of the outputs' range.

    Raises:
        DfadcError: values differ, another number of images is refused, or the images get no finite gradient.
    """
    session = _session(graph)
    worst = 0.0
    for number in _BATCHES:
        images, expected = _ask(session, graph, number)
        try:
            logits = module(images)
        except _NO_RUN as exc:
            raise DfadcError(
                f"{graph.path} does not run on a batch of {len(images)} after its conversion: {_reason(exc)}",
                "export it again with a dynamic batch axis (dynamic_shapes of torch.onnx.export)",
            ) from exc
        if not isinstance(logits, Tensor) or logits.shape != expected.shape:
            shape = tuple(getattr(logits, "shape", ()))
            raise DfadcError(
                f"{graph.path} gives outputs of shape {shape} after its conversion; ONNX Runtime gives "
                f"{tuple(expected.shape)} for a batch of {len(images)}",
                _EXPORT_AGAIN,
            )
        span = float(expected.max() - expected.min()) or 1.0
        difference = float((logits.detach() - expected).abs().max()) / span
        if not difference <= _TOLERANCE:
            raise DfadcError(
                f"{graph.path} gives other outputs after its conversion: {difference:.1e} of their range from ONNX "
                f"Runtime's, and {_TOLERANCE:.0e} is allowed",
                _EXPORT_AGAIN,
            )
        worst = max(worst, difference)
    _check_gradients(module, images, graph)
    return worst


def _check_gradients(module: nn.Module, images: Tensor, graph: OnnxGraph) -> None:
    images = images.clone().requires_grad_()
    gradient: Tensor | None = None
    logits = module(images)
    if logits.requires_grad:
        (gradient,) = torch.autograd.grad(logits.square().sum(), images, allow_unused=True)
    if gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any()):
        return
    quantised = sorted({node.op_type for node in graph.model.graph.node if "Quantize" in node.op_type})
    reason = f" (it rounds: {', '.join(quantised)})" if quantised else ""
    raise DfadcError(
        f"{graph.path} gives no finite gradient to its images{reason}; adversarial distillation needs one",
        "give the float32 file that it was quantised from" if quantised else "give the PyTorch weights",
    )


def _session(graph: OnnxGraph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the reason of a failure is in its exception
    try:
        return onnxruntime.InferenceSession(
            graph.original.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except (RuntimeError, ValueError) as exc:
        raise DfadcError(f"ONNX Runtime cannot load {graph.path}: {_reason(exc)}", _EXPORT_AGAIN) from exc


def _ask(session: onnxruntime.InferenceSession, graph: OnnxGraph, number: int) -> tuple[Tensor, Tensor]:
    """Random images (N, C, H, W) in 0..1 and ONNX Runtime's outputs for them, in the file's own batches."""
    generator = np.random.default_rng(0)
    reason: Exception | None = None
    for height, width in [graph.side] if graph.side is not None else [(side, side) for side in _SIDES]:
        pixels = generator.integers(0, 256, (number * (graph.batch or 1), graph.channels, height, width), np.uint8)
        try:
            parts = [_run(session, graph, part) for part in np.split(pixels, number if graph.batch else 1)]
        except (RuntimeError, ValueError) as exc:
            reason = exc
            continue
        return torch.from_numpy(pixels).float() / 255, torch.from_numpy(np.concatenate(parts))
    raise DfadcError(f"ONNX Runtime cannot run {graph.path}: {_reason(reason)}", _EXPORT_AGAIN) from reason


def _run(session: onnxruntime.InferenceSession, graph: OnnxGraph, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    laid_out = pixels.transpose(0, 2, 3, 1) if graph.is_channels_last else pixels
    images = laid_out if graph.is_uint8 else laid_out.astype(np.float32) / 255
    outputs: NDArray[np.float32] = session.run(None, {graph.name: np.ascontiguousarray(images)})[0]
    return outputs


def _reason(exc: Exception | None) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__
