"""Quantisation of images for storage: uint8 pixels, or float16 if mean and std are unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from dfadc.contract import ImageContract

StoredImages = npt.NDArray[np.uint8] | npt.NDArray[np.float16]


def quantise(images: npt.NDArray[np.floating[Any]], contract: ImageContract) -> StoredImages:
    """Quantises normalised images (N, C, H, W): uint8 pixels, rounded and clipped, or float16 without mean and std.

    Raises:
        DfadcError: the shape does not fit the contract, or a value is NaN, infinite or beyond float16.
    """
    if images.ndim != 4 or images.shape[1:] != contract.input_size:
        raise DfadcError(
            f"images are {images.shape}, the contract needs (N, {', '.join(map(str, contract.input_size))})"
        )
    if not np.isfinite(images).all():
        raise DfadcError(
            "generated images contain NaN or infinity", "the generator has diverged: lower its learning rate"
        )
    if contract.mean is None or contract.std is None:
        if images.size and float(np.abs(images).max()) > float(np.finfo(np.float16).max):
            raise DfadcError("generated images exceed the range of float16", "pass --mean and --std")
        return images.astype(np.float16)
    pixels = images * _per_channel(contract.std) + _per_channel(contract.mean)
    return np.asarray(np.clip(np.rint(pixels * 255.0), 0, 255), np.uint8)


def dequantise(stored: StoredImages | npt.NDArray[np.float32], contract: ImageContract) -> npt.NDArray[np.float32]:
    """Normalised float32 images (N, C, H, W) from stored ones; the inverse of :func:`quantise`.

    Pixels may also be float32 in [0, 1].
    """
    if contract.mean is None or contract.std is None:
        return stored.astype(np.float32)
    pixels = stored.astype(np.float32) / np.float32(255.0 if stored.dtype == np.uint8 else 1.0)
    return np.asarray((pixels - _per_channel(contract.mean)) / _per_channel(contract.std), np.float32)


def to_pixels(images: npt.NDArray[np.float32], contract: ImageContract) -> npt.NDArray[np.float32]:
    """Normalised images (N, C, H, W) as pixels in [0, 1], for artifacts that normalise themselves.

    Raises:
        DfadcError: the contract has no mean and std.
    """
    if contract.mean is None or contract.std is None:
        raise DfadcError("the artifact takes pixels, and mean and std are unknown", "pass --mean and --std")
    return np.asarray(images * _per_channel(contract.std) + _per_channel(contract.mean), np.float32)


def stored_type(contract: ImageContract) -> type[np.generic]:
    """Dtype of stored images."""
    return np.uint8 if contract.has_pixels else np.float16


def _per_channel(values: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """(1, C, 1, 1) float32."""
    return np.asarray(values, np.float32).reshape(1, -1, 1, 1)
