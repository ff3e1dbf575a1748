"""What can be asked of an exporter and what it answers: requests, settings, results, protocols. Free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from dfadc.errors import DfadcError, ExportFailed

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from exporters.to_onnx.ranges import ActivationRanges


class PoolUnusable(ExportFailed):
    """The calibration images cannot calibrate anything: there are none, too few, or all of one class."""


class Precision(StrEnum):
    """What an artifact computes in. FP32 is the student itself; the others are derived from it."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class Format:
    """How the files of one exporter are named and which INT8 presets it takes (the first is the default)."""

    target: str
    extension: str
    int8_presets: tuple[str, ...]


#: Everything that can be exported. ``portable`` INT8 is symmetric and runs everywhere; ``ort-cpu`` suits ONNX Runtime.
FORMATS: Mapping[str, Format] = {
    "onnx": Format("", "onnx", ("portable", "ort-cpu")),
    "tensorrt": Format("trt", "engine", ("portable",)),
    "tensorrt-rtx": Format("rtx", "engine", ("portable",)),
    "openvino": Format("openvino", "xml", ("portable", "ort-cpu")),
}


def unknown_value(kind: str, value: str, choices: Iterable[str]) -> DfadcError:
    """The error for a name that is not one of ``choices``: it offers the nearest ones, then all of them."""
    known = sorted(choices)
    near = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    return DfadcError(f"unknown {kind} {value!r}", f"{guess}valid: {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """One artifact somebody wants, written ``NAME[:PRECISION[:PRESET]]``.

    Args:
        name: which exporter, a key of :data:`FORMATS`.
        precision: fp32 where nothing is said.
        preset: how INT8 is quantised; empty means the exporter's first preset, and stays empty for float precisions.

    Raises:
        DfadcError: a part is unknown or does not fit the others.
    """

    name: str
    precision: Precision = Precision.FP32
    preset: str = ""

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise unknown_value("export", self.name, FORMATS)
        presets = FORMATS[self.name].int8_presets
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
        if name not in FORMATS:
            raise unknown_value("export", name, FORMATS)
        if precision and precision not in set(Precision):
            raise unknown_value(f"precision in export {text!r}:", precision, Precision)
        return cls(name, Precision(precision or Precision.FP32), preset)

    @property
    def file_name(self) -> str:
        """``student[.PRECISION][.TARGET].EXT``; an INT8 preset that is not the default is part of the name."""
        form = FORMATS[self.name]
        precision = "" if self.precision is Precision.FP32 else str(self.precision)
        preset = "" if self.preset in ("", form.int8_presets[0]) else self.preset
        return ".".join(filter(None, ("student", precision, preset, form.target, form.extension)))

    @property
    def source(self) -> ExportRequest | None:
        """The artifact this one is made of; None for the fp32 ONNX, the root of every chain.

        Engines take the typed ONNX of their precision. OpenVINO compresses fp32 to fp16 weights itself.
        """
        if self.name == "onnx":
            return None if self.precision is Precision.FP32 else ExportRequest("onnx")
        if self.name == "openvino" and self.precision is Precision.FP16:
            return ExportRequest("onnx")
        return ExportRequest("onnx", self.precision, self.preset)

    def __str__(self) -> str:
        preset = "" if self.preset in ("", FORMATS[self.name].int8_presets[0]) else f":{self.preset}"
        return f"{self.name}:{self.precision}{preset}"


def with_sources(requests: Iterable[ExportRequest]) -> tuple[ExportRequest, ...]:
    """The requests and everything they are made of, each once, sources before what needs them."""
    ordered: dict[ExportRequest, None] = {}
    for request in requests:
        chain = [request]
        while (source := chain[-1].source) is not None:
            chain.append(source)
        ordered.update(dict.fromkeys(reversed(chain)))
    return tuple(ordered)


@dataclass(frozen=True, slots=True)
class BatchProfile:
    """Batch sizes an engine accepts: at least ``lowest``, at most ``highest``, tuned for ``optimum``."""

    lowest: int = 1
    optimum: int = 1
    highest: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.lowest <= self.optimum <= self.highest:
            raise DfadcError(
                f"batch profile {self.lowest},{self.optimum},{self.highest} is not 1 <= lowest <= optimum <= highest"
            )


#: In ``BuildSettings.keep_fp32``: the fewest layers whose return to fp32 brings INT8's agreement back.
KEEP_FP32_AUTO = "auto"

#: Called by a long build with (phase, steps done, steps in the phase).
ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """What a build needs beside its source and its request; each exporter reads the fields that concern it.

    Args:
        batch: batch sizes of an engine.
        gpus: compute capabilities by name ("sm86"); empty means the backend's default.
        workspace_bytes: most memory a TensorRT tactic may use; None is the backend's default.
        calibration: (N, C, H, W) float32 images as the network takes them: they calibrate INT8, and nodes that would
            overflow on them stay in fp32 in fp16 artifacts; None if there are none.
        fp16_ranges: activation ranges of the fp32 ONNX on further images: fp16 is refused if it overflows there; None
            leaves it unchecked.
        calibrator: how INT8 ranges are read off the images: minmax, percentile, entropy, or auto (the best of them).
        keep_fp32: names of ONNX nodes that stay in fp32; ``KEEP_FP32_AUTO`` among them lets INT8 add layers where it
            would miss its gate, which is also what None does; empty keeps none.
        threads: CPU threads the build may use; 0 lets the backend choose.
        on_progress: told about progress; may raise to cancel.
    """

    batch: BatchProfile = field(default_factory=BatchProfile)
    gpus: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    calibration: NDArray[np.float32] | None = None
    fp16_ranges: ActivationRanges | None = None
    calibrator: str = "auto"
    keep_fp32: tuple[str, ...] | None = None
    threads: int = 0
    on_progress: ProgressCallback | None = None


@dataclass(frozen=True, slots=True)
class ExportResult:
    """One artifact on disk and where it came from.

    Args:
        path: the artifact.
        request: what was asked for.
        effective_precision: what was built, e.g. "fp16" or "fp16, 3 nodes in fp32".
        sha256: hex digest of the artifact's bytes.
        size_bytes: what a device must hold to run it.
        parent_sha256: digest of the artifact it was made of; None for the fp32 ONNX.
        tool_versions: package -> version, everything that shaped the bytes.
        targets: devices it was built for; empty means any.
        extra_files: further files without which the artifact is useless, e.g. OpenVINO's weights.
        notes: what a reader of the report should know.
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
    """What one exporter can do on this machine.

    Args:
        can_build: artifacts can be made here.
        can_run: artifacts can be run, so verified, here.
        version: of the backend; empty where it is missing.
        reason: why something cannot be done; empty where everything can.
        install: the command that brings what is missing; empty where no command can.
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
        """What can be built and run here; never raises."""
        ...

    def check(self, settings: BuildSettings) -> None:
        """Looks at the settings alone, before anything is made.

        Raises:
            DfadcError: the backend cannot take one of them.
        """
        ...

    def export(self, source_onnx: Path, target: Path, request: ExportRequest, settings: BuildSettings) -> ExportResult:
        """Builds ``target`` from the ONNX that ``request.source`` names.

        Raises:
            DfadcError: the source, the request or a setting is wrong (2), the backend is missing (4),
                the build failed (5) or the disk did (7). No partial file is left.
        """
        ...
