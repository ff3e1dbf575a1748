"""Stage three: the finished student as files that other runtimes take."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from dfadc.errors import DfadcError, ExportFailed, OutOfMemory, RequirementMissing, StorageFailed, memory_errors
from dfadc.networks.logits import answering_pixels
from dfadc.networks.network_file import load_network
from dfadc.pipeline.kit import write_device_kit
from dfadc.pipeline.provenance import check_student
from dfadc.run_lock import holding_run
from dfadc.sampling.calibration import load_images
from dfadc.storage import sha256_file
from dfadc.verification.pixel_outputs import batch_size
from dfadc.verification.pixel_samples import load_samples
from dfadc.verification.stored_images import dequantise, to_pixels
from exporters.describe import artifact_metadata
from exporters.exporter import (
    BatchProfile,
    BuildSettings,
    ExportRequest,
    ExportResult,
    PoolUnusable,
    Precision,
    with_sources,
)
from exporters.manifest import (
    FILE_NAME,
    ArtifactRecord,
    DamagedManifest,
    Manifest,
    check_record,
    restored_on_failure,
)
from exporters.registry import get_exporter
from exporters.sessions.engines import check_runs
from exporters.to_onnx.fp32 import export_onnx
from exporters.to_onnx.ranges import measure_headroom

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from dfadc.networks.network_file import NetworkMetadata
    from dfadc.run_folder import RunFolder
    from exporters.to_onnx.ranges import Headroom

    LoadStudent = Callable[[], tuple[nn.Module, NetworkMetadata]]

#: The export that is a folder: every typed ONNX of the run, with samples and a check to carry to a device.
KIT = "kit"
#: What a run is exported to where nothing is said; an engine only where its backend can build it.
#: Engines are made in fp16: half the bytes of fp32, and neither calibration nor a search behind them.
DEFAULT_EXPORTS = ("onnx", "onnx:fp16", "onnx:int8", "openvino:fp16", "tensorrt-rtx:fp16", "tensorrt:fp16")


#: Samples on which the fp16 headroom is measured at once.
_HEADROOM_BATCH = 64


class Skipped(NamedTuple):
    """An export that is not made, the reason, and what would change that (empty where nothing can)."""

    export: str
    reason: str
    hint: str


class ExportPlan(NamedTuple):
    """What will be exported, sources first; what of the defaults cannot be; whether a device kit follows."""

    requests: tuple[ExportRequest, ...]
    skipped: tuple[Skipped, ...] = ()
    kit: bool = False


class _Form(NamedTuple):
    """What artifacts take and answer: pixels in [0, 1] that they normalise themselves, probabilities, any size."""

    normalises: bool
    softmax: bool
    dynamic_size: bool


def _ignore(_: object) -> None:
    """The default observer."""


@dataclass(frozen=True)
class ExportObserver:
    """Who is told what while artifacts are made.

    Args:
        on_result: called after each artifact.
        on_skipped: called for each export that is not made: what of the defaults cannot be, and what failed.
        on_kit: called with the folder of the device kit.
    """

    on_result: Callable[[ExportResult], None] = _ignore
    on_skipped: Callable[[Skipped], None] = _ignore
    on_kit: Callable[[Path], None] = _ignore


_LESS_MEMORY = "free some; runs with lower verify.num_samples and calibration.num_images need less here"


@memory_errors(_LESS_MEMORY)
@holding_run
def export_student(
    run: RunFolder,
    exports: Sequence[str] | None = None,
    *,
    embed_normalisation: bool = False,
    embed_softmax: bool = False,
    dynamic_size: bool = False,
    factories: Collection[str] = (),
    settings: BuildSettings | None = None,
    observer: ExportObserver | None = None,
) -> list[ExportResult]:
    """Exports the finished student into the run's ``artifacts`` folder and records each artifact in the manifest.

    An export that fails does not keep those from being made that are not made of it.

    Args:
        run: a finished run.
        exports: each ``NAME[:PRECISION[:PRESET]]`` or ``kit``; what one is made of is exported too, unless it is there
            already and no setting is to change it. None makes what :data:`DEFAULT_EXPORTS` lists and tells the observer
            what of it cannot be made.
        embed_normalisation: artifacts take pixels in [0, 1] and normalise them themselves.
        embed_softmax: artifacts answer probabilities.
        dynamic_size: artifacts of a segmentation student take images of any height and width; an engine keeps the
            contract's.
        factories: the student's ``module:factory``, where one has to be imported; the run folder alone may not.
        settings: what a build needs besides, such as target GPUs. Calibration images are those of the run unless given.
        observer: told about every artifact.

    Raises:
        DfadcError: unknown export or setting that concerns none of them, another student than the samples record (2),
            missing backend (4), storage (7).
        ExportFailed: exports failed (5); the message names each of them with its reason. Where all of them failed for
            one kind of reason, the error is of that kind.
    """
    run.require_finished()
    observer = observer or ExportObserver()
    settings = settings or BuildSettings()
    plan = plan_exports(exports, settings)
    form = _Form(embed_normalisation, embed_softmax, dynamic_size)
    check_student(run)
    manifest = _usable_manifest(run)
    kept = () if exports is None or any(form) else _sources_to_keep(run, manifest, settings, exports)
    if kept:
        form = _form_of(run.artifacts / kept[0].file_name)
    requests = [request for request in plan.requests if request not in kept]
    settings = _with_calibration(settings, run, requests, pixels=form.normalises)
    load_student = partial(_load_student, run, factories)
    settings, headroom = _with_verification(settings, run, requests, load_student, pixels=form.normalises)
    for skipped in plan.skipped:
        observer.on_skipped(skipped)

    def make(request: ExportRequest, earlier: ArtifactRecord | None) -> ExportResult:
        return _annotated(_make(request, run, settings, form, load_student), earlier, headroom)

    making = _Making(run, manifest, observer)
    for request in requests:
        making.add(request, make)
    if plan.kit:
        making.add_kit(settings.batch)
    # Of the defaults, INT8 may stay away where it cannot be calibrated: nobody asked for it by name.
    making.raise_failures(tolerated=PoolUnusable if exports is None else None)
    return making.results


class _Making:
    """Artifacts that are made one after the other: results, the manifest, and what failed.

    Args:
        run: the run.
        manifest: of the run, so far.
        observer: told about every artifact and every failure.
    """

    def __init__(self, run: RunFolder, manifest: Manifest, observer: ExportObserver) -> None:
        self.results: list[ExportResult] = []
        self._run = run
        self._manifest = manifest
        self._observer = observer
        self._failures: dict[str, DfadcError] = {}

    def add(self, request: ExportRequest, make: Callable[[ExportRequest, ArtifactRecord | None], ExportResult]) -> None:
        """Makes an artifact and records it; where that fails, what was there before is there again."""
        run = self._run
        earlier = self._manifest.find((run.artifacts / request.file_name).relative_to(run.path).as_posix())
        with self._collecting(str(request)):
            if (cause := self._failures.get(str(request.source))) is not None:
                raise type(cause)(f"it is made of {request.source}, which failed")
            with restored_on_failure(run.path, earlier):
                result = make(request, earlier)
                _check_runs(result, run)
                # Another export of the run may have written it meanwhile.
                manifest = _usable_manifest(run).add(ArtifactRecord.from_result(result, run.path))
                manifest.write(run.path)
            self._manifest = manifest
            self.results.append(result)
            self._observer.on_result(result)

    def add_kit(self, batch: BatchProfile) -> None:
        """Writes the device kit of the typed ONNX files that are there."""
        with self._collecting(KIT):
            self._observer.on_kit(write_device_kit(self._run, self._manifest, batch))

    def raise_failures(self, tolerated: type[DfadcError] | None = None) -> None:
        """Raises one error that names every failure, unless all are tolerated."""
        failures = {
            name: error
            for name, error in self._failures.items()
            if tolerated is None or not isinstance(error, tolerated)
        }
        if failures:
            raise _joined(failures)

    @contextmanager
    def _collecting(self, name: str) -> Iterator[None]:
        """Keeps an error of the block for the end. A full disk ends everything at once: the next file would meet it."""
        try:
            with memory_errors(_LESS_MEMORY):
                yield
        except DfadcError as exc:
            self._failures[name] = exc
            if isinstance(exc, StorageFailed):
                raise _joined(self._failures) from exc
            self._observer.on_skipped(Skipped(name, exc.message, exc.hint))


def _joined(failures: Mapping[str, DfadcError]) -> DfadcError:
    """One error for all exports that failed: of their kind, or ExportFailed where they are of several."""
    errors = list(failures.values())
    kinds = {type(error) for error in errors}
    kind = next((grave for grave in (StorageFailed, OutOfMemory) if grave in kinds), ExportFailed)
    hints = dict.fromkeys(error.hint for error in errors if error.hint)
    message = "; ".join(f"{name}: {error.message}" for name, error in failures.items())
    return (kinds.pop() if len(kinds) == 1 else kind)(message, "; ".join(hints))


def plan_exports(exports: Sequence[str] | None = None, settings: BuildSettings | None = None) -> ExportPlan:
    """What will be exported, in order. What a person names must be possible here; of the defaults, what is possible.

    Raises:
        DfadcError: an export is unknown, or a setting concerns none of them.
        RequirementMissing: the backend of a named export cannot build here.
    """
    plan = _plan(exports)
    _check_settings_matter(settings or BuildSettings(), plan)
    return plan


def _plan(exports: Sequence[str] | None) -> ExportPlan:
    if exports is not None:
        named = [export for export in exports if export != KIT]
        # A kit alone takes the typed files that are there; where there are none, it needs the fp32 one at least.
        requests = with_sources(map(ExportRequest.parse, named or ["onnx"]))
        for request in requests:
            if (missing := _what_is_missing(request)) is not None:
                raise RequirementMissing(f"cannot build {request} here: {missing.reason}", missing.hint)
        return ExportPlan(requests, kit=KIT in exports)
    wanted = [ExportRequest.parse(export) for export in DEFAULT_EXPORTS]
    found = [_what_is_missing(request) for request in wanted]
    possible = [request for request, missing in zip(wanted, found, strict=True) if missing is None]
    return ExportPlan(with_sources(possible), tuple(missing for missing in found if missing is not None))


def _usable_manifest(run: RunFolder) -> Manifest:
    """The run's manifest as it is now; an empty one where there is none or a damaged one, which is then replaced."""
    try:
        return Manifest.read(run.path) if (run.path / FILE_NAME).exists() else Manifest()
    except DamagedManifest:
        return Manifest()


