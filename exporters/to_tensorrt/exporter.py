"""Exporter of TensorRT and TensorRT-RTX engines from typed ONNX, each with a JSON sidecar. Building needs no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dfadc.errors import ExportFailed, RequirementMissing
from dfadc.storage import atomic_write, sha256_file, write_json
from exporters.exporter import BuildSettings, Capability, ExportRequest, ExportResult, Precision
from exporters.sessions.cuda_memory import has_cuda_driver
from exporters.sessions.tensorrt_session import SIDECAR_SCHEMA, TENSORRT, TENSORRT_RTX, Backend, sidecar_path
from exporters.to_onnx.file import METADATA_PREFIX, load_onnx, read_metadata
from exporters.to_tensorrt.api import ParsedNetwork, TensorRtApi

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx


class TensorRtExporter:
    """Builds engines with one of the two packages, which is never replaced by the other one."""

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self._backend = backend

    def capability(self) -> Capability:
        """RTX builds without a GPU, full TensorRT for the GPU of this machine; running always needs a GPU."""
        try:
            api = TensorRtApi(self._backend)
        except RequirementMissing as exc:
            return Capability(can_build=False, can_run=False, reason=exc.message, install=exc.hint)
        gpu = cuda_gpu()
        can_build = gpu is not None or api.chooses_gpus
        reason = ""
        if gpu is None:
            reason = f"{self.name} engines run on an NVIDIA GPU, and there is none here"
        elif not api.runs_on(gpu.capability):
            reason = f"{self.name} does not run on {gpu.name} (compute capability {'.'.join(map(str, gpu.capability))})"
        return Capability(can_build=can_build, can_run=not reason, version=api.version, reason=reason)

    def check(self, settings: BuildSettings) -> None:
        """Refuses GPUs that are unknown, or any where engines are built for the GPU of this machine only."""
        TensorRtApi(self._backend).check_gpus([gpu.lower() for gpu in settings.gpus])

    def export(self, source_onnx: Path, target: Path, request: ExportRequest, settings: BuildSettings) -> ExportResult:
        """Builds an engine and writes it beside its sidecar. See :meth:`Exporter.export`."""
        api = TensorRtApi(self._backend)
        gpus = tuple(gpu.lower() for gpu in settings.gpus)
        api.check_gpus(gpus)
        source = load_onnx(source_onnx)
        metadata = read_metadata(source)
        network = ParsedNetwork(api, _with_fixed_size(source, metadata) or source_onnx.read_bytes())
        census = network.dtype_census()
        effective = effective_precision(census, request.precision)
        engine = network.build(
            settings.batch, gpus=gpus, workspace_bytes=settings.workspace_bytes, on_progress=settings.on_progress
        )
        result = ExportResult(
            path=target,
            request=request,
            effective_precision=effective,
            sha256=hashlib.sha256(engine).hexdigest(),
            size_bytes=len(engine),
            parent_sha256=sha256_file(source_onnx),
            tool_versions={self._backend.module_name: api.version},
            targets=gpus,
            extra_files=(sidecar_path(target),),
            notes=_notes(self._backend, request, gpus),
        )
        with atomic_write(target) as temporary:
            temporary.write_bytes(engine)
            write_json(sidecar_path(target), _sidecar(result, settings, census, metadata))
        return result


def _with_fixed_size(source: onnx.ModelProto, metadata: Mapping[str, str]) -> bytes:
    """A dynamic-size graph with the contract's size, as bytes; empty if the graph has a fixed size already."""
    if metadata.get(f"{METADATA_PREFIX}size") != "dynamic":
        return b""
    sides = json.loads(metadata[f"{METADATA_PREFIX}contract"])["input_size"][1:]
    for axis, side in zip(source.graph.input[0].type.tensor_type.shape.dim[2:], sides, strict=True):
        axis.dim_value = side
    data: bytes = source.SerializeToString()
    return data


#: The exporters called ``tensorrt`` and ``tensorrt-rtx``.
full_tensorrt = partial(TensorRtExporter, TENSORRT)
tensorrt_rtx = partial(TensorRtExporter, TENSORRT_RTX)


class Gpu(NamedTuple):
    """A CUDA GPU: its name and its compute capability, e.g. (8, 6)."""

    name: str
    capability: tuple[int, int]


def cuda_gpu() -> Gpu | None:
    """The first CUDA GPU as torch sees it; None without torch or a GPU."""
    if importlib.util.find_spec("torch") is None or not has_cuda_driver():
        return None
    import torch  # noqa: PLC0415 - building needs no torch

    if not torch.cuda.is_available():
        return None
    return Gpu(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0))


def effective_precision(census: Mapping[str, int], requested: Precision) -> str:
    """Precision in which the weighted layers of a parsed network compute.

    Raises:
        ExportFailed: it is not the requested one. An fp32 engine with a name that says fp16 is worse than none.
    """
    layers = ", ".join(f"{count} {dtype}" for dtype, count in census.items()) or "no weighted layers"
    half, single, quantising = census.get("half", 0), census.get("float", 0), census.get("quantize", 0)
    fits = {
        Precision.FP32: not quantising and set(census) <= {"float"},
        Precision.FP16: not quantising and half > 0 and set(census) <= {"float", "half"},
        Precision.INT8: quantising > 0,
    }
    if not fits[requested]:
        raise ExportFailed(
            f"the graph is not {requested}: its layers are {layers}",
            f"build from the onnx:{requested} of the same student",
        )
    if requested is Precision.FP16 and single:
        return f"fp16, {single} of {single + half} weighted layers in fp32"
    return str(requested)


def _notes(backend: Backend, request: ExportRequest, gpus: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    if backend.name == TENSORRT_RTX.name:
        notes.append("loads in the same TensorRT-RTX release only")
        if not gpus:
            notes.append("built for Ampere and newer RTX GPUs")
        if request.precision is Precision.INT8:
            notes.append("experimental: TensorRT-RTX documents INT8 for weight-only matrix products")
    return tuple(notes)


def _sidecar(
    result: ExportResult, settings: BuildSettings, census: Mapping[str, int], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Content of the sidecar: what a session checks before it loads native code, and facts for `dfadc inspect`."""
    return {
        "schema": SIDECAR_SCHEMA,
        "file": result.path.name,
        "sha256": result.sha256,
        "parent_sha256": result.parent_sha256,
        "exporter": result.request.name,
        "versions": dict(result.tool_versions),
        "precision": str(result.request.precision),
        "effective_precision": result.effective_precision,
        "layer_dtypes": dict(census),
        "batch": [settings.batch.lowest, settings.batch.optimum, settings.batch.highest],
        "gpus": list(result.targets),
        "metadata": dict(metadata),
    }
