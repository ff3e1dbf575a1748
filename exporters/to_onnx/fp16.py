"""The fp16 ONNX: converted from the fp32 one, sorted, checked, with what half precision cannot hold left in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir
from onnx import TensorProto, numpy_helper
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from dfadc.errors import DfadcError, ExportFailed
from exporters.sessions.onnx_runtime import OnnxRuntimeSession
from exporters.to_onnx.file import OPSET, all_nodes, first_line, graph_inputs, opset_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

#: The largest finite half-precision number.
FP16_MAX = 65504.0
#: What exceeds this on the calibration images stays in fp32: real images reach further than generated ones, up to 2.8
#: times as far where it was measured (see ``headroom.SMALL_HEADROOM``).
_KEPT_BEYOND = FP16_MAX / 4


@dataclass(frozen=True, slots=True)
class Fp16Model:
    """An fp16 graph that takes and returns fp32, and the nodes that stayed in fp32."""

    model: onnx.ModelProto
    fp32_nodes: tuple[str, ...]


def convert_to_fp16(
    source: onnx.ModelProto,
    *,
    images: NDArray[np.float32] | None = None,
    keep_fp32: Iterable[str] = (),
) -> Fp16Model:
    """Converts an fp32 graph to fp16; inputs and outputs stay fp32.

    A node stays in fp32 where one of its weights is beyond 65504 or, seen on ``images``, one of its inputs or outputs
    beyond a quarter of that, where ONNX Runtime would crash, and where the caller or the converter (for operators
    without fp16) says so.

    Args:
        source: the fp32 graph; it is not changed.
        images: (N, C, H, W) float32 images to look for overflowing activations with; None looks at weights alone.
        keep_fp32: names of further nodes that stay in fp32.

    Raises:
        DfadcError: the source is not an fp32 graph of opset 20, or ``keep_fp32`` names a node it does not have.
        ExportFailed: the converter gives up.
    """
    check_is_fp32(source)
    known = {node.name for node in source.graph.node}
    if unknown := sorted(set(keep_fp32) - known):
        raise DfadcError(f"no node {unknown[0]!r} in the graph to keep in fp32", "dfadc inspect lists the nodes")
    blocked = set(keep_fp32) | _nodes_with_large_weights(source) | _transposes_that_crash(source)
    if images is not None:
        blocked |= _nodes_beyond(_KEPT_BEYOND, source, images).keys()
    try:
        model = convert_float_to_float16(source, keep_io_types=True, node_block_list=sorted(blocked))
    except (ValueError, RuntimeError, AssertionError, onnx.shape_inference.InferenceError) as exc:
        raise ExportFailed(f"the graph cannot be converted to fp16: {first_line(exc)}") from exc
    _bypass_round_trips(model)
    graph_model = onnx_ir.from_proto(model)
    graph_model.graph.sort()
    by_operator = {node.name for node in source.graph.node if node.op_type in DEFAULT_OP_BLOCK_LIST}
    return Fp16Model(onnx_ir.to_proto(graph_model), tuple(sorted(blocked | by_operator)))


def check_no_overflow(source: onnx.ModelProto, images: NDArray[np.float32], fp32_nodes: Iterable[str]) -> None:
    """Checks that fp16 holds what passes between the nodes of a graph, apart from those that stay in fp32.

    Args:
        source: the fp32 graph that the fp16 one is made of.
        images: (N, C, H, W) float32 images that had no say in which nodes stay.
        fp32_nodes: names of the nodes that stay.

    Raises:
        ExportFailed: a node overflows; it is named.
    """
    reached = _nodes_beyond(FP16_MAX, source, images)
    if overflowing := sorted(reached.keys() - set(fp32_nodes)):
        peak = max(reached[name] for name in overflowing)
        raise ExportFailed(
            f"fp16 overflows in {', '.join(overflowing)}: activations reach {peak:,.0f} on the verification samples, "
            f"fp16 ends at {FP16_MAX:,.0f}",
            f"keep them in fp32: {' '.join(f'--keep-fp32 {name}' for name in overflowing)}",
        )


def activation_peaks(model: onnx.ModelProto, images: NDArray[np.float32]) -> dict[str, float]:
    """Largest magnitude of every fp32 tensor that a node of ``model`` puts out, over ``images``.

    NaN anywhere counts as infinity.
    """
    peaks: dict[str, float] = {}
    for name, value in activations(model, images):
        if value.dtype == np.float32 and value.size:
            peak = float(np.abs(value).max())
            peaks[name] = max(peaks.get(name, 0.0), np.inf if np.isnan(peak) else peak)
    return peaks


def activations(model: onnx.ModelProto, images: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every tensor that a node of ``model`` puts out, by name, for one batch of ``images`` after the other.

    They are read off a run of the graph on the CPU.
    """
    exposed, names = _with_all_outputs(model)
    with _AllOutputsSession(exposed.SerializeToString(), threads=1, batch_size=32) as session:
        for start in range(0, len(images), session.batch_size):
            yield from zip(names, session.all_outputs(images[start : start + session.batch_size]), strict=True)