def _what_is_missing(request: ExportRequest) -> Skipped | None:
    """Why the backend of ``request`` cannot build here; None where it can."""
    if request.source is None:  # torch makes the fp32 ONNX
        return None
    capability = get_exporter(request.name).capability()
    return None if capability.can_build else Skipped(str(request), capability.reason, capability.install)


def _check_settings_matter(settings: BuildSettings, plan: ExportPlan) -> None:
    """A setting that would be taken and ignored is an error, and so is one that a backend cannot take."""
    engines = [request for request in plan.requests if request.name.startswith("tensorrt")]
    derived = _derived_onnx(plan.requests)
    for name, given, concerned, needs in (
        ("target GPUs", settings.gpus, engines, "a tensorrt or tensorrt-rtx export"),
        ("a workspace limit", settings.workspace_bytes is not None, engines, "a tensorrt or tensorrt-rtx export"),
        ("a batch profile", settings.batch != BatchProfile(), engines or plan.kit, "a tensorrt or tensorrt-rtx export"),
        ("nodes to keep in fp32", settings.keep_fp32 is not None, derived, "an fp16 or int8 export"),
    ):
        if given and not concerned:
            raise DfadcError(f"{name} given, and no export that they concern", f"add {needs}, or leave it out")
    for request in engines:
        get_exporter(request.name).check(settings)


