"""Export stage: artifacts of the finished student, recorded in the run's manifest."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError, ExportFailed, OutOfMemory, StorageFailed, memory_errors
from dfadc.pipeline.export_inputs import ExportInputs, Form, form_of, reusable_sources
from dfadc.pipeline.export_plan import KIT, Skipped, derived_onnx, plan_exports
from dfadc.pipeline.gates import gate_thresholds
from dfadc.pipeline.lineage import check_lineage, check_student
from dfadc.recipe.load import load_recipe
from dfadc.run_lock import holding_run
from exporters.exporter import BuildSettings, ExportRequest, ExportResult, PoolUnusable, Precision, ignore
from exporters.kit.write import FOLDER, write_kit
from exporters.manifest import FILE_NAME, ArtifactRecord, DamagedManifest, Manifest, check_record, restored_on_failure
from exporters.registry import get_exporter
from exporters.sessions.open import check_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from dfadc.run_folder import RunFolder

_LESS_MEMORY = "free some; runs with lower verify.num_samples and calibration.num_images need less here"


@dataclass(frozen=True)
class ExportObserver:
    """Callbacks of an export.

    Args:
        on_result: called after each artifact.
        on_skipped: called for each export that is not made: defaults that cannot be made here, and failures.
        on_kit: called with the folder of the device kit.
    """

    on_result: Callable[[ExportResult], None] = ignore
    on_skipped: Callable[[Skipped], None] = ignore
    on_kit: Callable[[Path], None] = ignore


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

    A failed export stops only the exports that are made from it.

    Args:
        run: a finished run.
        exports: each ``NAME[:PRECISION[:PRESET]]`` or ``kit``; their sources are exported too, unless they exist and no
            setting changes them. None makes the exports of :data:`~dfadc.pipeline.export_plan.DEFAULT_EXPORTS` and
            reports those that cannot be made to the observer.
        embed_normalisation: artifacts take pixels in [0, 1] and normalise them themselves.
        embed_softmax: artifacts return probabilities.
        dynamic_size: artifacts of a segmentation student take images of any height and width; an engine keeps the
            contract's.
        factories: the student's ``module:factory``, where one has to be imported; the run folder alone may not.
        settings: of the build, such as target GPUs. Calibration images are those of the run by default.
        observer: called for every artifact.

    Raises:
        DfadcError: unknown export, a setting that applies to none of them, another student than the samples record (2),
            missing backend (4), storage (7).
        ExportFailed: exports failed (5); the message names each of them with its reason. If all of them failed with
            one class of error, the error is of that class.
    """
    run.require_finished()
    observer, settings = observer or ExportObserver(), settings or BuildSettings()
    plan = plan_exports(exports, settings)
    check_student(run)
    manifest = _usable_manifest(run)
    form = Form(embed_normalisation, embed_softmax, dynamic_size)
    reused = () if exports is None or any(form) else reusable_sources(run, manifest, settings, exports)
    if reused:
        form = form_of(run.artifacts / reused[0].file_name)
    requests = [request for request in plan.requests if request not in reused]
    inputs = ExportInputs(run, form, factories)
    if settings.calibration is None and derived_onnx(requests):
        settings = replace(settings, calibration=inputs.calibration_images())
    for skipped in plan.skipped:
        observer.on_skipped(skipped)
    artifacts = _Artifacts(run, manifest, observer)
    for request in requests:
        artifacts.add(request, inputs, settings)
    if plan.kit:
        artifacts.add_kit(settings)
    # Of the defaults, INT8 may be missing if it cannot be calibrated: it was not requested by name.
    artifacts.raise_failures(tolerated=PoolUnusable if exports is None else None)
    return artifacts.results


