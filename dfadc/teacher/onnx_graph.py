"""ONNX graphs made ready for conversion: one image input, one output of logits, batches of any size.

Only protobuf messages are read and changed here; no code of a file runs, for an ONNX file holds none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from dfadc.errors import DfadcError
from dfadc.teacher.onnx_numbers import compute_quantisation_, constants_of, set_nodes_, widen_
from dfadc.teacher.teacher_file import first_line

if TYPE_CHECKING:
    from pathlib import Path

#: Operators that choose or repeat parts of the graph by data.
_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
#: Last operators that turn logits into probabilities or classes.
_HEADS = ("Softmax", "LogSoftmax", "Sigmoid", "ArgMax")
#: Operators between such a head and the output that only rename or reshape.
_PASSING = ("Identity", "Flatten", "Reshape", "Squeeze", "Cast")
_IMAGES = "images"


@dataclass(frozen=True, slots=True)
class OnnxGraph:
    """One classifier or segmentation network as an ONNX graph.

    Args:
        path: of the file.
        original: the file's graph without its softmax or sigmoid.
        model: the same with images (N, C, H, W) in float32, of any N unless the batch was kept.
        name: of the original's input.
        channels: C.
        side: (H, W); None where the graph takes several.
        batch: N of the original where it is fixed, else None.
        is_channels_last: whether the original takes (N, H, W, C).
        is_uint8: whether the original takes pixels of 0..255 as uint8.
        notes: what was changed, for the user.
        head: last operator that was taken off; empty where none was.
        is_rounded: whether it holds quantisation, whose roundings may differ from a runtime's.
    """

    path: Path
    original: onnx.ModelProto
    model: onnx.ModelProto
    name: str
    channels: int
    side: tuple[int, int] | None
    batch: int | None
    is_channels_last: bool
    is_uint8: bool
    notes: tuple[str, ...]
    head: str = ""
    is_rounded: bool = False


def read_graph(path: Path, *, output: str | None = None, frees_batch: bool = True) -> OnnxGraph:
    """Reads an ONNX file and its external data.

    Args:
        path: the file.
        output: name of the only output to keep; None keeps all.
        frees_batch: a fixed batch is made dynamic; else the model keeps it.

    Raises:
        DfadcError: it is damaged, its external data is missing, or it is no network from one image to logits.
    """
    original = _load(path)
    notes = widen_(original)
    if output is not None:
        _keep_output_(original, output)
    head = _cut_head_(original) if len(original.graph.output) == 1 else ""
    if head:
        notes.append(f"the last {head} was taken off: the outputs before it are the logits")
    image = _image_input(original, path)
    elements = image.type.tensor_type.elem_type
    if elements not in (TensorProto.FLOAT, TensorProto.UINT8):
        kind = TensorProto.DataType.Name(elements)
        raise DfadcError(f"{path} takes images of type {kind}, not FLOAT", "give the float32 file")
    dims = image.type.tensor_type.shape.dim
    batch, *sizes = (dim.dim_value if dim.dim_value > 0 else None for dim in dims)
    is_channels_last = sizes[2] is not None and (sizes[0] is None or sizes[2] < sizes[0])
    channels, *side = (sizes[2], *sizes[:2]) if is_channels_last else sizes
    if channels is None:
        raise DfadcError(
            f"{path} does not state the channels of its input {image.name}", "export it with fixed channels"
        )
    model = onnx.ModelProto()
    model.CopyFrom(original)
    if is_rounded := compute_quantisation_(model, path):
        notes.append("it is quantised: rounding passes gradients straight through")
    if batch is not None and frees_batch:
        _free_batch_(model, batch)
        notes.append(f"its batch of {batch} was made dynamic")
    is_uint8 = elements == TensorProto.UINT8
    sizes = [None if frees_batch else batch, channels, *side]
    _replace_input_(model, image.name, sizes, is_channels_last=is_channels_last, is_uint8=is_uint8)
    if is_channels_last:
        notes.append("its images (N, H, W, C) are given as (N, C, H, W)")
    if is_uint8:
        notes.append("its uint8 pixels are given as float32 in 0..1, with the preprocessing that the graph holds")
    return OnnxGraph(
        path=path,
        original=original,
        model=model,
        name=image.name,
        channels=channels,
        side=None if side[0] is None or side[1] is None else (side[0], side[1]),
        batch=batch,
        is_channels_last=is_channels_last,
        is_uint8=is_uint8,
        notes=tuple(notes),
        head=head,
        is_rounded=is_rounded,
    )


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as exc:
        raise DfadcError(f"cannot read {path}: {first_line(exc)}", "copy or export it again") from exc
    if not model.graph.node:
        raise DfadcError(f"cannot read {path}: its graph is empty", "copy or export it again")
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as exc:
        external = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
        names = ", ".join(sorted({entry.value for entry in external if entry.key == "location"}))
        raise DfadcError(
            f"{path} keeps its weights in {names}, which cannot be read: {first_line(exc)}", f"copy {names} beside it"
        ) from exc
    for node in model.graph.node:
        if node.op_type in _CONTROL_FLOW:
            raise DfadcError(
                f"{path} holds control flow (operator {node.op_type}), which cannot be converted",
                "export the network without it, e.g. with torch.onnx.export(..., dynamo=True) in eval mode",
            )
    return model


def _image_input(model: onnx.ModelProto, path: Path) -> onnx.ValueInfoProto:
    """The input that is no weight; files up to opset 8 list their weights among the inputs."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise DfadcError(
            f"{path} has {len(inputs)} inputs ({names}); a teacher takes one batch of images",
            "export the network with the image input alone and constants for the others",
        )
    rank = len(inputs[0].type.tensor_type.shape.dim)
    if rank != 4:
        raise DfadcError(
            f"{path} takes an input {inputs[0].name} of {rank} axes, not images (N, C, H, W) or (N, H, W, C)",
            "give an image classifier or a segmentation network",
        )
    image: onnx.ValueInfoProto = inputs[0]
    return image


