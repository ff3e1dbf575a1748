"""The fp32 ONNX of a torch student: the root from which every other artifact is made."""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import tempfile
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.nn import functional
from torch.onnx import OnnxExporterError

from dfadc._version import __version__
from dfadc.errors import DfadcError, ExportFailed
from dfadc.storage import atomic_write_bytes
from exporters.exporter import ExportRequest, ExportResult
from exporters.sessions.isolated import IsolatedSession
from exporters.sessions.onnx_runtime import LEAST_ONNXRUNTIME, OnnxRuntimeSession
from exporters.to_onnx.file import (
    INPUT_NAME,
    OPSET,
    first_line,
    package_versions,
    to_checked_bytes,
    with_metadata,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx
    from numpy.typing import NDArray

    from dfadc.contract import ImageContract

#: Largest difference from the module, over the range of its logits, that an fp32 export may show.
PARITY_TOLERANCE = 1e-4
_PARITY_BATCHES = (1, 3)


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
    The same module gives the same bytes: no time, no path and no stack trace is inside. ``module`` itself is not
    touched.

    Args:
        module: the student; compiled, half-precision, channels-last and training-mode modules are taken too.
        path: the file to write.
        contract: what the module takes and returns.
        metadata: further ``dfadc.*`` metadata, e.g. architecture and teacher_sha256; the prefix is added.
        embed_normalisation: the graph takes pixels in [0, 1] and normalises them itself.
        embed_softmax: the graph returns probabilities.
        dynamic_size: the graph of a segmentation network takes images of any height and width.

    Raises:
        DfadcError: normalisation is to be embedded and the contract has no mean and std, or the size is to be dynamic
            and the network answers once for an image.
        ExportFailed: the module cannot be exported, or the export does not compute what the module does.
        StorageFailed: the file cannot be written.
    """
    if dynamic_size and contract.task != "segmentation":
        raise DfadcError("only a segmentation network takes images of any size", "leave --dynamic-size away")
    output_name = "probabilities" if embed_softmax else "logits"
    network = _deployable(module, contract, embed_normalisation=embed_normalisation, embed_softmax=embed_softmax)
    batches = [_random_images(contract, size, pixels=embed_normalisation) for size in _PARITY_BATCHES]
    if dynamic_size:
        batches.append(_other_size(batches[-1]))
    expected = [_forward(network, images, contract) for images in batches]
    model = _to_proto(network, batches[1], output_name, dynamic_size=dynamic_size)
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
        error = _parity_error(draft, batches, expected, probabilities=embed_softmax)
    atomic_write_bytes(path, data)
    return ExportResult(
        path=path,
        request=ExportRequest("onnx"),
        effective_precision="fp32",
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        parent_sha256=None,
        tool_versions=package_versions("torch", "onnx", "onnxscript", "onnx-ir"),
        notes=(f"parity with the module: {error:.1e} of the logit range",),
    )


class _Deployed(nn.Module):
    """A network with its preprocessing and softmax inside the graph; mean and std are buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, contract: ImageContract, *, normalise: bool, softmax: bool) -> None:
        super().__init__()
        self.network = network
        self.normalise = normalise
        self.softmax = softmax
        if normalise:
            self.register_buffer("mean", torch.tensor(contract.mean).view(-1, 1, 1))
            self.register_buffer("std", torch.tensor(contract.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.normalise:
            images = (images - self.mean) / self.std
        output: Tensor = self.network(images)
        return torch.softmax(output, dim=1) if self.softmax else output


def _deployable(
    module: nn.Module, contract: ImageContract, *, embed_normalisation: bool, embed_softmax: bool
) -> nn.Module:
    """A copy of ``module`` in fp32, eval mode, on the CPU, contiguous and not compiled, with what is to be embedded."""
    if embed_normalisation and not contract.has_pixels:
        raise DfadcError(
            "the normalisation cannot be embedded: mean and std are unknown", "pass --mean and --std, or leave it out"
        )
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    try:
        network = copy.deepcopy(module).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)  # noqa: FBT003
    except (RuntimeError, TypeError) as exc:
        raise ExportFailed(f"{type(module).__name__} cannot be copied for the export: {first_line(exc)}") from exc
    _make_plain(network)
    if not (embed_normalisation or embed_softmax):
        return network
    return _Deployed(network, contract, normalise=embed_normalisation, softmax=embed_softmax).eval()


def _make_plain(network: nn.Module) -> None:
    """Takes out of the copy what changes no value: compiled parts, memory formats, and activations in place.

    In place, torch takes every activation apart to export it: MobileNetV2 then needs half as long again.
    """
    for part in list(network.modules()):
        for name, child in part.named_children():
            if isinstance(inner := getattr(child, "_orig_mod", None), nn.Module):
                setattr(part, name, inner)
        if getattr(part, "inplace", None) is True:
            setattr(part, "inplace", False)  # noqa: B010 -- nn.Module types it as a tensor
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.contiguous()


def _random_images(contract: ImageContract, batch: int, *, pixels: bool) -> Tensor:
    """(batch, C, H, W) noise over the range real images have; the same every time, without touching the global RNG."""
    noise = torch.rand(batch, *contract.input_size, generator=torch.Generator().manual_seed(batch))
    if pixels:
        return noise
    low, high = (torch.tensor(bound).view(-1, 1, 1) for bound in contract.value_range())
    return low + noise * (high - low)


def _forward(network: nn.Module, images: Tensor, contract: ImageContract) -> NDArray[np.float32]:
    """What the module computes; the reference of the parity check."""
    size = "x".join(map(str, contract.input_size))
    try:
        with torch.no_grad():
            logits = network(images)
    except (RuntimeError, ValueError, TypeError, IndexError) as exc:
        raise ExportFailed(f"the module does not take {len(images)} images of {size}: {first_line(exc)}") from exc
    if not isinstance(logits, Tensor):
        raise ExportFailed(
            f"the module returns {type(logits).__name__}, not a tensor of logits",
            "wrap it in dfadc.networks.logits.LogitsOf",
        )
    dense = images.shape[2:] if contract.task == "segmentation" else ()
    if logits.shape != (expected := (len(images), contract.num_classes, *dense)):
        raise ExportFailed(
            f"the module returns {tuple(logits.shape)} for {len(images)} images, not {tuple(expected)}",
            "wrap it in dfadc.networks.logits.ResizedLogits" if dense else "",
        )
    if not torch.isfinite(logits).all():
        raise ExportFailed(f"the module's outputs for random images of {size} are not finite")
    return logits.numpy()


def _other_size(images: Tensor) -> Tensor:
    """The same images in another shape: a traced size that is no variable shows here."""
    return functional.interpolate(images, size=(images.shape[2] + 5, 2 * images.shape[3] + 3))


def _to_proto(network: nn.Module, images: Tensor, output_name: str, *, dynamic_size: bool) -> onnx.ModelProto:
    """Traces ``network`` and strips everything that names this machine or its source files."""
    dynamic = {0: "batch", 2: "height", 3: "width"} if dynamic_size else {0: "batch"}
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=[output_name],
                dynamic_shapes=(dynamic,),
                external_data=False,
                verbose=False,
            )
    except OnnxExporterError as exc:
        raise ExportFailed(
            f"torch cannot export {type(network).__name__} to ONNX: {_root_cause(exc)}",
            "the forward pass must not branch on tensor values or use operators that ONNX lacks",
        ) from exc
    if program is None:
        raise ExportFailed(f"torch exported nothing for {type(network).__name__}")
    model = program.model
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None or isinstance(value.shape[0], int):
            raise ExportFailed(
                f"the batch of {value.name!r} is fixed: {value.shape}",
                "the forward pass has the batch size written into it; use images.shape[0] or flatten(1)",
            )
    _name_nodes(model.graph)
    ClearMetadataAndDocStringPass()(model)
    model.producer_version = (model.producer_version or "").partition("+")[0]
    return onnx_ir.to_proto(model)


