"""Check of a converted ONNX graph against ONNX Runtime: outputs for several numbers of images, and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from dfadc.errors import DfadcError
from dfadc.teacher.teacher_file import first_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dfadc.teacher.onnx_graph import OnnxGraph

#: Errors of converted graphs and of the converter, which agree on none of their own.
FOREIGN_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
EXPORT_AGAIN = "export it again, e.g. with torch.onnx.export(..., opset_version=17), or give the PyTorch weights"
#: Largest difference to ONNX Runtime, as a share of the outputs' range; a correct conversion stays below 1e-6.
_TOLERANCE = 1e-4
#: The same for a quantised graph, where a value in the middle of two steps may be rounded to the other one.
_ROUNDING = 0.05
#: Sides of images that are tried where a graph takes images of any size.
_SIDES = (64, 224, 32)
#: Numbers of images in the check.
_BATCHES = (1, 3)


def check_against_runtime(module: nn.Module, graph: OnnxGraph) -> float:
    """Compares the module's outputs with ONNX Runtime's for several numbers of images, and asks for its gradients.

    Returns:
        The largest difference as a share of the outputs' range.

    Raises:
        DfadcError: values differ, another number of images is refused, or the images get no finite gradient.
    """
    session = _session(graph)
    worst = 0.0
    for number in _BATCHES:
        images, (expected, *_) = _ask(session, graph, number)
        try:
            logits = module(images)
        except FOREIGN_ERRORS as exc:
            raise DfadcError(
                f"{graph.path} does not run on a batch of {len(images)} after its conversion: {first_line(exc)}",
                "export it again with a dynamic batch axis (dynamic_shapes of torch.onnx.export)",
            ) from exc
        if not isinstance(logits, Tensor) or logits.shape != expected.shape:
            shape = tuple(getattr(logits, "shape", ()))
            raise DfadcError(
                f"{graph.path} gives outputs of shape {shape} after its conversion; ONNX Runtime gives "
                f"{tuple(expected.shape)} for a batch of {len(images)}",
                EXPORT_AGAIN,
            )
        span = float(expected.max() - expected.min()) or 1.0
        difference = float((logits.detach() - expected).abs().max()) / span
        allowed = _ROUNDING if graph.is_rounded else _TOLERANCE
        if not difference <= allowed:
            raise DfadcError(
                f"{graph.path} gives other outputs after its conversion: {difference:.1e} of their range from ONNX "
                f"Runtime's, and {allowed:.0e} is allowed",
                EXPORT_AGAIN,
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
    raise DfadcError(
        f"{graph.path} gives no finite gradient to its images; adversarial distillation needs one",
        "give the PyTorch weights",
    )


def named_outputs(graph: OnnxGraph) -> tuple[dict[str, Tensor], Tensor]:
    """All outputs of the file for a batch of two images by ONNX Runtime, and these images.

    Raises:
        DfadcError: ONNX Runtime cannot run it.
    """
    images, outputs = _ask(_session(graph), graph, 2)
    return {value.name: output for value, output in zip(graph.original.graph.output, outputs, strict=True)}, images


def _session(graph: OnnxGraph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if graph.is_rounded:  # it would compute with integers
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # the reason of a failure is in its exception
    try:
        return onnxruntime.InferenceSession(
            graph.original.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except (RuntimeError, ValueError) as exc:
        raise DfadcError(f"ONNX Runtime cannot load {graph.path}: {first_line(exc)}", EXPORT_AGAIN) from exc


def _ask(session: onnxruntime.InferenceSession, graph: OnnxGraph, number: int) -> tuple[Tensor, list[Tensor]]:
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
        joined = [torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True)]
        return torch.from_numpy(pixels).float() / 255, joined
    raise DfadcError(f"ONNX Runtime cannot run {graph.path}: {first_line(reason)}", EXPORT_AGAIN) from reason


def _run(
    session: onnxruntime.InferenceSession, graph: OnnxGraph, pixels: NDArray[np.uint8]
) -> list[NDArray[np.float32]]:
    laid_out = pixels.transpose(0, 2, 3, 1) if graph.is_channels_last else pixels
    images = laid_out if graph.is_uint8 else laid_out.astype(np.float32) / 255
    outputs: list[NDArray[np.float32]] = session.run(None, {graph.name: np.ascontiguousarray(images)})
    return outputs
