"""Images of --data as arrays: checks of an .npz, normalisation in batches, and a hash. numpy only."""

from __future__ import annotations

import hashlib
import zipfile
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.array_file import read_arrays
from dfadc.errors import DfadcError
from dfadc.verification.stored_images import dequantise

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from dfadc.contract import ImageContract

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


class EvaluationImages(ABC):
    """Images as read, with a target for each, normalised batch by batch."""

    __slots__ = ()

    images: Pixels
    contract: ImageContract

    def __len__(self) -> int:
        return len(self.images)

    @property
    @abstractmethod
    def targets(self) -> npt.NDArray[np.integer[Any]]:
        """Labels or masks, in the order of the images."""

    @property
    def sha256(self) -> str:
        """Hex SHA-256 over images and targets in their order; equal for two data sets whose results can be paired."""
        digest = hashlib.sha256(f"{self.images.shape} {self.images.dtype}".encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.targets).data)
        return digest.hexdigest()

    def batches(self, batch_size: int) -> Iterator[npt.NDArray[np.float32]]:
        """The images in order, normalised float32, at most ``batch_size`` at a time."""
        for start in range(0, len(self), batch_size):
            yield dequantise(self.images[start : start + batch_size], self.contract)


def require_pixels(contract: ImageContract) -> None:
    """Refuses a contract without mean and std.

    Raises:
        DfadcError: mean and std are unknown.
    """
    if not contract.has_pixels:
        raise DfadcError(
            "--data needs the mean and std that the teacher was trained with, and they are unknown",
            "pass --mean and --std, one value a channel, of pixels in [0, 1]",
        )


def range_notes(images: Pixels) -> tuple[str, ...]:
    """A note on uint8 images of 0 and 1, which are nearly black."""
    if images.dtype != np.uint8 or images.max() > 1:
        return ()
    return ("the images hold only 0 and 1 in uint8, which counts to 255: if 1 means white, save them as float",)


def read_npz(
    path: Path, names: Sequence[str], *, layout: str, optional: Sequence[str] = ()
) -> dict[str, npt.NDArray[Any]]:
    """Reads named and, if they are there, optional arrays; ``layout`` describes the expected ones in messages.

    Raises:
        DfadcError: it is no .npz, is damaged, or lacks an array.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise DfadcError(f"--data {path} is neither a folder nor an .npz file", layout)
        return read_arrays(path, names, optional=optional)
    except KeyError as exc:
        raise DfadcError(f"--data {path} has {exc.args[0]}", layout) from exc
    except (OSError, ValueError) as exc:
        raise DfadcError(f"--data {path} cannot be read: {exc}", layout) from exc


def check_images(images: npt.NDArray[Any], contract: ImageContract, path: Path, *, layout: str) -> Pixels:
    """(N, C, H, W) uint8 or float32 in [0, 1].

    Raises:
        DfadcError: the images do not fit the contract; the hint names the change.
    """
    channels, height, width = contract.input_size
    if len(images) == 0 if images.ndim else True:
        raise DfadcError(f"--data {path}: `images` is empty", layout)
    shape = images.shape
    if images.ndim == 4 and shape[1] != channels and shape[3] == channels:
        raise DfadcError(
            f"--data {path}: `images` is {shape}, which looks like N×H×W×C",
            "save it as N×C×H×W: images.transpose(0, 3, 1, 2)",
        )
    if images.ndim not in (3, 4):
        raise DfadcError(f"--data {path}: `images` is {shape}, expected N×C×H×W or N×H×W", layout)
    num_channels = shape[1] if images.ndim == 4 else 1
    if num_channels != channels:
        raise DfadcError(
            f"--data {path}: images have {num_channels} channel(s), the teacher takes {channels}",
            "convert them as the teacher's training did",
        )
    if shape[-2:] != (height, width):
        raise DfadcError(
            f"--data {path}: images are {shape[-2]}×{shape[-1]}, the teacher takes {height}×{width}",
            "resize them as the teacher's training did, or pass a folder of image files, which is resized",
        )
    return _check_values(images.reshape(-1, channels, height, width), path)


def _check_values(images: npt.NDArray[Any], path: Path) -> Pixels:
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise DfadcError(
            f"--data {path}: `images` has dtype {images.dtype}, expected uint8 or float",
            'for pixels in 0..255 use images.astype("uint8")',
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):
        raise DfadcError(
            f"--data {path}: float images run from {low:g} to {high:g}, expected [0, 1]",
            "divide pixels in 0..255 by 255; undo a normalisation, which dfadc applies itself",
        )
    return images.astype(np.float32, copy=False)
