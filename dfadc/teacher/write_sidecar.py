"""Writing a sidecar: a ``.toml`` beside the teacher with what is known of it, and its gaps marked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dfadc.errors import DfadcError
from dfadc.storage import atomic_write_bytes
from dfadc.teacher.file_kind import CONVERTED_KINDS
from dfadc.teacher.inspect import TeacherReport, Unknown

if TYPE_CHECKING:
    from pathlib import Path

#: Field -> example of its value.
_FIELDS = {
    "input_size": "[3, 224, 224]",
    "num_classes": "1000",
    "mean": "[0.485, 0.456, 0.406]",
    "std": "[0.229, 0.224, 0.225]",
    "class_names": '["cat", "dog"]',
    "task": '"classification"',
}


def write_sidecar(report: TeacherReport) -> Path:
    """Writes the sidecar of an inspected teacher and returns its path.

    Raises:
        DfadcError: there is one already.
        StorageFailed: it cannot be written.
    """
    path = report.path.with_suffix(".toml")
    if path.exists():
        raise DfadcError(f"there is a sidecar {path} already", "edit it, or remove it first")
    atomic_write_bytes(path, _text(report).encode())
    return path


def _text(report: TeacherReport) -> str:
    lines = [
        f"# Contract of {report.path.name}. What stands after # is unknown or only assumed: correct it and uncomment."
    ]
    lines += _architecture(report)
    for name, example in _FIELDS.items():
        value = report.contract.get(name)
        source = report.contract_sources.get(name, "")
        if value is None or isinstance(value, Unknown):
            lines.append(f"# {name} = {example}  # unknown; this is an example")
        else:
            mark = "# " if "assumed" in source else ""
            lines.append(f"{mark}{name} = {json.dumps(value, ensure_ascii=False)}  # {source}")
    if report.output is not None:
        lines.append(f"output = {json.dumps(report.output)}  # command line")
    preprocessing = report.to_dict()["contract"].get("preprocessing")
    if isinstance(preprocessing, dict):
        inner = ", ".join(f"{key} = {json.dumps(value)}" for key, value in preprocessing.items())
        lines.append(f"preprocessing = {{ {inner} }}  # {report.contract_sources.get('preprocessing', '')}")
    return "\n".join(lines) + "\n"


def _architecture(report: TeacherReport) -> list[str]:
    """The lines of architecture and stem; a file may not name code to import."""
    name = report.architecture
    if isinstance(name, Unknown):
        return ['# architecture = "torchvision:resnet18"  # unknown; this is an example']
    if report.kind in CONVERTED_KINDS:
        return [f"# architecture: {name}, which the file holds"]
    if "whole module" in name or (":" in name and not name.startswith(("torchvision:", "timm:", "smp:"))):
        return [f"# architecture: {name}, which only --teacher-arch may name"]
    return [f"architecture = {json.dumps(name)}", f"stem = {json.dumps(str(report.stem))}"]
