"""Images with masks of --data: they evaluate, and never influence training.

Nothing that trains may import this module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfadc.errors import DfadcError, some_of
from dfadc.evaluation.image_arrays import (
    EvaluationImages,
    Pixels,
    check_images,
    range_notes,
    read_npz,
    require_pixels,
)
from dfadc.evaluation.image_files import (
    READ_ERRORS,
    SUFFIXES,
    as_network_takes,
    fit_to_size,
    open_image,
    preprocessing_note,
    unread_notes,
)
from dfadc.verification.pixel_outputs import collect_dense
from dfadc.verification.pixel_scores import PixelCounts, boundary_band, count_pixels

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from dfadc.contract import ImageContract

#: Value of a pixel without a label, unless the .npz sets another: as in Pascal VOC and Cityscapes.
IGNORE_LABEL = 255
_NPZ_LAYOUT = (
    "an .npz holds `images` (N×C×H×W or N×H×W, uint8 or float in [0, 1]), `masks` (N×H×W classes) and, if it is not "
    f"{IGNORE_LABEL}, `ignore_label`"
)
_FOLDER_LAYOUT = "lay them out as FOLDER/images/NAME.png and FOLDER/masks/NAME.png, the masks' pixels being classes"


@dataclass(frozen=True, slots=True)
class MaskedImages(EvaluationImages):
    """Images with a class for every pixel, as read.

    Args:
        images: (N, C, H, W), uint8 in 0..255 or float32 in [0, 1].
        masks: (N, H, W) uint16 classes in 0..K-1, or K for a pixel without a label.
        contract: gives mean and std.
        notes: remarks for the user, e.g. on the share of pixels without a label.
    """

    images: Pixels
    masks: npt.NDArray[np.uint16]
    contract: ImageContract
    notes: tuple[str, ...] = ()

    @property
    def targets(self) -> npt.NDArray[np.uint16]:
        """The masks."""
        return self.masks

    def without_borders(self, width: int) -> MaskedImages:
        """The same images, with pixels within ``width`` of a border between classes left out."""
        if not width:
            return self
        masks = np.where(boundary_band(self.masks, width), self.contract.num_classes, self.masks).astype(np.uint16)
        return replace(self, masks=masks)

    def judge(self, batches: Iterable[npt.NDArray[np.float32]]) -> PixelCounts:
        """Pixels of each image by class, from logits (n, K, H, W) for each of :meth:`batches`."""
        outputs = collect_dense(batches, np.zeros(1, np.int32), contract=self.contract, network="the network")
        return count_pixels(outputs.classes, self.masks, self.contract.num_classes)


def load_masked_images(path: Path, contract: ImageContract) -> MaskedImages:
    """Reads an .npz file, or a folder with ``images`` and ``masks`` of the same names.

    Images and masks of a folder are resized and cropped by the contract's preprocessing, or until they just cover its
    size, the masks by the nearest pixel. Those of an .npz must have that size already.

    Raises:
        DfadcError: mean and std are unknown, or the data cannot be read or do not fit the contract.
    """
    require_pixels(contract)
    if path.is_dir():
        if contract.preprocessing is not None and contract.preprocessing.crop_share > 1:
            raise DfadcError(f"--data {path}: crop_share above 1 frames images, and masks have no class for the frame")
        images, masks, taken = _read_folder(path, contract)
        masked = _masked(images, masks, IGNORE_LABEL, contract, path)
        return replace(masked, notes=(*masked.notes, preprocessing_note(contract), *unread_notes(path, taken)))
    if not path.exists():
        raise DfadcError(f"--data {path} does not exist", f"name an .npz file or a folder: {_FOLDER_LAYOUT}")
    read = read_npz(path, ("images", "masks"), layout=_NPZ_LAYOUT, optional=("ignore_label",))
    pixels = check_images(read["images"], contract, path, layout=_NPZ_LAYOUT)
    label = read.get("ignore_label", np.array(IGNORE_LABEL))
    if label.shape != () or not np.issubdtype(label.dtype, np.integer):
        raise DfadcError(f"--data {path}: `ignore_label` is {label.shape} {label.dtype}, expected one integer")
    return _masked(pixels, read["masks"], int(label), contract, path)


def _masked(images: Pixels, masks: npt.NDArray[Any], ignore: int, contract: ImageContract, path: Path) -> MaskedImages:
    """Checks masks against images and classes."""
    num_classes = contract.num_classes
    if masks.shape != (len(images), *contract.input_size[1:]):
        raise DfadcError(
            f"--data {path}: `masks` is {masks.shape} for images {images.shape}",
            "every image needs a mask of its own height and width",
        )
    if not np.issubdtype(masks.dtype, np.integer):
        raise DfadcError(f"--data {path}: `masks` has dtype {masks.dtype}, expected integers", _NPZ_LAYOUT)
    ignored = masks == ignore
    labelled = masks[~ignored]
    if not labelled.size:
        raise DfadcError(f"--data {path}: every pixel has the ignore label {ignore}: there is nothing to judge by")
    low, high = int(labelled.min()), int(labelled.max())
    if low < 0 or high >= num_classes:
        raise DfadcError(
            f"--data {path}: masks run from {low} to {high}, the teacher has classes 0 to {num_classes - 1}",
            f"pixels that do not count hold the ignore label {ignore}; an .npz may name another as `ignore_label`",
        )
    notes = [f"{len(images)} images with masks from {path.name}", *range_notes(images)]
    if share := float(ignored.mean()):
        notes.append(f"{share:.1%} of the pixels have the ignore label {ignore} and do not count")
    counted = np.where(ignored, num_classes, masks).astype(np.uint16)
    return MaskedImages(images, counted, contract, tuple(notes))


def _read_folder(
    folder: Path, contract: ImageContract
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], set[Path]]:
    """Every image of ``folder/images`` with the mask of its name, and the files of both."""
    parts = {name: _files_by_stem(folder / name) for name in ("images", "masks")}
    if contract.channels not in (1, 3):
        raise DfadcError(f"image files have 1 or 3 channels, the teacher takes {contract.channels}", "pass an .npz")
    alone = sorted(parts["images"].keys() ^ parts["masks"].keys())
    if alone:
        raise DfadcError(f"--data {folder}: no pair of image and mask for {some_of(alone)}", _FOLDER_LAYOUT)
    images, masks = [], []
    for stem, path in parts["images"].items():
        mask = parts["masks"][stem]
        try:
            with open_image(path) as image, open_image(mask) as classes:
                images.append(as_network_takes(image, contract))
                masks.append(_read_mask(classes, image.size, contract))
        except READ_ERRORS as exc:
            raise DfadcError(f"--data {folder}: {path.name} or its mask cannot be read: {exc}") from exc
    return np.stack(images), np.stack(masks), {*parts["images"].values(), *parts["masks"].values()}


def _files_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DfadcError(f"--data has no folder {folder}", _FOLDER_LAYOUT)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DfadcError(f"--data {folder} holds no images", f"known suffixes: {', '.join(sorted(SUFFIXES))}")
    return {path.stem: path for path in files}


def _read_mask(mask: Image.Image, size: tuple[int, int], contract: ImageContract) -> npt.NDArray[np.int32]:
    """(H, W) classes: grey values or palette indices."""
    if mask.mode not in ("L", "P", "1") and not mask.mode.startswith("I"):
        raise ValueError(f"mask of mode {mask.mode}: its pixels must be classes, grey or with a palette")
    if mask.size != size:
        raise ValueError(f"mask of {mask.size} for an image of {size}")
    return np.asarray(fit_to_size(mask, contract, Image.Resampling.NEAREST)).astype(np.int32)