class _AllOutputsSession(OnnxRuntimeSession):
    """A session on a graph whose every tensor is an output."""

    _num_outputs = None

    def all_outputs(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Every output for one batch."""
        outputs: list[NDArray[np.float32]] = self._session.run(None, {self._input_name: images})
        return outputs


def check_is_fp32(source: onnx.ModelProto) -> None:
    """Raises DfadcError unless ``source`` is what derived artifacts are made of: an fp32 graph of opset 20."""
    if opset_of(source) != OPSET:
        raise DfadcError(f"the ONNX has opset {opset_of(source)}, not {OPSET}", "export it with dfadc")
    types = {tensor.data_type for tensor in source.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*graph_inputs(source), *source.graph.output)}
    if types & {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8}:
        raise DfadcError("the ONNX is not an fp32 graph", "derived artifacts are made of the fp32 student.onnx")
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in all_nodes(source.graph)):
        raise DfadcError("the ONNX is already quantised", "derived artifacts are made of the fp32 student.onnx")


def _nodes_with_large_weights(model: onnx.ModelProto) -> set[str]:
    """Nodes with a finite weight that fp16 cannot hold; the converter would clamp it in silence."""
    large = set()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if np.any(np.isfinite(values) & (np.abs(values) > FP16_MAX)):
                large.add(tensor.name)
    return {node.name for node in model.graph.node if large.intersection(node.input)}


def _transposes_that_crash(model: onnx.ModelProto) -> set[str]:
    """Transposes whose output a MatMul multiplies with a constant, as in torch's attention with the batch second.

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


def _nodes_beyond(limit: float, model: onnx.ModelProto, images: NDArray[np.float32]) -> dict[str, float]:
    """Nodes that write or read a tensor beyond ``limit``, and how far it reaches.

    Those that read it are among them: in fp16 they would be given infinity.
    """
    peaks = activation_peaks(model, images)
    reached = {
        node.name: max(peaks.get(name, 0.0) for name in (*node.input, *node.output)) for node in model.graph.node
    }
    return {name: peak for name, peak in reached.items() if peak > limit}


def _with_all_outputs(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of ``model`` with every node's outputs as graph outputs, and their names in order."""
    exposed = onnx.shape_inference.infer_shapes(model)
    known = {value.name: value for value in (*exposed.graph.value_info, *exposed.graph.output)}
    names = [name for node in exposed.graph.node for name in node.output if name]
    del exposed.graph.output[:]
    exposed.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return exposed, names


def _bypass_round_trips(model: onnx.ModelProto) -> None:
    """Between two fp32 nodes the converter casts to fp16 and back, which loses what they were kept for: connect them.

    fp32 -> Cast fp16 -> Cast fp32 becomes the first tensor. What is no fp32 before (bool, int64) is cast to fp32 right
    away. Casts that nobody reads afterwards go.
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
    _drop_dead_casts(graph, outputs)


def _drop_dead_casts(graph: onnx.GraphProto, outputs: set[str]) -> None:
    """Removes casts that read nothing or that nothing reads, until none is left."""
    while True:
        read = {name for node in all_nodes(graph) for name in node.input} | outputs
        dead = [
            node for node in graph.node if node.op_type == "Cast" and (not node.input[0] or node.output[0] not in read)
        ]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    written = {name for node in graph.node for name in node.output}
    kept = [value for value in graph.value_info if value.name in written and value.name not in outputs]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _casts_to(node: onnx.NodeProto, dtype: int) -> bool:
    return node.op_type == "Cast" and any(entry.name == "to" and entry.i == dtype for entry in node.attribute)
