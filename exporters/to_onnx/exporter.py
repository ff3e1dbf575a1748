"""Exporter of fp16 and INT8 ONNX files, derived from the fp32 one. Free of torch."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import onnxruntime

from dfadc.errors import DfadcError
from dfadc.provenance import installed
from dfadc.storage import atomic_write_bytes, sha256_file
from exporters.exporter import (
    KEEP_FP32_AUTO,
    BuildSettings,
    Capability,
    ExportRequest,
    ExportResult,
    PoolUnusable,
    Precision,
)
from exporters.to_onnx.file import load_onnx, to_checked_bytes, with_metadata
from exporters.to_onnx.fp16 import check_no_overflow, convert_to_fp16
from exporters.to_onnx.int8.quantise import Quantised, quantise
from exporters.to_onnx.int8.sensitivity import has_recovered

if TYPE_CHECKING:
    from pathlib import Path

    import onnx


class DerivedOnnxExporter:
    """Makes ``onnx:fp16`` and ``onnx:int8`` from ``onnx:fp32``, which itself comes from a torch module."""

    name = "onnx"

    def capability(self) -> Capability:
        """Always builds and runs: ONNX Runtime is a dependency of dfadc."""
        return Capability(can_build=True, can_run=True, version=onnxruntime.__version__)

    def check(self, settings: BuildSettings) -> None:
        """No setting depends on the machine."""

    def export(self, source_onnx: Path, target: Path, request: ExportRequest, settings: BuildSettings) -> ExportResult:
        """Derives ``target`` from the fp32 ONNX; see :meth:`Exporter.export`.

        ``settings.calibration`` calibrates INT8, which raises PoolUnusable without it, and selects the nodes that fp16
        leaves in fp32; within ``settings.fp16_ranges`` fp16 must not overflow.
        """
        source = load_onnx(source_onnx)
        parent = sha256_file(source_onnx)
        if request.precision is Precision.FP32:
            raise DfadcError("onnx:fp32 is exported from the torch student", "use export_onnx(module, path, ...)")
        model, effective, notes = _derive(source, request, settings)
        with_metadata(model, {"precision": str(request.precision), "parent_sha256": parent})
        data = to_checked_bytes(model, target.name)
        atomic_write_bytes(target, data)
        return ExportResult(
            path=target,
            request=request,
            effective_precision=effective,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            parent_sha256=parent,
            tool_versions=installed(("onnx", "onnxruntime", "onnx-ir")),
            notes=notes,
        )


def _derive(
    source: onnx.ModelProto, request: ExportRequest, settings: BuildSettings
) -> tuple[onnx.ModelProto, str, tuple[str, ...]]:
    """The derived graph, its effective precision, and notes for the report."""
    if request.precision is Precision.FP16:
        converted = convert_to_fp16(
            source, images=settings.calibration, keep_fp32=set(settings.keep_fp32 or ()) - {KEEP_FP32_AUTO}
        )
        kept = converted.fp32_nodes
        if settings.fp16_ranges is not None:
            check_no_overflow(settings.fp16_ranges, kept)
        effective = f"fp16, {len(kept)} nodes in fp32" if kept else "fp16"
        return converted.model, effective, (f"kept in fp32: {', '.join(kept)}",) if kept else ()
    if settings.calibration is None:
        raise PoolUnusable(f"{request} needs calibration images", "a finished run has them in calibration.npz")
    keep_fp32 = (KEEP_FP32_AUTO,) if settings.keep_fp32 is None else settings.keep_fp32
    quantised = quantise(
        source,
        settings.calibration,
        preset=request.preset,
        calibrator=settings.calibrator,
        keep_fp32=keep_fp32,
        on_progress=settings.on_progress,
    )
    effective = f"int8, {len(quantised.kept)} nodes in fp32" if quantised.kept else "int8"
    return quantised.model, effective, _int8_notes(quantised, len(settings.calibration))


def _int8_notes(quantised: Quantised, num_images: int) -> tuple[str, ...]:
    """Notes for the report: calibrator, agreement with fp32, layers in fp32, and the layers that lose most."""
    agreement, num_held_out = quantised.held_out, quantised.num_held_out
    pixels = "" if agreement.n == num_held_out else f"{agreement.n:,} pixels of "
    measured = f"{agreement.agreement:.3f}, SQNR {agreement.sqnr_db:.1f} dB"
    notes = [
        f"calibrator {quantised.calibrator}, {num_images - num_held_out} images",
        f"agreement with fp32 on {pixels}{num_held_out} held-out images: {measured}",
    ]
    if quantised.kept:
        notes.append(f"kept in fp32: {', '.join(quantised.kept)}")
    if (before := quantised.all_int8) is not None:
        notes.append(f"agreement before layers were kept: {before.agreement:.3f}, SQNR {before.sqnr_db:.1f} dB")
    if quantised.worst:
        layers = ", ".join(
            f"{layer.name} ({layer.alone_in_fp32.agreement:.3f}, {layer.alone_in_fp32.sqnr_db:.1f} dB without it)"
            for layer in quantised.worst
        )
        notes.append(f"agreement fell; the layers that INT8 hurts most: {layers}")
    elif not has_recovered(agreement):
        notes.append("agreement fell; --keep-fp32 auto keeps the fewest layers in fp32 that bring it back")
    return tuple(notes)
