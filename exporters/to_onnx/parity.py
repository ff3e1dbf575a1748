"""Parity check of an fp32 ONNX file with the torch module that it was traced from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dfadc.errors import DfadcError, ExportFailed
from exporters.sessions.isolated import IsolatedSession
from exporters.sessions.onnx_runtime import OnnxRuntimeSession
from exporters.to_onnx.file import first_line

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dfadc.contract import ImageContract

#: Largest difference from the module, over the range of its logits, that an fp32 export may show.
PARITY_TOLERANCE = 1e-4
_BATCH_SIZES = (1, 3)


class Reference(NamedTuple):
    """Random images of several batch sizes, and the module's logits for them."""

    batches: list[Tensor]
    logits: list[NDArray[np.float32]]


def reference_logits(network: nn.Module, contract: ImageContract, *, pixels: bool, dynamic_size: bool) -> Reference:
    """Runs a module in eval mode on random images, of pixels in [0, 1] or normalised.

    With ``dynamic_size`` the last are of another size.

    Raises:
        ExportFailed: the module does not take the images, or does not return finite logits of the contract's shape.
    """
    batches = [_random_images(contract, size, pixels=pixels) for size in _BATCH_SIZES]
    if dynamic_size:
        # In another size: a traced size that is a constant fails on them.
        images = batches[-1]
        batches.append(functional.interpolate(images, size=(images.shape[2] + 5, 2 * images.shape[3] + 3)))
    return Reference(batches, [_forward(network, images, contract) for images in batches])


def check_parity(draft: Path, reference: Reference, *, probabilities: bool) -> float:
    """Compares ONNX Runtime with the module: the largest difference, over the range of the module's outputs.

    Raises:
        ExportFailed: the file does not run, or the difference exceeds :data:`PARITY_TOLERANCE`.
    """
    try:
        with IsolatedSession(OnnxRuntimeSession, draft, threads=1) as session:
            actual = [session.run(images.numpy()) for images in reference.batches]
    except DfadcError as exc:
        raise ExportFailed(f"the exported ONNX does not run: {exc.message}", exc.hint) from exc
    expected = np.concatenate([logits.ravel() for logits in reference.logits])
    # Outputs that share one large offset round at its magnitude, so it counts too; probabilities span 1 by definition.
    scale = 1.0 if probabilities else max(float(np.ptp(expected)), float(np.abs(expected).max())) or 1.0
    error = float(np.abs(np.concatenate([logits.ravel() for logits in actual]) - expected).max()) / scale
    if not error <= PARITY_TOLERANCE:  # a NaN is not parity either
        raise ExportFailed(
            f"the exported ONNX is {error:.1e} of the logit range away from the module, not {PARITY_TOLERANCE:.0e}",
            "is the module deterministic in eval mode?",
        )
    return error


def _random_images(contract: ImageContract, batch: int, *, pixels: bool) -> Tensor:
    """(batch, C, H, W) noise over the range of real images; always the same, independent of the global RNG."""
    noise = torch.rand(batch, *contract.input_size, generator=torch.Generator().manual_seed(batch))
    if pixels:
        return noise
    low, high = (torch.tensor(bound).view(-1, 1, 1) for bound in contract.value_range())
    return low + noise * (high - low)


def _forward(network: nn.Module, images: Tensor, contract: ImageContract) -> NDArray[np.float32]:
    """Logits of the module, the reference of the parity check: finite, and of the contract's shape."""
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
    dense = images.shape[2:] if contract.is_dense else ()
    if logits.shape != (expected := (len(images), contract.num_classes, *dense)):
        raise ExportFailed(
            f"the module returns {tuple(logits.shape)} for {len(images)} images, not {tuple(expected)}",
            "wrap it in dfadc.networks.logits.ResizedLogits" if dense else "",
        )
    if not torch.isfinite(logits).all():
        raise ExportFailed(f"the module's outputs for random images of {size} are not finite")
    return logits.numpy()
