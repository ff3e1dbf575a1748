"""Exporter of OpenVINO IR (student.openvino.xml and .bin) from ONNX. Free of torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfadc.errors import DfadcError, ExportFailed, StorageFailed
from dfadc.storage import replace_together, sha256_file, storage_errors
from exporters.exporter import BuildSettings, Capability, ExportRequest, ExportResult, Precision
from exporters.sessions.openvino_core import INSTALL, import_openvino, shared_core
from exporters.to_onnx.file import METADATA_PREFIX, first_line, load_onnx, read_metadata
from exporters.to_openvino.unsigned import with_unsigned_activations

if TYPE_CHECKING:
    from types import ModuleType


class OpenVinoExporter:
    """Builds IR for OpenVINO, which runs on any x86-64 or ARM CPU."""

    name = "openvino"

    def capability(self) -> Capability:
        """Builds and runs wherever the package is installed."""
        if importlib.util.find_spec("openvino") is None:
            return Capability(can_build=False, can_run=False, reason="openvino is not installed", install=INSTALL)
        return Capability(can_build=True, can_run=True, version=importlib.metadata.version("openvino"))

    def check(self, settings: BuildSettings) -> None:
        """No setting depends on the machine."""

    def export(self, source_onnx: Path, target: Path, request: ExportRequest, settings: BuildSettings) -> ExportResult:  # noqa: ARG002
        """Converts the ONNX; fp16 stores the weights in half precision. See :meth:`Exporter.export`."""
        openvino = import_openvino()
        source = load_onnx(source_onnx)
        metadata = read_metadata(source)
        is_int8 = request.precision is Precision.INT8
        try:
            model = shared_core().read_model(
                with_unsigned_activations(source).SerializeToString() if is_int8 else source_onnx
            )
        except RuntimeError as exc:
            raise ExportFailed(f"OpenVINO cannot take {source_onnx.name}: {_last_line(exc)}") from exc
        parent = sha256_file(source_onnx)
        for key, value in {**metadata, "precision": str(request.precision), "parent_sha256": parent}.items():
            model.set_rt_info(value, ["dfadc", key.removeprefix(METADATA_PREFIX)])
        _check_precision(model, request.precision)
        weights = target.with_suffix(".bin")
        _save(openvino, model, target, compress=request.precision is Precision.FP16)
        return ExportResult(
            path=target,
            request=request,
            effective_precision="fp16 weights" if request.precision is Precision.FP16 else str(request.precision),
            sha256=sha256_file(target),
            size_bytes=target.stat().st_size + weights.stat().st_size,
            parent_sha256=parent,
            tool_versions={"openvino": importlib.metadata.version("openvino")},
            extra_files=(weights,),
        )


def _check_precision(model: Any, requested: Precision) -> None:
    """Refuses a graph that is not quantised if INT8 was requested, one that is otherwise, and fp16 as fp32."""
    operators = Counter(node.get_type_name() for node in model.get_ops())
    halves = sum(
        node.get_element_type().get_type_name() == "f16"
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
    )
    quantised = operators["FakeQuantize"] > 0
    if quantised != (requested is Precision.INT8):
        state = "quantised" if quantised else "not quantised"
        raise ExportFailed(f"the graph is {state}, and {requested} was requested", f"build from onnx:{requested}")
    if halves and requested is Precision.FP32:
        raise DfadcError("the graph has fp16 weights, and fp32 was requested", "build from onnx:fp32")


def _save(openvino: ModuleType, model: Any, target: Path, *, compress: bool) -> None:
    """Writes both files of the IR, or neither: first into a temporary folder beside the target.

    The xml is moved last: where it exists, its weights exist.
    """
    with storage_errors(f"write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            draft = Path(folder) / target.name
            try:
                openvino.save_model(model, draft, compress_to_fp16=compress)
            except RuntimeError as exc:  # OpenVINO reports a full disk like anything else
                raise StorageFailed(f"OpenVINO cannot write {target}: {_last_line(exc)}") from exc
            aside = Path(folder) / "replaced"
            aside.mkdir()
            places = (target, target.with_suffix(".bin"))
            replace_together({place: draft.with_suffix(place.suffix) for place in places}, aside)


def _last_line(error: BaseException) -> str:
    """The last line of an error: OpenVINO writes the reason after the source files it was raised in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else first_line(error)
