"""Plan of an export: the artifacts to make, sources first, and the defaults that cannot be made here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dfadc.errors import DfadcError, RequirementMissing
from exporters.exporter import BatchProfile, BuildSettings, ExportRequest, Precision, with_sources
from exporters.registry import get_exporter

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The export that is a folder: every typed ONNX of the run, with samples and a check to carry to a device.
KIT = "kit"
#: Exports of a run without ``--export``; an engine only where its backend can build it.
#: Engines are made in fp16: half the bytes of fp32, without calibration and without a search for layers.
DEFAULT_EXPORTS = ("onnx", "onnx:fp16", "onnx:int8", "openvino:fp16", "tensorrt-rtx:fp16", "tensorrt:fp16")


class Skipped(NamedTuple):
    """An export that is not made, the reason, and the remedy (empty if there is none)."""

    export: str
    reason: str
    hint: str


class ExportPlan(NamedTuple):
    """Artifacts to make, sources first; defaults that cannot be made here; whether a device kit follows."""

    requests: tuple[ExportRequest, ...]
    skipped: tuple[Skipped, ...] = ()
    kit: bool = False


def plan_exports(exports: Sequence[str] | None = None, settings: BuildSettings | None = None) -> ExportPlan:
    """Resolves exports ``NAME[:PRECISION[:PRESET]]`` or ``kit``; None takes :data:`DEFAULT_EXPORTS`.

    A named export must be possible here; of the defaults, those that are possible are taken.

    Raises:
        DfadcError: an export is unknown, or a setting applies to none of them.
        RequirementMissing: the backend of a named export cannot build here.
    """
    if exports is None:
        defaults = [ExportRequest.parse(export) for export in DEFAULT_EXPORTS]
        missing = {request: skipped for request in defaults if (skipped := _missing_backend(request)) is not None}
        possible = [request for request in defaults if request not in missing]
        plan = ExportPlan(with_sources(possible), tuple(missing.values()))
    else:
        named = [export for export in exports if export != KIT]
        # A kit alone takes the typed files that exist; where there are none, it needs the fp32 one at least.
        plan = ExportPlan(with_sources(map(ExportRequest.parse, named or ["onnx"])), kit=KIT in exports)
        for request in plan.requests:
            if (absent := _missing_backend(request)) is not None:
                raise RequirementMissing(f"cannot build {request} here: {absent.reason}", absent.hint)
    _check_settings_apply(settings or BuildSettings(), plan)
    return plan


def derived_onnx(requests: Sequence[ExportRequest]) -> list[ExportRequest]:
    """The fp16 and INT8 ONNX files: those that use calibration images and may keep nodes in fp32."""
    return [request for request in requests if request.name == "onnx" and request.precision is not Precision.FP32]


def _missing_backend(request: ExportRequest) -> Skipped | None:
    """Why the backend of ``request`` cannot build here; None if it can."""
    if request.source is None:  # torch makes the fp32 ONNX
        return None
    capability = get_exporter(request.name).capability()
    return None if capability.can_build else Skipped(str(request), capability.reason, capability.install)


def _check_settings_apply(settings: BuildSettings, plan: ExportPlan) -> None:
    """Refuses a setting that would be ignored, or that a backend does not accept."""
    engines = [request for request in plan.requests if request.name.startswith("tensorrt")]
    engine = "a tensorrt or tensorrt-rtx export"
    for name, given, concerned, needs in (
        ("target GPUs", settings.gpus, engines, engine),
        ("a workspace limit", settings.workspace_bytes is not None, engines, engine),
        ("a batch profile", settings.batch != BatchProfile(), engines or plan.kit, engine),
        (
            "nodes to keep in fp32",
            settings.keep_fp32 is not None,
            derived_onnx(plan.requests),
            "an fp16 or int8 export",
        ),
    ):
        if given and not concerned:
            raise DfadcError(f"{name} given, and no export uses them", f"add {needs}, or leave it out")
    for request in engines:
        get_exporter(request.name).check(settings)
