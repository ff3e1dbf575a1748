"""ONNX files: reading with clear errors, checks, reproducible bytes, metadata. Free of torch."""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

import onnx
import onnx_ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dfadc.errors import DfadcError, ExportFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

#: ONNX Runtime's static quantisation takes no later opset; the exporter makes no earlier one. ONNX Runtime 1.17 is the
#: first that supports it (``onnx_runtime.LEAST_ONNXRUNTIME``).
OPSET = 20
#: Prefix of dfadc's metadata keys.
METADATA_PREFIX = "dfadc."
INPUT_NAME = "images"


def load_onnx(path: Path) -> onnx.ModelProto:
    """Reads and checks an ONNX file.

    Raises:
        DfadcError: as :func:`parse_onnx`; or the graph is not valid ONNX.
    """
    model = parse_onnx(path)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as exc:
        raise DfadcError(f"{path} is not valid ONNX: {first_line(exc)}", "export it again") from exc
    return model


def parse_onnx(path: Path) -> onnx.ModelProto:
    """Reads an ONNX file without checking its graph.

    Raises:
        DfadcError: missing, unreadable, truncated, not ONNX, empty, or with weights in other files.
    """
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as exc:
        raise DfadcError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except DecodeError as exc:
        raise DfadcError(f"{path} is not an ONNX file, or a damaged one: {exc}", "export it again") from exc
    if not model.graph.node or not model.graph.output:
        raise DfadcError(f"{path} holds no network: its ONNX graph is empty", "export it again")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise DfadcError(f"{path} keeps its weights in other files", "save it with the weights inside")
    return model


def to_checked_bytes(model: onnx.ModelProto, name: str) -> bytes:
    """The bytes of ``model``, after a full check of types, shapes and the opset; ``name`` is for messages.

    They depend on the model alone: protobuf maps are written in a fixed order. The IR version of ``model`` becomes the
    lowest that its opset and dtypes need: a runtime refuses every IR version that is newer than its own.

    Raises:
        ExportFailed: the model is not valid ONNX of opset 20.
    """
    lowest: int = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    # Tensors of later dtypes need the model's own.
    if all(tensor.data_type <= onnx.TensorProto.FLOAT8E5M2FNUZ for tensor in model.graph.initializer):
        model.ir_version = min(lowest, model.ir_version)
    data: bytes = model.SerializeToString(deterministic=True)
    reread = onnx.load_model_from_string(data)
    try:
        onnx.checker.check_model(reread, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise ExportFailed(f"the graph for {name} is not valid ONNX: {first_line(exc)}") from exc
    if (opset := opset_of(reread)) != OPSET:
        raise ExportFailed(f"the graph for {name} has opset {opset}, not {OPSET}")
    return data


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the default operator set; 0 if there is none."""
    return next((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), 0)


def read_metadata(model: onnx.ModelProto) -> dict[str, str]:
    """All metadata of the model, dfadc's and others'."""
    return {entry.key: entry.value for entry in model.metadata_props}


def with_metadata(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Adds ``metadata`` to the model's, keys sorted; a key without the ``dfadc.`` prefix gets it."""
    merged = read_metadata(model)
    for key, value in metadata.items():
        merged[key if key.startswith(METADATA_PREFIX) else METADATA_PREFIX + key] = value
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(sorted(merged.items())))


def graph_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs without the weights, which old exporters list among them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of subgraphs (If, Loop) included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from all_nodes(subgraph)


def without_unread(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the nodes and constants that nothing reads, each node after those that it reads from."""
    tidied = onnx_ir.from_proto(model)
    RemoveUnusedNodesPass()(tidied)
    tidied.graph.sort()
    return onnx_ir.to_proto(tidied)


def operator_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Number of nodes by operator, the most frequent first."""
    return dict(sorted(Counter(node.op_type for node in all_nodes(model.graph)).items(), key=lambda i: (-i[1], i[0])))


@contextmanager
def quiet() -> Iterator[None]:
    """Silences a library that prints and logs about its internals; its errors are exceptions."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