def _keep_output_(model: onnx.ModelProto, name: str) -> None:
    """Removes all outputs but one, and the nodes that only the others need, in place."""
    for value in [each for each in model.graph.output if each.name != name]:
        model.graph.output.remove(value)
    needed, nodes = {name}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    set_nodes_(model.graph, nodes[::-1])


def _cut_head_(model: onnx.ModelProto) -> str:
    """Turns a last softmax, sigmoid or argmax into an identity, in place; its name, or nothing where there is none."""
    producers = {name: node for node in model.graph.node for name in node.output}
    output = model.graph.output[0]
    node = producers.get(output.name)
    while node is not None and node.op_type in _PASSING:
        node = producers.get(node.input[0])
    if node is None or node.op_type not in _HEADS:
        return ""
    head = node.op_type
    if head == "ArgMax":
        if node.output[0] != output.name:
            return ""
        output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, None))
    node.op_type = "Identity"
    del node.attribute[:]
    return str(head)


def _free_batch_(model: onnx.ModelProto, batch: int) -> None:
    """Makes a fixed batch dynamic, in place: in the shapes of values, and in constants that give shapes."""
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_value == batch:
            dims[0].dim_param = "N"
    del model.graph.value_info[:]
    constants = constants_of(model)
    for node in model.graph.node:
        if node.op_type != "Reshape" or (shape := constants.get(node.input[1])) is None:
            continue
        first, *others = [*numpy_helper.to_array(shape).ravel().tolist(), None]
        if first == batch:
            # -1 is found from the rest; where another size is to be found, 0 copies the batch of what is reshaped.
            sizes = [0 if -1 in others else -1, *others[:-1]]
            shape.CopyFrom(numpy_helper.from_array(np.array(sizes, np.int64), shape.name))
        if 0 in numpy_helper.to_array(shape):
            kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)


def _replace_input_(
    model: onnx.ModelProto, name: str, sizes: list[int | None], *, is_channels_last: bool, is_uint8: bool
) -> None:
    """Replaces the input by float32 images (N, C, H, W), in place; nodes turn them into what the graph took."""
    dims = [axis if size is None else size for axis, size in zip("NCHW", sizes, strict=True)]
    kept = [value for value in model.graph.input if value.name != name]
    taken = {value for node in model.graph.node for value in (*node.input, *node.output)}
    images = next(each for each in (_IMAGES, f"{_IMAGES}_", f"{_IMAGES}__") if each not in taken)
    added, last = [], images
    if is_uint8:
        model.graph.initializer.append(helper.make_tensor(f"{images}_range", TensorProto.FLOAT, [], [255.0]))
        added.append(helper.make_node("Mul", [last, f"{images}_range"], [last := f"{images}_pixels"]))
    if is_channels_last:
        added.append(helper.make_node("Transpose", [last], [last := f"{images}_channels_last"], perm=[0, 2, 3, 1]))
    for node in model.graph.node:
        node.input[:] = [last if each == name else each for each in node.input]
    set_nodes_(model.graph, [*added, *model.graph.node])
    del model.graph.input[:]
    model.graph.input.extend([helper.make_tensor_value_info(images, TensorProto.FLOAT, dims), *kept])
    del model.graph.value_info[:]
