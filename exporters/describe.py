"""Description of an artifact, read from its bytes; no backend and no torch is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporters.registry import load, target_of
from exporters.to_onnx.file import parse_onnx, read_metadata

if TYPE_CHECKING:
    from pathlib import Path


def describe_artifact(path: Path) -> dict[str, Any]:
    """Kind, inputs, outputs, dtypes, operators and metadata of an artifact, as plain JSON values.

    Raises:
        DfadcError: the file is missing, damaged, or not an artifact.
    """
    target = target_of(path)
    return {"kind": target.kind, **load(target.describe)(path)}


def artifact_metadata(path: Path) -> dict[str, str]:
    """An artifact's own ``dfadc.*`` metadata: its inputs, outputs and precision.

    Raises:
        DfadcError: the file is missing, damaged, or not an artifact.
    """
    if path.suffix == ".onnx":  # The graph is not checked: the runtime may support more operators than onnx.
        return read_metadata(parse_onnx(path))
    metadata: dict[str, str] = describe_artifact(path)["metadata"]
    return metadata
