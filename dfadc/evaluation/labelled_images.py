"""Labelled images that a user passes with --data: they evaluate, and never influence training.

Nothing that trains may import this module.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.array_file import read_arrays
from dfadc.errors import DfadcError
from dfadc.evaluation.image_folder import load_image_folder
from dfadc.verification.agreement import predict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from dfadc.contract import ImageContract

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
_NPZ_LAYOUT = "an .npz holds `images` (N×C×H×W or N×H×W, uint8 or float in [0, 1]) and `labels` (N integers)"


@dataclass(frozen=True, slots=True)
class EvaluationData:
    """Labelled images, kept as they came and normalised batch by batch.

    Args:
        images: (N, C, H, W), uint8 in 0..255 or float32 in [0, 1].
        labels: (N,) int64 in 0..K-1.
        contract: gives mean and std.
        notes: what the user should know, e.g. how folders became classes and what was skipped.
    """

    images: Pixels
    labels: npt.NDArray[np.int64]
    contract: ImageContract
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sha256(self) -> str:
        """Hex SHA-256 over images and labels in their order: what makes two data sets the same questions."""
        digest = hashlib.sha256(f"{self.images.shape} {self.images.dtype}".encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()

    def batches(self, batch_size: int) -> Iterator[npt.NDArray[np.float32]]:
        """The images in the order of ``labels``, normalised float32, at most ``batch_size`` at a time."""
        return normalised_batches(self.images, self.contract, batch_size)

    def judge(self, batches: Iterable[npt.NDArray[np.float32]]) -> npt.NDArray[np.bool_]:
        """(N,) whether logits (n, K), answers to :meth:`batches`, give each image its label."""
        return np.asarray(np.concatenate([predict(logits) for logits in batches]) == self.labels)


def load_evaluation_data(path: Path, contract: ImageContract) -> EvaluationData:
    """Reads an image folder (one folder a class) or an .npz file.

    Folder images are converted to the contract's channels, turned upright, and resized and cropped by its
    preprocessing; where it has none, until they just cover its size. Images of an .npz must have that size already.

    Args:
        path: the folder or file.
        contract: input size, mean, std, number and names of the classes.

    Raises:
        DfadcError: mean and std are unknown, or the data cannot be read or do not fit the contract.
    """
    require_pixels(contract)
    if contract.task != "classification":
        raise DfadcError(f"--data with one label an image does not fit the task {contract.task}")
    if path.is_dir():
        images, labels, notes = load_image_folder(path, contract)
        return EvaluationData(images, labels, contract, (*notes, *range_notes(images)))
    if not path.exists():
        raise DfadcError(f"--data {path} does not exist", "name a folder with one folder a class, or an .npz file")
    read = read_npz(path, ("images", "labels"), layout=_NPZ_LAYOUT)
    pixels = check_images(read["images"], contract, path)
    labels = _check_labels(read["labels"], len(pixels), contract, path)
    notes = (f"{len(pixels)} labelled images from {path.name}", *range_notes(pixels))
    return EvaluationData(pixels, labels, contract, notes)


def require_pixels(contract: ImageContract) -> None:
    """Refuses images where nobody knows how the network takes them.

    Raises:
        DfadcError: mean and std are unknown.
    """
    if not contract.has_pixels:
        raise DfadcError(
            "--data needs the mean and std that the teacher was trained with, and they are unknown",
            "pass --mean and --std, one value a channel, of pixels in [0, 1]",
        )


def normalised_batches(images: Pixels, contract: ImageContract, batch_size: int) -> Iterator[npt.NDArray[np.float32]]:
    """Pixels (N, C, H, W) as the networks take them, float32, at most ``batch_size`` at a time."""
    mean = np.asarray(contract.mean, np.float32).reshape(1, -1, 1, 1)
    std = np.asarray(contract.std, np.float32).reshape(1, -1, 1, 1)
    scale = np.float32(255.0 if images.dtype == np.uint8 else 1.0)
    for start in range(0, len(images), batch_size):
        pixels = images[start : start + batch_size].astype(np.float32) / scale
        yield np.asarray((pixels - mean) / std, np.float32)


def range_notes(images: Pixels) -> tuple[str, ...]:
    """A note on images of 0 and 1 in uint8, which are all but black."""
    if images.dtype != np.uint8 or images.max() > 1:
        return ()
    return ("the images hold only 0 and 1 in uint8, which counts to 255: if 1 means white, save them as float",)


def read_npz(
    path: Path, names: Sequence[str], *, layout: str, optional: Sequence[str] = ()
) -> dict[str, npt.NDArray[Any]]:
    """Arrays of an .npz, in which ``names`` must be; ``layout`` says what it should hold.

    Raises:
        DfadcError: it is none, is damaged, or lacks an array.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise DfadcError(f"--data {path} is neither a folder nor an .npz file", layout)
        return read_arrays(path, names, optional=optional)
    except KeyError as exc:
        raise DfadcError(f"--data {path} has {exc.args[0]}", layout) from exc
    except (OSError, ValueError) as exc:
        raise DfadcError(f"--data {path} cannot be read: {exc}", layout) from exc


def check_images(images: npt.NDArray[Any], contract: ImageContract, path: Path) -> Pixels:
    """(N, C, H, W) uint8 or float32 in [0, 1], or an error that says what to change."""
    channels, height, width = contract.input_size
    if len(images) == 0 if images.ndim else True:
        raise DfadcError(f"--data {path}: `images` is empty", _NPZ_LAYOUT)
    shape = images.shape
    if images.ndim == 4 and shape[1] != channels and shape[3] == channels:
        raise DfadcError(
            f"--data {path}: `images` is {shape}, which looks like N×H×W×C",
            "save it as N×C×H×W: images.transpose(0, 3, 1, 2)",
        )
    if images.ndim not in (3, 4):
        raise DfadcError(f"--data {path}: `images` is {shape}, expected N×C×H×W or N×H×W", _NPZ_LAYOUT)
    found_channels = shape[1] if images.ndim == 4 else 1
    if found_channels != channels:
        raise DfadcError(
            f"--data {path}: images have {found_channels} channel(s), the teacher takes {channels}",
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


def _check_labels(
    labels: npt.NDArray[Any], num_images: int, contract: ImageContract, path: Path
) -> npt.NDArray[np.int64]:
    if labels.shape != (num_images,):
        raise DfadcError(f"--data {path}: `labels` is {labels.shape} for {num_images} images", _NPZ_LAYOUT)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DfadcError(f"--data {path}: `labels` has dtype {labels.dtype}, expected integers", _NPZ_LAYOUT)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= contract.num_classes:
        raise DfadcError(
            f"--data {path}: labels run from {low} to {high}, the teacher has classes 0 to {contract.num_classes - 1}",
            "labels count from 0, in the order of the teacher's outputs",
        )
    return labels.astype(np.int64)