def _derived_onnx(requests: Sequence[ExportRequest]) -> list[ExportRequest]:
    """The typed ONNX files that are made of the fp32 one: what looks at images and may keep nodes in fp32."""
    return [request for request in requests if request.name == "onnx" and request.precision is not Precision.FP32]


def _with_calibration(
    settings: BuildSettings, run: RunFolder, requests: Sequence[ExportRequest], *, pixels: bool
) -> BuildSettings:
    """``settings`` with the run's calibration images as the artifacts take them, where an export looks at images."""
    if settings.calibration is not None or not _derived_onnx(requests):
        return settings
    return replace(settings, calibration=_calibration_images(run, pixels=pixels))


def _calibration_images(run: RunFolder, *, pixels: bool) -> NDArray[np.float32] | None:
    """(N, C, H, W) images of ``calibration.npz``: normalised, or pixels in [0, 1]; None where the run kept none."""
    if not run.calibration.exists():
        return None
    contract = run.contract()
    images = dequantise(load_images(run.calibration, input_size=contract.input_size), contract)
    return to_pixels(images, contract) if pixels else images


def _with_verification(
    settings: BuildSettings,
    run: RunFolder,
    requests: Sequence[ExportRequest],
    load_student: LoadStudent,
    *,
    pixels: bool,
) -> tuple[BuildSettings, Headroom | None]:
    """The student's fp16 headroom, where an export is fp16; ``settings`` with the samples where it is small.

    Where activations stay far from fp16's end, the graph need not be looked at node by node.
    """
    if not any(request.precision is Precision.FP16 for request in requests):
        return settings, None
    samples = load_samples(run.samples)
    headroom = measure_headroom(load_student()[0], samples.batches(batch_size(samples.contract, _HEADROOM_BATCH)))
    if headroom.is_small and settings.verification is None:
        images = samples.normalised()
        settings = replace(settings, verification=to_pixels(images, run.contract()) if pixels else images)
    return settings, headroom


