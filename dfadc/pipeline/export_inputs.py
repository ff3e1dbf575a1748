"""Inputs of an export from the run folder: the student, calibration images, fp16 ranges, and artifacts to keep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from dfadc.networks.logits import answering_pixels
from dfadc.networks.network_file import load_network
from dfadc.pipeline.export_plan import KIT
from dfadc.sampling.calibration import load_images
from dfadc.storage import sha256_file
from dfadc.verification.pixel_samples import load_samples
from dfadc.verification.stored_images import dequantise, to_pixels
from exporters.describe import artifact_metadata
from exporters.exporter import BuildSettings, ExportRequest, ExportResult, with_sources
from exporters.manifest import check_record
from exporters.to_onnx.file import load_onnx
from exporters.to_onnx.fp32 import export_onnx
from exporters.to_onnx.ranges import measure_activations

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from dfadc.run_folder import RunFolder
    from exporters.manifest import Manifest
    from exporters.to_onnx.ranges import ActivationRanges

#: Samples that are dequantised at once.
_BATCH_SIZE = 64


class Form(NamedTuple):
    """Inputs and outputs of artifacts: pixels in [0, 1] that they normalise themselves, probabilities, any size."""

    normalises: bool = False
    softmax: bool = False
    dynamic_size: bool = False


@dataclass
class ExportInputs:
    """Inputs of all exports of a finished run; ``factories`` hold the student's where one has to be imported."""

    _run: RunFolder
    _form: Form
    _factories: Collection[str] = ()

    def export_fp32(self, target: Path) -> ExportResult:
        """Writes the fp32 ONNX of the student."""
        student, metadata = load_network(self._run.student, factories=self._factories)
        student_sha256 = sha256_file(self._run.student)
        return export_onnx(
            answering_pixels(student, metadata.contract).eval(),
            target,
            contract=metadata.contract,
            metadata={
                "architecture": metadata.architecture,
                "stem": metadata.stem,
                "teacher_sha256": self._run.record()["teacher"]["sha256"],
                "parent_sha256": student_sha256,
                "student_sha256": student_sha256,  # derived files have another parent, and keep this
            },
            embed_normalisation=self._form.normalises,
            embed_softmax=self._form.softmax,
            dynamic_size=self._form.dynamic_size,
        )

    def calibration_images(self) -> NDArray[np.float32] | None:
        """(N, C, H, W) images of ``calibration.npz``: normalised, or pixels in [0, 1]; None if the run kept none."""
        if not self._run.calibration.exists():
            return None
        contract = self._run.contract()
        return self._as_input(dequantise(load_images(self._run.calibration, input_size=contract.input_size), contract))

    @cached_property
    def fp16_ranges(self) -> ActivationRanges:
        """Activation ranges of the fp32 ONNX, which must exist, on the verification samples."""
        source = load_onnx(self._run.artifacts / ExportRequest("onnx").file_name)
        batches = load_samples(self._run.samples).batches(_BATCH_SIZE)
        return measure_activations(source, map(self._as_input, batches), threads=0)

    def _as_input(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised images as the artifacts take them."""
        return to_pixels(images, self._run.contract()) if self._form.normalises else images


def reusable_sources(
    run: RunFolder, manifest: Manifest, settings: BuildSettings, exports: Sequence[str]
) -> tuple[ExportRequest, ...]:
    """Sources of ``exports`` that need not be made again: not requested by name, present, and made from the student.

    Made anew they would lose their own options, such as nodes kept in fp32 or the embedded normalisation.

    Raises:
        DfadcError: the bytes of one are not those that were exported.
    """
    named = [ExportRequest.parse(export) for export in exports if export != KIT]
    defaults = BuildSettings()
    has_options = (
        settings.keep_fp32 is not None or settings.calibration is not None or settings.calibrator != defaults.calibrator
    )
    reusable: list[ExportRequest] = []
    for request in with_sources(named or [ExportRequest("onnx")]):
        path = run.artifacts / request.file_name
        record = manifest.find(path.relative_to(run.path).as_posix())
        if request in named or record is None or not path.exists() or (has_options and request.source is not None):
            continue
        check_record(record, run.path)
        source = run.student if request.source is None else run.artifacts / request.source.file_name
        parent = artifact_metadata(path).get("dfadc.parent_sha256")
        if request.source in (None, *reusable) and parent == sha256_file(source):
            reusable.append(request)
    return tuple(reusable)


def form_of(onnx: Path) -> Form:
    """Inputs and outputs of an ONNX file that exists."""
    metadata = artifact_metadata(onnx)
    return Form(
        metadata["dfadc.input"].startswith("pixels"),
        metadata["dfadc.output"] == "probabilities",
        metadata.get("dfadc.size") == "dynamic",
    )
