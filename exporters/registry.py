"""Targets: the formats that dfadc exports to, by export name. Imports no torch, no ONNX and no backend.

To add a target:

1. Write a folder ``to_x`` with three functions or classes:

   - ``exporter.py``: a class like :class:`~exporters.exporter.Exporter`: ``capability`` says whether the backend can
     build and run here, ``export`` builds the artifact from an ONNX file and returns an ``ExportResult``;
   - a session: a class like :class:`~exporters.sessions.session.BatchedSession`, whose ``_run_batch`` maps images to
     logits. It lies in ``sessions/`` if device kits need it too, for they carry that folder;
   - ``describe.py``: a function that reads inputs, outputs, dtypes and metadata from the artifact's bytes.

   Convert the backend's errors into ``DfadcError`` there, import the backend inside functions, and mirror the folder
   in ``tests/exporters``.
2. Add one entry to :data:`TARGETS`.

``export``, ``verify``, ``bench``, ``inspect`` and ``doctor`` take it from here. ``DEFAULT_EXPORTS`` in the pipeline's
export plan lists what ``distill`` makes without ``--export``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from exporters.exporter import Exporter


@dataclass(frozen=True, slots=True)
class Target:
    """One target. Code is named as "module:name" and imported on first use.

    Args:
        label: of the target in file names; empty for ONNX.
        extension: of the artifact.
        int8_presets: INT8 presets that it takes, the default first.
        exporter: called without arguments, returns the exporter.
        session: called with a path and keywords ``threads`` and ``batch_size``, returns the session.
        describe: called with a path, returns facts about the artifact as plain JSON values.
        kind: name of the format, for `dfadc inspect`.
        makes_fp16: fp16 artifacts are made from the fp32 ONNX, not from the fp16 one.
    """

    label: str
    extension: str
    int8_presets: tuple[str, ...]
    exporter: str
    session: str
    describe: str
    kind: str
    makes_fp16: bool = False


_TENSORRT = Target(
    label="trt",
    extension="engine",
    int8_presets=("portable",),
    exporter="exporters.to_tensorrt.exporter:full_tensorrt",
    session="exporters.sessions.tensorrt_session:open_engine",
    describe="exporters.to_tensorrt.describe:describe_engine",
    kind="TensorRT engine",
)
#: ``portable`` INT8 is symmetric and runs everywhere; ``ort-cpu`` suits ONNX Runtime.
TARGETS: Mapping[str, Target] = {
    "onnx": Target(
        label="",
        extension="onnx",
        int8_presets=("portable", "ort-cpu"),
        exporter="exporters.to_onnx.exporter:DerivedOnnxExporter",
        session="exporters.sessions.onnx_runtime:OnnxRuntimeSession",
        describe="exporters.to_onnx.describe:describe_onnx",
        kind="ONNX",
        makes_fp16=True,
    ),
    "tensorrt": _TENSORRT,
    "tensorrt-rtx": replace(_TENSORRT, label="rtx", exporter="exporters.to_tensorrt.exporter:tensorrt_rtx"),
    "openvino": Target(
        label="openvino",
        extension="xml",
        int8_presets=("portable", "ort-cpu"),
        exporter="exporters.to_openvino.exporter:OpenVinoExporter",
        session="exporters.sessions.openvino_session:OpenVinoSession",
        describe="exporters.to_openvino.describe:describe_ir",
        kind="OpenVINO IR",
        makes_fp16=True,
    ),
}


def exporter_names() -> tuple[str, ...]:
    """Every name that :func:`get_exporter` takes, in the order of the documentation."""
    return tuple(TARGETS)


def get_exporter(name: str) -> Exporter:
    """The exporter called ``name``, whether or not its backend is installed; ask its ``capability()``.

    Raises:
        DfadcError: there is no such exporter; the nearest names are offered.
    """
    if name not in TARGETS:
        raise unknown_value("export", name, TARGETS)
    exporter: Exporter = load(TARGETS[name].exporter)()
    return exporter


def target_of(path: Path) -> Target:
    """The target of an artifact, by its extension.

    Raises:
        DfadcError: no target has this extension.
    """
    target = next((target for target in TARGETS.values() if path.suffix == f".{target.extension}"), None)
    if target is None:
        extensions = list(dict.fromkeys(f".{target.extension}" for target in TARGETS.values()))
        raise DfadcError(f"{path} is not an artifact", f"give a {', '.join(extensions[:-1])} or {extensions[-1]} file")
    return target


def load(reference: str) -> Callable[..., Any]:
    """The object that a :class:`Target` names as "module:name"."""
    module, _, name = reference.partition(":")
    return cast("Callable[..., Any]", getattr(import_module(module), name))


def unknown_value(kind: str, value: str, choices: Iterable[str]) -> DfadcError:
    """The error for a name that is not one of ``choices``: it offers the nearest ones, then all of them."""
    valid = sorted(choices)
    near = difflib.get_close_matches(value, valid, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    return DfadcError(f"unknown {kind} {value!r}", f"{guess}valid: {', '.join(valid)}")
