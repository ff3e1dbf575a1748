"""Labelled images of --data: they evaluate, and never influence training.

Nothing that trains may import this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.errors import DfadcError
from dfadc.evaluation.image_arrays import (
    EvaluationImages,
    Pixels,
    check_images,
    range_notes,
    read_npz,
    require_pixels,
)
from dfadc.evaluation.image_folder import load_image_folder
from dfadc.verification.agreement import predict

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from dfadc.contract import ImageContract

_IMAGES = "an .npz holds `images` (N×C×H×W or N×H×W, uint8 or float in [0, 1])"
_NPZ_LAYOUT = f"{_IMAGES} and `labels` (N integers)"
_LABELS_LAYOUT = f"{_IMAGES} and `labels` (N×K, 1 where label k is on and 0 where it is off)"


@dataclass(frozen=True, slots=True)
class EvaluationData(EvaluationImages):
    """Labelled images, as read.

    Args:
        images: (N, C, H, W), uint8 in 0..255 or float32 in [0, 1].
        labels: (N,) int64 in 0..K-1, or (N, K) of 0 and 1 where an image has several labels.
        contract: gives mean and std.
        notes: remarks for the user, e.g. on the order of classes and on skipped files.
    """

    images: Pixels
    labels: npt.NDArray[np.int64]
    contract: ImageContract
    notes: tuple[str, ...] = ()

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """The labels."""
        return self.labels

    def judge(self, batches: Iterable[npt.NDArray[np.float32]]) -> npt.NDArray[np.bool_]:
        """Correctness of the logits (n, K) for each of :meth:`batches`.

        Returns:
            (N,) True for each image whose top-1 class is its label, or (N, K) for each label that is predicted rightly.
        """
        return np.asarray(np.concatenate([predict(logits, self.contract.task) for logits in batches]) == self.labels)


def load_evaluation_data(path: Path, contract: ImageContract) -> EvaluationData:
    """Reads an image folder (one folder a class) or an .npz file.

    Folder images are converted to the contract's channels, turned upright, and resized and cropped by its
    preprocessing; where it has none, until they just cover its size. Images of an .npz must have that size already.

    Raises:
        DfadcError: mean and std are unknown, or the data cannot be read or do not fit the contract.
    """
    require_pixels(contract)
    if contract.is_dense:
        raise DfadcError(f"--data with one label an image does not fit the task {contract.task}")
    layout = _LABELS_LAYOUT if contract.task == "multilabel" else _NPZ_LAYOUT
    if path.is_dir() and contract.task == "multilabel":
        raise DfadcError(f"--data {path} is a folder, whose images have one class each, not several labels", layout)
    if path.is_dir():
        images, labels, notes = load_image_folder(path, contract)
        return EvaluationData(images, labels, contract, (*notes, *range_notes(images)))
    if not path.exists():
        raise DfadcError(f"--data {path} does not exist", "name a folder with one folder a class, or an .npz file")
    read = read_npz(path, ("images", "labels"), layout=layout)
    pixels = check_images(read["images"], contract, path, layout=layout)
    check = _check_label_sets if contract.task == "multilabel" else _check_labels
    labels = check(read["labels"], len(pixels), contract, path)
    notes = (f"{len(pixels)} labelled images from {path.name}", *range_notes(pixels))
    return EvaluationData(pixels, labels, contract, notes)


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


def _check_label_sets(
    labels: npt.NDArray[Any], num_images: int, contract: ImageContract, path: Path
) -> npt.NDArray[np.int64]:
    """(N, K) of 0 and 1, from integers, floats or truth values."""
    if labels.shape != (num_images, contract.num_classes):
        raise DfadcError(
            f"--data {path}: `labels` is {labels.shape} for {num_images} images and a teacher of "
            f"{contract.num_classes} labels",
            _LABELS_LAYOUT,
        )
    is_number = np.issubdtype(labels.dtype, np.number) or labels.dtype == np.bool_
    if not is_number or not np.isin(labels, (0, 1)).all():
        found = f"hold {labels[~np.isin(labels, (0, 1))][0]}" if is_number else f"have dtype {labels.dtype}"
        raise DfadcError(
            f"--data {path}: `labels` {found}; 1 is on and 0 is off",
            "where -1 means off, save labels > 0; leave images out whose labels are not all known",
        )
    return labels.astype(np.int64)