def _load_student(run: RunFolder, factories: Collection[str]) -> tuple[nn.Module, NetworkMetadata]:
    module, metadata = load_network(run.student, factories=factories)
    return answering_pixels(module, metadata.contract).eval(), metadata


def _sources_to_keep(
    run: RunFolder, manifest: Manifest, settings: BuildSettings, exports: Sequence[str]
) -> tuple[ExportRequest, ...]:
    """Sources of ``exports`` that nobody asks for by name, and that are there and made of what they should be.

    Made anew they would lose what was chosen for them, such as nodes kept in fp32 or the embedded normalisation.

    Raises:
        DfadcError: the bytes of one are not those that were exported.
    """
    asked = [ExportRequest.parse(export) for export in exports if export != KIT]
    unchosen = BuildSettings()
    chosen = (
        settings.keep_fp32 is not None or settings.calibration is not None or settings.calibrator != unchosen.calibrator
    )
    kept: list[ExportRequest] = []
    for request in with_sources(asked or [ExportRequest("onnx")]):
        path = run.artifacts / request.file_name
        record = manifest.find(path.relative_to(run.path).as_posix())
        if request in asked or record is None or not path.exists() or (chosen and request.source is not None):
            continue
        check_record(record, run.path)
        source = run.student if request.source is None else run.artifacts / request.source.file_name
        made_of = artifact_metadata(path).get("dfadc.parent_sha256")
        if request.source in (None, *kept) and made_of == sha256_file(source):
            kept.append(request)
    return tuple(kept)


def _form_of(onnx: Path) -> _Form:
    """What an ONNX that is there takes and answers."""
    metadata = artifact_metadata(onnx)
    return _Form(
        metadata["dfadc.input"].startswith("pixels"),
        metadata["dfadc.output"] == "probabilities",
        metadata.get("dfadc.size") == "dynamic",
    )


def _make(
    request: ExportRequest, run: RunFolder, settings: BuildSettings, form: _Form, load_student: LoadStudent
) -> ExportResult:
    """One artifact, of the artifact that it is made of or, the fp32 ONNX, of the student."""
    target = run.artifacts / request.file_name
    if request.source is None:
        return _export_fp32(run, target, form, load_student)
    return get_exporter(request.name).export(run.artifacts / request.source.file_name, target, request, settings)


def _check_runs(result: ExportResult, run: RunFolder) -> None:
    """Removes the files of an artifact that does not run here although its runtime is; the fp32 ONNX was run already.

    Raises:
        ExportFailed: that happened.
    """
    if result.request.source is None:
        return
    try:
        check_runs(result.path, run.contract().input_size)
    except ExportFailed:
        for path in (result.path, *result.extra_files):
            path.unlink(missing_ok=True)
        raise


def _annotated(result: ExportResult, earlier: ArtifactRecord | None, headroom: Headroom | None) -> ExportResult:
    """``result`` with notes on what its exporter does not know: the student's headroom, and what it replaced."""
    notes = [*result.notes]
    if result.request.precision is Precision.FP16 and headroom is not None:
        notes.append(str(headroom))
    if earlier is not None and earlier.targets != result.targets:
        before = ", ".join(earlier.targets) or "Ampere and newer"
        notes.append(f"replaces the engine for {before}; one engine can serve several: --gpu sm86,sm89")
    return replace(result, notes=tuple(notes))


def _export_fp32(run: RunFolder, target: Path, form: _Form, load_student: LoadStudent) -> ExportResult:
    student, metadata = load_student()
    return export_onnx(
        student,
        target,
        contract=metadata.contract,
        metadata={
            "architecture": metadata.architecture,
            "stem": metadata.stem,
            "teacher_sha256": run.record()["teacher"]["sha256"],
            "parent_sha256": (student_sha256 := sha256_file(run.student)),
            "student_sha256": student_sha256,  # what is derived of this file has another parent, and keeps this
        },
        embed_normalisation=form.normalises,
        embed_softmax=form.softmax,
        dynamic_size=form.dynamic_size,
    )
