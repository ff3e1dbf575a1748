"""Conversion of an fp32 graph to fp16, with the nodes that half precision cannot hold in fp32. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from dfadc.errors import DfadcError, ExportFailed
from exporters.to_onnx.file import OPSET, all_nodes, first_line, graph_inputs, opset_of, without_unread
from exporters.to_onnx.ranges import FP16_MAX, measure_activations

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from exporters.to_onnx.ranges import ActivationRanges

#: Nodes that exceed this on the calibration images stay in fp32: real images reach further than generated ones, up to
#: 2.8 times as far where it was measured (see ``ranges.SMALL_HEADROOM``).
_FP32_BEYOND = FP16_MAX / 4


@dataclass(frozen=True, slots=True)
class Fp16Model:
    """An fp16 graph with fp32 inputs and outputs, and the nodes that stayed in fp32."""

    model: onnx.ModelProto
    fp32_nodes: tuple[str, ...]


def convert_to_fp16(
    source: onnx.ModelProto,
    *,
    images: NDArray[np.float32] | None = None,
    keep_fp32: Iterable[str] = (),
) -> Fp16Model:
    """Converts a copy of an fp32 graph to fp16; inputs and outputs stay fp32.

    A node stays in fp32 if one of its weights exceeds 65504; if, on ``images`` (N, C, H, W), one of its inputs or
    outputs exceeds a quarter of that; if ONNX Runtime would crash; if the caller names it; if its operator has no fp16.

    Raises:
        DfadcError: the source is not an fp32 graph of opset 20, or ``keep_fp32`` names a node it does not have.
        ExportFailed: the converter fails.
    """
    check_is_fp32(source)
    known = {node.name for node in source.graph.node}
    if unknown := sorted(set(keep_fp32) - known):
        raise DfadcError(f"no node {unknown[0]!r} in the graph to keep in fp32", "dfadc inspect lists the nodes")
    blocked = set(keep_fp32) | _nodes_with_large_weights(source) | _transposes_that_crash(source)
    if images is not None and len(images):
        blocked |= measure_activations(source, [images]).beyond(_FP32_BEYOND).keys()
    try:
        model = convert_float_to_float16(source, keep_io_types=True, node_block_list=sorted(blocked))
    except (ValueError, RuntimeError, AssertionError, onnx.shape_inference.InferenceError) as exc:
        raise ExportFailed(f"the graph cannot be converted to fp16: {first_line(exc)}") from exc
    _bypass_round_trips(model)
    by_operator = {node.name for node in source.graph.node if node.op_type in DEFAULT_OP_BLOCK_LIST}
    return Fp16Model(without_unread(model), tuple(sorted(blocked | by_operator)))


def check_no_overflow(ranges: ActivationRanges, fp32_nodes: Iterable[str]) -> None:
    """Checks that no node of a graph overflows in fp16, apart from those that stay in fp32.

    The ranges are of the fp32 graph, on images that were not used to choose those nodes.

    Raises:
        ExportFailed: a node overflows; it is named.
    """
    peaks = ranges.beyond(FP16_MAX)
    if overflowing := sorted(peaks.keys() - set(fp32_nodes)):
        peak = max(peaks[name] for name in overflowing)
        raise ExportFailed(
            f"fp16 overflows in {', '.join(overflowing)}: activations reach {peak:,.0f} on the verification samples, "
            f"fp16 ends at {FP16_MAX:,.0f}",
            f"keep them in fp32: {' '.join(f'--keep-fp32 {name}' for name in overflowing)}",
        )


def check_is_fp32(source: onnx.ModelProto) -> None:
    """Raises DfadcError unless ``source`` is an fp32 graph of opset 20, from which fp16 and INT8 are derived."""
    if opset_of(source) != OPSET:
        raise DfadcError(f"the ONNX has opset {opset_of(source)}, not {OPSET}", "export it with dfadc")
    types = {tensor.data_type for tensor in source.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*graph_inputs(source), *source.graph.output)}
    if types & {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8}:
        raise DfadcError("the ONNX is not an fp32 graph", "fp16 and INT8 are made from the fp32 student.onnx")
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in all_nodes(source.graph)):
        raise DfadcError("the ONNX is already quantised", "fp16 and INT8 are made from the fp32 student.onnx")


def _nodes_with_large_weights(model: onnx.ModelProto) -> set[str]:
    """Nodes with a finite weight that fp16 cannot hold; the converter would clamp it silently."""
    large = set()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if np.any(np.isfinite(values) & (np.abs(values) > FP16_MAX)):
                large.add(tensor.name)
    return {node.name for node in model.graph.node if large.intersection(node.input)}


def _transposes_that_crash(model: onnx.ModelProto) -> set[str]:
    """Transposes before a MatMul with a constant, as in torch's attention with ``batch_first=False``.

    In fp16, ONNX Runtime puts a Cast between the two for its CPU kernels, and its fusion of the two (1.23 to 1.32) then
    ends the process with a segmentation fault.
    """
    graph = model.graph
    varying = {value.name for value in graph_inputs(model)}
    for node in graph.node:  # sources before what reads them: ONNX demands it
        if varying.intersection(node.input):
            varying.update(node.output)
    with_constant = {
        name
        for node in graph.node
        if node.op_type == "MatMul" and not varying.issuperset(node.input)
        for name in node.input
    }
    return {node.name for node in graph.node if node.op_type == "Transpose" and with_constant & set(node.output)}


def _bypass_round_trips(model: onnx.ModelProto) -> None:
    """Connects fp32 nodes directly; between two of them the converter casts to fp16 and back, which would overflow.

    fp32 -> Cast fp16 -> Cast fp32 becomes the first tensor. A tensor of another dtype (bool, int64) is cast to fp32
    directly. Casts that nothing reads any more stay.
    """
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
    read_instead: dict[str, str] = {}
    renamed: dict[str, str] = {}
    for up in graph.node:
        down = producer.get(up.input[0]) if _casts_to(up, TensorProto.FLOAT) else None
        if down is None or not _casts_to(down, TensorProto.FLOAT16):
            continue
        if types.get(down.input[0]) != TensorProto.FLOAT:
            up.input[0] = down.input[0]
        elif up.output[0] not in outputs:
            read_instead[up.output[0]] = down.input[0]
        elif down.input[0] in producer:  # the fp32 node writes the graph output itself, under its name
            renamed[down.input[0]] = up.output[0]
            up.input[0] = up.output[0] = ""
    for node in graph.node:
        for position, name in enumerate(node.input):
            source = read_instead.get(name, name)
            node.input[position] = renamed.get(source, source)
        node.output[:] = [renamed.get(name, name) for name in node.output]
    # Outputs and weights have types of their own; what the converter noted of those that stay fp32 is wrong.
    written = {name for node in graph.node for name in node.output} - outputs
    kept = [value for value in graph.value_info if value.name in written]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _casts_to(node: onnx.NodeProto, dtype: int) -> bool:
    return node.op_type == "Cast" and any(entry.name == "to" and entry.i == dtype for entry in node.attribute)
