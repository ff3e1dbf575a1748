"""Reads the papers' data sets: through torchvision where it has them, else from a folder of images and masks.

Only teachers and evaluation see what this module reads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from PIL import Image
from torch import Tensor

from dfadc.errors import DfadcError
from dfadc.evaluation.image_files import SUFFIXES, open_image
from dfadc.evaluation.image_folder import load_image_folder

if TYPE_CHECKING:
    from experiments import Dataset

SplitName = Literal["train", "test"]
#: The label of pixels that belong to no class.
NO_CLASS = 255
#: Of a data set that comes without a split, every such image is a test image.
TEST_EVERY = 5
#: Where a split's images and masks may lie, relative to the folder: ours, and that of CamVid's common copy.
DENSE_LAYOUTS = (("{split}/images", "{split}/masks"), ("{split}", "{split}annot"))


class Split(NamedTuple):
    """Images (N, C, H, W) uint8 in the contract's size, and labels (N,) or (N, H, W) int64, 255 for no class."""

    images: Tensor
    labels: Tensor


def read_split(dataset: Dataset, split: SplitName, folder: Path | None) -> Split:
    """Reads the training or the test images.

    Args:
        dataset: which.
        split: ``train`` or ``test``.
        folder: ``train/`` and ``test/`` with one folder a class, or with images and masks, or a folder that torchvision
            downloaded into; None: torchvision downloads into the temporary folder.

    Raises:
        DfadcError: the data are not there or do not fit the contract.
    """
    if dataset.contract.task == "segmentation":
        return _read_masks(dataset, split, folder)
    if folder is not None and (folder / split).is_dir():
        images, labels, _ = load_image_folder(folder / split, dataset.contract)
        return Split(torch.from_numpy(images), torch.from_numpy(labels))
    return _read_torchvision(dataset, split, folder)


def _read_torchvision(dataset: Dataset, split: SplitName, folder: Path | None) -> Split:
    root = Path(tempfile.gettempdir()) / "dfadc-paper" if folder is None else folder
    kind = getattr(torchvision.datasets, dataset.torchvision)
    settings: dict[str, Any] = {"root": str(root), "download": folder is None}
    has_split = dataset.torchvision != "Caltech101"
    if has_split:
        settings["train"] = split == "train"
    try:
        examples = kind(**settings)
    except RuntimeError as exc:
        raise DfadcError(
            f"{root} does not hold {dataset.torchvision} as torchvision lays it out: {exc}",
            "leave --data away to download it, or give a folder with train/CLASS and test/CLASS",
        ) from exc
    chosen: Iterable[int] = range(len(examples))
    if not has_split:
        chosen = [index for index in chosen if (index % TEST_EVERY == 0) == (split == "test")]
    channels, height, width = dataset.contract.input_size
    images = np.empty((len(list(chosen)), channels, height, width), np.uint8)
    labels = np.empty(len(images), np.int64)
    for row, index in enumerate(chosen):
        image, labels[row] = examples[index]
        images[row] = _as_array(image.convert("L" if channels == 1 else "RGB"), (height, width))
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _read_masks(dataset: Dataset, split: SplitName, folder: Path | None) -> Split:
    if folder is None:
        raise DfadcError("torchvision does not have this data set", "name its folder with --data; the README says how")
    pairs = list(_pairs(folder, split))
    size = dataset.contract.input_size[1:]
    images, labels = [], []
    for image_path, mask_path in pairs:
        with open_image(image_path) as image, open_image(mask_path) as mask:
            if image.size != mask.size:
                raise DfadcError(f"{mask_path} is {mask.size}, its image {image.size}", "masks are as large as images")
            if mask.mode not in ("L", "P", "1"):
                raise DfadcError(
                    f"{mask_path} has mode {mask.mode}, not a class number for each pixel",
                    "turn colours into class numbers, 8 bits a pixel",
                )
            images.append(_as_array(image.convert("RGB"), size))
            numbers = _as_array(mask, size, Image.Resampling.NEAREST)[0].astype(np.int64) - dataset.first_label
        is_class = (numbers >= 0) & (numbers < dataset.contract.num_classes)
        labels.append(np.where(is_class, numbers, NO_CLASS))
    return Split(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)))


def _pairs(folder: Path, split: SplitName) -> Iterator[tuple[Path, Path]]:
    """Images and their masks, which have the same name but for the suffix, in sorted order."""
    layouts = [
        (folder / images.format(split=split), folder / masks.format(split=split)) for images, masks in DENSE_LAYOUTS
    ]
    found = next(((images, masks) for images, masks in layouts if masks.is_dir()), None)
    if found is None:
        looked = " nor ".join(str(masks) for _, masks in layouts)
        raise DfadcError(
            f"there is neither {looked}", "lay it out as train/images, train/masks, test/images, test/masks"
        )
    images, masks = (
        {path.stem: path for path in sorted(place.iterdir()) if path.suffix.lower() in SUFFIXES} for place in found
    )
    if images.keys() != masks.keys() or not images:
        odd = sorted(images.keys() ^ masks.keys())
        problem = f"images without a mask or masks without an image: {', '.join(odd[:5])}" if odd else "no images"
        raise DfadcError(f"{found[0]} and {found[1]} hold {problem}", "an image and its mask have the same name")
    for stem, image in images.items():
        yield image, masks[stem]


def _as_array(
    image: Image.Image, size: tuple[int, ...], resample: Image.Resampling = Image.Resampling.BILINEAR
) -> npt.NDArray[np.uint8]:
    """(C, H, W): resized until it just covers the size, and centre-cropped, as ``--data`` does it."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image.resize(covering, resample) if covering != image.size else image
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    array = np.asarray(resized.crop((left, top, left + width, top + height)), np.uint8)
    return array.reshape(height, width, -1).transpose(2, 0, 1)
