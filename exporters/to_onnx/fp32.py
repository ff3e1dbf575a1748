"""Export of a torch student to fp32 ONNX, the source of every other artifact."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dfadc._version import __version__
from dfadc.errors import DfadcError
from dfadc.provenance import installed
from dfadc.storage import atomic_write_bytes
from exporters.exporter import ExportRequest, ExportResult
from exporters.sessions.onnx_runtime import LEAST_ONNXRUNTIME
from exporters.to_onnx.deployable import deployable
from exporters.to_onnx.file import to_checked_bytes, with_metadata
from exporters.to_onnx.fold import fold_batch_norms
from exporters.to_onnx.parity import check_parity, reference_logits
from exporters.to_onnx.trace import trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from dfadc.contract import ImageContract


def export_onnx(
    module: nn.Module,
    path: Path,
    *,
    contract: ImageContract,
    metadata: Mapping[str, str],
    embed_normalisation: bool = False,
    embed_softmax: bool = False,
    dynamic_size: bool = False,
) -> ExportResult:
    """Writes ``module`` as an fp32 ONNX of opset 20 with a dynamic batch, after comparing it with the module.

    The graph maps ``images`` (N, C, H, W) to ``logits`` (N, K) or (N, K, H, W), or ``probabilities`` with the softmax.
    The same module gives the same bytes: the file holds no time, no path and no stack trace. ``module`` itself is not
    changed.

    Args:
        module: the student; compiled, half-precision, channels-last and training-mode modules are taken too.
        path: the file to write.
        contract: of the module's images and logits.
        metadata: further ``dfadc.*`` metadata, e.g. architecture and teacher_sha256; the prefix is added.
        embed_normalisation: the graph takes pixels in [0, 1] and normalises them itself.
        embed_softmax: the graph returns probabilities.
        dynamic_size: the graph of a segmentation network takes images of any height and width.

    Raises:
        DfadcError: normalisation is to be embedded and the contract has no mean and std, or the size is to be dynamic
            and the network is a classifier.
        ExportFailed: the module cannot be exported, or the export does not compute what the module does.
        StorageFailed: the file cannot be written.
    """
    if dynamic_size and not contract.is_dense:
        raise DfadcError("only a segmentation network takes images of any size", "leave --dynamic-size out")
    output_name = "probabilities" if embed_softmax else "logits"
    network = deployable(module, contract, embed_normalisation=embed_normalisation, embed_softmax=embed_softmax)
    reference = reference_logits(network, contract, pixels=embed_normalisation, dynamic_size=dynamic_size)
    model = fold_batch_norms(trace(network, reference.batches[1], output_name, dynamic_size=dynamic_size))
    with_metadata(
        model,
        {
            **metadata,
            "schema": "1",
            "version": __version__,
            "precision": "fp32",
            "contract": contract.to_json(),
            "input": "pixels in [0, 1], NCHW" if embed_normalisation else "normalised, NCHW",
            "output": output_name,
            "size": "dynamic" if dynamic_size else "fixed",
            "runtime": f"onnxruntime>={LEAST_ONNXRUNTIME}",
        },
    )
    data = to_checked_bytes(model, path.name)
    with tempfile.TemporaryDirectory(prefix="dfadc-onnx-") as folder:
        draft = Path(folder) / path.name
        atomic_write_bytes(draft, data)
        error = check_parity(draft, reference, probabilities=embed_softmax)
    atomic_write_bytes(path, data)
    return _result(path, data, error)


def _result(path: Path, data: bytes, error: float) -> ExportResult:
    return ExportResult(
        path=path,
        request=ExportRequest("onnx"),
        effective_precision="fp32",
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        parent_sha256=None,
        tool_versions=installed(("torch", "onnx", "onnxscript", "onnx-ir")),
        notes=(f"parity with the module: {error:.1e} of the logit range",),
    )
