"""Interface of the exporters: request, settings, result, capability, and the exporter's protocol. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from dfadc.errors import DfadcError, ExportFailed
from exporters.registry import TARGETS, unknown_value

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from exporters.to_onnx.ranges import ActivationRanges


class PoolUnusable(ExportFailed):
    """The calibration images are missing, too few, not finite, or all of one class."""


class Precision(StrEnum):
    """Precision of an artifact. FP32 is the student itself; the others are derived from it."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """One artifact to export, written ``NAME[:PRECISION[:PRESET]]``.

    Args:
        name: of the exporter, a key of :data:`TARGETS`.
        precision: fp32 by default.
        preset: of INT8; empty means the exporter's first preset, and stays empty for float precisions.

    Raises:
        DfadcError: a part is unknown or does not fit the others.
    """

    name: str
    precision: Precision = Precision.FP32
    preset: str = ""

    def __post_init__(self) -> None:
        if self.name not in TARGETS:
            raise unknown_value("export", self.name, TARGETS)
        presets = TARGETS[self.name].int8_presets
        if self.precision is not Precision.INT8:
            if self.preset:
                raise DfadcError(
                    f"export {self.name}:{self.precision}:{self.preset} has a preset, and only int8 has presets",
                    f"write {self.name}:{self.precision}, or {self.name}:int8:{presets[0]}",
                )
        elif not self.preset:
            object.__setattr__(self, "preset", presets[0])
        elif self.preset not in presets:
            raise unknown_value(f"int8 preset for {self.name}", self.preset, presets)

    @classmethod
    def parse(cls, text: str) -> ExportRequest:
        """Reads ``NAME[:PRECISION[:PRESET]]``, e.g. ``onnx``, ``tensorrt-rtx:fp16`` or ``onnx:int8:ort-cpu``.

        Raises:
            DfadcError: too many parts, or a part that is not one of the valid values (which are named).
        """
        parts = text.strip().split(":")
        if len(parts) > 3 or not all(parts):
            raise DfadcError(f"malformed export {text!r}", "write NAME[:PRECISION[:PRESET]], e.g. onnx:fp16")
        name, precision, preset = (*parts, "", "")[:3]
        if precision and precision not in set(Precision):
            raise unknown_value(f"precision in export {text!r}:", precision, Precision)
        return cls(name, Precision(precision or Precision.FP32), preset)

    @property
    def file_name(self) -> str:
        """``student[.PRECISION][.TARGET].EXT``; an INT8 preset that is not the default is part of the name."""
        target = TARGETS[self.name]
        precision = "" if self.precision is Precision.FP32 else str(self.precision)
        preset = "" if self.preset in ("", target.int8_presets[0]) else self.preset
        return ".".join(filter(None, ("student", precision, preset, target.label, target.extension)))

    @property
    def source(self) -> ExportRequest | None:
        """The artifact that this one is made from; None for the fp32 ONNX, which is made from the student."""
        if self.name == "onnx" and self.precision is Precision.FP32:
            return None
        if self.name == "onnx" or (self.precision is Precision.FP16 and TARGETS[self.name].makes_fp16):
            return ExportRequest("onnx")
        return ExportRequest("onnx", self.precision, self.preset)

    def __str__(self) -> str:
        preset = "" if self.preset in ("", TARGETS[self.name].int8_presets[0]) else f":{self.preset}"
        return f"{self.name}:{self.precision}{preset}"


def with_sources(requests: Iterable[ExportRequest]) -> tuple[ExportRequest, ...]:
    """The requests and all their sources, each once, a source before the artifacts made from it."""
    ordered: dict[ExportRequest, None] = {}
    for request in requests:
        chain = [request]
        while (source := chain[-1].source) is not None:
            chain.append(source)
        ordered.update(dict.fromkeys(reversed(chain)))
    return tuple(ordered)


@dataclass(frozen=True, slots=True)
class BatchProfile:
    """Batch sizes of an engine: at least ``lowest``, at most ``highest``, tuned for ``optimum``."""

    lowest: int = 1
    optimum: int = 1
    highest: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.lowest <= self.optimum <= self.highest:
            raise DfadcError(
                f"batch profile {self.lowest},{self.optimum},{self.highest} is not 1 <= lowest <= optimum <= highest"
            )


#: In ``BuildSettings.keep_fp32``: as few layers as restore INT8's agreement with fp32.
KEEP_FP32_AUTO = "auto"


def ignore(*_: object) -> None:
    """The default of a callback."""


#: Called by a long build with (phase, steps done, steps in the phase).
ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """Settings of a build; each exporter reads the fields that apply to it.

    Args:
        batch: batch sizes of an engine.
        gpus: compute capabilities by name ("sm86"); empty means the backend's default.
        workspace_bytes: memory limit of a TensorRT tactic; None is the backend's default.
        calibration: (N, C, H, W) float32 images as the network takes them: they calibrate INT8, and nodes that would
            overflow on them stay in fp32 in fp16 artifacts; None if there are none.
        fp16_ranges: activation ranges of the fp32 ONNX on further images: fp16 is refused if it overflows there; None
            leaves it unchecked.
        calibrator: INT8 calibration method: minmax, percentile, entropy, or auto (the best of them).
        keep_fp32: names of ONNX nodes that stay in fp32; ``KEEP_FP32_AUTO`` among them, and None, let INT8 add layers
            if it would miss its gate; empty keeps none.
        on_progress: called with progress; may raise to cancel.
    """

    batch: BatchProfile = field(default_factory=BatchProfile)
    gpus: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    calibration: NDArray[np.float32] | None = None
    fp16_ranges: ActivationRanges | None = None
    calibrator: str = "auto"
    keep_fp32: tuple[str, ...] | None = None
    on_progress: ProgressCallback = ignore


@dataclass(frozen=True, slots=True)
class ExportResult:
    """One artifact on disk and its origin.

    Args:
        effective_precision: of the artifact, e.g. "fp16" or "fp16, 3 nodes in fp32".
        size_bytes: of all files that a device needs to run it.
        parent_sha256: digest of its source; None for the fp32 ONNX.
        tool_versions: package -> version, of all packages that determine the bytes.
        targets: devices it was built for; empty means any.
        extra_files: further files that it needs, e.g. OpenVINO's weights.
    """

    path: Path
    request: ExportRequest
    effective_precision: str
    sha256: str
    size_bytes: int
    parent_sha256: str | None
    tool_versions: Mapping[str, str]
    targets: tuple[str, ...] = ()
    extra_files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Capability:
    """Capability of one exporter on this machine.

    Args:
        can_build: artifacts can be made here.
        can_run: artifacts can be run, and so verified, here.
        version: of the backend; empty if it is missing.
        reason: why building or running is impossible; empty if both are possible.
        install: the command that installs the backend; empty if no command helps.
    """

    can_build: bool
    can_run: bool
    version: str = ""
    reason: str = ""
    install: str = ""


@runtime_checkable
class Exporter(Protocol):
    """Makes artifacts of one name from an ONNX file."""

    name: str

    def capability(self) -> Capability:
        """Capability on this machine; never raises."""
        ...

    def check(self, settings: BuildSettings) -> None:
        """Checks the settings before anything is built.

        Raises:
            DfadcError: the backend does not accept one of them.
        """
        ...

    def export(self, source_onnx: Path, target: Path, request: ExportRequest, settings: BuildSettings) -> ExportResult:
        """Builds ``target`` from the ONNX that ``request.source`` names.

        Raises:
            DfadcError: the source, the request or a setting is wrong (2), the backend is missing (4),
                the build failed (5) or the disk did (7). No partial file is left.
        """
        ...