def _name_nodes(graph: onnx_ir.Graph) -> None:
    """Names each node after its place in the module ("features.0.0/Conv"), so that reports can name layers.

    A weight's name is the better guide: a batch norm that was folded leaves its own scope on the convolution.
    """
    seen: dict[str, int] = {}
    for node in graph:
        weights = (value.name or "" for value in node.inputs if value is not None and value.is_initializer())
        owner = next((name.rpartition(".")[0] for name in weights if name.endswith(".weight")), "")
        if not owner:
            scopes = [
                part.strip(" '\"")
                for part in node.metadata_props.get("pkg.torch.onnx.name_scopes", "").strip("[]").split(",")
            ]
            owner = scopes[-2] if len(scopes) > 1 else ""
        name = f"{owner}/{node.op_type}".lstrip("/")
        seen[name] = seen.get(name, 0) + 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _parity_error(
    draft: Path,
    batches: list[Tensor],
    expected: list[NDArray[np.float32]],
    *,
    probabilities: bool,
) -> float:
    """Largest difference between ONNX Runtime and the module, over the range of the module's outputs."""
    try:
        with IsolatedSession(OnnxRuntimeSession, draft, threads=1) as session:
            actual = [session.run(images.numpy()) for images in batches]
    except DfadcError as exc:
        raise ExportFailed(f"the exported ONNX does not run: {exc.message}", exc.hint) from exc
    reference = np.concatenate([answers.ravel() for answers in expected])
    # Outputs that share one large offset round at its magnitude, so it counts too; probabilities span 1 by definition.
    scale = 1.0 if probabilities else max(float(np.ptp(reference)), float(np.abs(reference).max())) or 1.0
    error = float(np.abs(np.concatenate([answers.ravel() for answers in actual]) - reference).max()) / scale
    if not error <= PARITY_TOLERANCE:  # a NaN is not parity either
        raise ExportFailed(
            f"the exported ONNX is {error:.1e} of the logit range away from the module, not {PARITY_TOLERANCE:.0e}",
            "is the module deterministic in eval mode?",
        )
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx prints graphs, warns and logs about its own internals; what matters arrives as an exception."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _root_cause(error: BaseException) -> str:
    """The first two lines of the exception that started the chain: often a heading and its first point."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