@dataclass
class _Artifacts:
    """Makes artifacts one after the other and keeps results, the manifest and failures."""

    _run: RunFolder
    _manifest: Manifest
    _observer: ExportObserver
    results: list[ExportResult] = field(default_factory=list)
    _failures: dict[str, DfadcError] = field(default_factory=dict)

    def add(self, request: ExportRequest, inputs: ExportInputs, settings: BuildSettings) -> None:
        """Makes an artifact and records it; if that fails, the earlier artifact is restored."""
        run = self._run
        earlier = self._manifest.find((run.artifacts / request.file_name).relative_to(run.path).as_posix())
        with self._collecting(str(request)):
            if (cause := self._failures.get(str(request.source))) is not None:
                raise type(cause)(f"it is made of {request.source}, which failed")
            with restored_on_failure(run.path, earlier):
                result = _annotated(_make(request, run, inputs, settings), earlier)
                _check_runs(result, run)
                # Another export of the run may have written the manifest in the meantime.
                manifest = _usable_manifest(run).add(ArtifactRecord.from_result(result, run.path))
                manifest.write(run.path)
            self._manifest = manifest
            self.results.append(result)
            self._observer.on_result(result)

    def add_kit(self, settings: BuildSettings) -> None:
        """Writes the device kit: typed ONNX files that TensorRT parses, samples and gates in ``artifacts/kit``."""
        run = self._run
        with self._collecting(KIT):
            onnx = (record for record in self._manifest.artifacts if record.exporter == "onnx")
            records = [record for record in onnx if record.preset in ("", "portable")]
            for record in records:
                check_record(record, run.path)
            check_lineage(run, Manifest(tuple(records)))
            thresholds = asdict(gate_thresholds(load_recipe(run.recipe)))
            models = [run.path / record.file for record in records]
            folder = run.artifacts / FOLDER
            self._observer.on_kit(write_kit(folder, models, run.samples, thresholds=thresholds, batch=settings.batch))

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
        """Keeps an error of the block for the end. A full disk ends the export: the next file would meet it too."""
        try:
            with memory_errors(_LESS_MEMORY):
                yield
        except DfadcError as exc:
            self._failures[name] = exc
            if isinstance(exc, StorageFailed):
                raise _joined(self._failures) from exc
            self._observer.on_skipped(Skipped(name, exc.message, exc.hint))


def _joined(failures: Mapping[str, DfadcError]) -> DfadcError:
    """One error for all failed exports: of their class, or ExportFailed if they have several."""
    errors = list(failures.values())
    kinds = {type(error) for error in errors}
    kind = next((grave for grave in (StorageFailed, OutOfMemory) if grave in kinds), ExportFailed)
    hints = dict.fromkeys(error.hint for error in errors if error.hint)
    message = "; ".join(f"{name}: {error.message}" for name, error in failures.items())
    return (kinds.pop() if len(kinds) == 1 else kind)(message, "; ".join(hints))


def _usable_manifest(run: RunFolder) -> Manifest:
    """The run's manifest as it is now; empty if it is missing or damaged: it is then replaced."""
    try:
        return Manifest.read(run.path) if (run.path / FILE_NAME).exists() else Manifest()
    except DamagedManifest:
        return Manifest()


def _make(request: ExportRequest, run: RunFolder, inputs: ExportInputs, settings: BuildSettings) -> ExportResult:
    """Makes one artifact from its source artifact or, the fp32 ONNX, from the student."""
    target = run.artifacts / request.file_name
    if request.source is None:
        return inputs.export_fp32(target)
    headroom: tuple[str, ...] = ()
    if request.precision is Precision.FP16:
        ranges = settings.fp16_ranges or inputs.fp16_ranges
        headroom = (str(ranges),)
        settings = replace(settings, fp16_ranges=ranges)
    source = run.artifacts / request.source.file_name
    result = get_exporter(request.name).export(source, target, request, settings)
    return replace(result, notes=(*result.notes, *headroom))


def _annotated(result: ExportResult, earlier: ArtifactRecord | None) -> ExportResult:
    """``result`` with a note if it replaces an engine for other GPUs."""
    if earlier is None or earlier.targets == result.targets:
        return result
    before = ", ".join(earlier.targets) or "Ampere and newer"
    note = f"replaces the engine for {before}; one engine can serve several: --gpu sm86,sm89"
    return replace(result, notes=(*result.notes, note))


def _check_runs(result: ExportResult, run: RunFolder) -> None:
    """Removes and refuses an artifact that does not run although its runtime is here; the fp32 ONNX was run already."""
    if result.request.source is None:
        return
    try:
        check_runs(result.path, run.contract().input_size)
    except ExportFailed:
        for path in (result.path, *result.extra_files):
            path.unlink(missing_ok=True)
        raise
