"""Description of an engine, from its sidecar: an engine is native code, which nothing but its backend reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from exporters.sessions.tensorrt_session import read_sidecar
from exporters.to_onnx.file import INPUT_NAME, METADATA_PREFIX

if TYPE_CHECKING:
    from pathlib import Path


def describe_engine(path: Path) -> dict[str, Any]:
    """Inputs, outputs, dtypes, GPUs, versions and metadata of an engine.

    Raises:
        DfadcError: engine or sidecar is missing or damaged, or they do not belong together.
    """
    facts = read_sidecar(path)
    metadata = {**facts["metadata"], f"{METADATA_PREFIX}precision": facts["precision"]}
    contract = json.loads(metadata.get(f"{METADATA_PREFIX}contract", "{}"))
    batch = f"{facts['batch'][0]} to {facts['batch'][2]}"
    output = metadata.get(f"{METADATA_PREFIX}output", "logits")
    dense = contract["input_size"][1:] if contract.get("task") == "segmentation" else []
    return {
        "inputs": [{"name": INPUT_NAME, "dtype": "float", "shape": [batch, *contract.get("input_size", ["?"])]}],
        "outputs": [{"name": output, "dtype": "float", "shape": [batch, contract.get("num_classes", "?"), *dense]}],
        "size_bytes": path.stat().st_size,
        "effective_precision": facts["effective_precision"],
        "tensor_dtypes": facts["layer_dtypes"],
        "gpus": facts["gpus"],
        "versions": facts["versions"],
        "metadata": metadata,
    }
