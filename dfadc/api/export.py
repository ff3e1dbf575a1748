"""Stage three: the finished student as files that other runtimes take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfadc.errors import DfadcError, RequirementMissing
from dfadc.models.network_file import load_network
from dfadc.storage import sha256_file
from exporters.base import BuildSettings, ExportRequest, ExportResult, with_sources
from exporters.manifest import FILE_NAME, ArtifactRecord, Manifest
from exporters.onnx_exporter import export_onnx
from exporters.registry import get_exporter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dfadc.run import RunFolder


def export_student(
    run: RunFolder,
    exports: Sequence[str] = ("onnx",),
    *,
    embed_normalisation: bool = False,
    embed_softmax: bool = False,
    settings: BuildSettings | None = None,
) -> list[ExportResult]:
    """Exports the finished student into the run's ``artifacts`` folder and records each artifact in the manifest.

    Args:
        run: a finished run.
        exports: each ``NAME[:PRECISION[:PRESET]]``; what one is made of is exported too.
        embed_normalisation: artifacts take pixels in [0, 1] and normalise them themselves.
        embed_softmax: artifacts answer probabilities.
        settings: what a build needs besides, such as calibration images or target GPUs.

    Raises:
        DfadcError: unknown export (2), missing backend (4), failed export (5), storage (7).
    """
    run.require_finished()
    requests = check_exports(exports)
    manifest = Manifest.read(run.path) if (run.path / FILE_NAME).exists() else Manifest()
    results = []
    for request in requests:
        target = run.artifacts / request.file_name
        if request.source is None:
            embed = {"embed_normalisation": embed_normalisation, "embed_softmax": embed_softmax}
            result = _export_fp32(run, target, **embed)
        else:
            source = run.artifacts / request.source.file_name
            result = get_exporter(request.name).export(source, target, request, settings or BuildSettings())
        manifest = manifest.add(ArtifactRecord.from_result(result, run.path))
        manifest.write(run.path)
        results.append(result)
    return results


def check_exports(exports: Sequence[str]) -> list[ExportRequest]:
    """What will be exported, in order; every backend that it takes is here.

    Raises:
        DfadcError: an export is unknown or not part of this version.
        RequirementMissing: a backend is not installed.
    """
    requests = list(with_sources(ExportRequest.parse(export) for export in exports))
    for request in requests:
        _require_backend(request)
    return requests


def _export_fp32(run: RunFolder, target: Path, *, embed_normalisation: bool, embed_softmax: bool) -> ExportResult:
    record = run.record()
    # The run says itself what its student is, so a factory of the user's may be imported again, as in a resume.
    student, metadata = load_network(run.student, architecture=record["student"]["architecture"])
    return export_onnx(
        student,
        target,
        contract=metadata.contract,
        metadata={
            "architecture": metadata.architecture,
            "stem": metadata.stem,
            "teacher_sha256": record["teacher"]["sha256"],
            "parent_sha256": sha256_file(run.student),
        },
        embed_normalisation=embed_normalisation,
        embed_softmax=embed_softmax,
    )


def _require_backend(request: ExportRequest) -> None:
    if request.source is None:
        return
    try:
        capability = get_exporter(request.name).capability()
    except ImportError as exc:
        raise DfadcError(f"export {request} is not part of this version") from exc
    if not capability.can_build:
        raise RequirementMissing(f"cannot build {request} here: {capability.reason}", capability.install)
