"""Folders of image files, one folder a class, as pixels and labels. For evaluation only."""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dfadc.contract import ImageContract

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MODES = {1: "L", 3: "RGB"}
#: How many names a message lists before it says "and N more".
_MAX_NAMED = 5


def load_image_folder(
    folder: Path, contract: ImageContract
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], tuple[str, ...]]:
    """Decodes every image below ``folder/CLASS/``.

    Returns:
        (N, C, H, W) uint8 pixels, (N,) labels, and notes on the class order and on what was skipped.

    Raises:
        DfadcError: no class folders or images, none readable, folders that fit no class, or a contract of other
            than 1 or 3 channels.
    """
    if contract.channels not in _MODES:
        raise DfadcError(
            f"image files have 1 or 3 channels, the teacher takes {contract.channels}", "pass the images as an .npz"
        )
    class_of, notes = match_classes(_class_folders(folder), contract)
    files = [(path, label) for name, label in class_of.items() for path in _image_files(folder / name)]
    if not files:
        raise DfadcError(f"--data {folder} holds no images", f"known suffixes: {', '.join(sorted(SUFFIXES))}")
    images = np.empty((len(files), *contract.input_size), np.uint8)
    labels: list[int] = []
    unreadable: list[str] = []
    for path, label in files:
        try:
            images[len(labels)] = read_image(path, contract)
        # Pillow reports a damaged file by any of these, depending on the format and on where the damage lies.
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as exc:
            unreadable.append(f"{path.relative_to(folder)} ({exc})")
            continue
        labels.append(label)
    skipped = f"{len(unreadable)} of {len(files)} images in {folder} cannot be read: {_some(unreadable)}"
    if not labels:
        raise DfadcError(f"--data: {skipped}")
    if unreadable:
        notes = (*notes, f"skipped: {skipped}")
    return images[: len(labels)], np.asarray(labels, np.int64), notes


def match_classes(folders: Sequence[str], contract: ImageContract) -> tuple[dict[str, int], tuple[str, ...]]:
    """Folder name -> class index, by the contract's class names where it has them, else by sorted folder name.

    Names are compared without case; a "/" in a class name stands as "_" in a folder's.

    Raises:
        DfadcError: a folder fits no class or several, or there are not as many folders as nameless classes.
    """
    if contract.class_names is None:
        return _by_order(folders, contract.num_classes)
    names = [_folded(name) for name in contract.class_names]
    folded = {folder: _folded(folder) for folder in folders}
    unmatched = [folder for folder in folders if folded[folder] not in names]
    if unmatched:
        raise DfadcError(
            f"--data: {len(unmatched)} folder(s) fit no class of the teacher: {_some(unmatched)}",
            f"name folders after the classes: {_some(contract.class_names)}",
        )
    ambiguous = [folder for folder in folders if names.count(folded[folder]) > 1]
    ambiguous += [folder for folder in folders if Counter(folded.values())[folded[folder]] > 1]
    if ambiguous:
        raise DfadcError(f"--data: folders do not name one class each: {_some(ambiguous)}", "pass an .npz with labels")
    class_of = {folder: names.index(folded[folder]) for folder in folders}
    notes = [f"{len(folders)} folders matched to classes by name"]
    absent = [name for index, name in enumerate(contract.class_names) if index not in class_of.values()]
    if absent:
        notes.append(f"{len(absent)} classes have no folder: {_some(absent)}")
    return class_of, tuple(notes)


def read_image(path: Path, contract: ImageContract) -> npt.NDArray[np.uint8]:
    """One image file as (C, H, W) uint8: channels converted, resized to cover the contract's size, centre-cropped.

    Raises:
        OSError, SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError: it cannot be decoded.
    """
    channels, height, width = contract.input_size
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would clip these to 0..255 in silence.
            raise ValueError(f"pixel mode {image.mode}, more than 8 bits a channel")
        # A palette with transparency has no direct way to RGB in Pillow.
        pixels = image.convert("RGBA") if "transparency" in image.info else image
        pixels = pixels.convert(_MODES[channels])
    array = np.asarray(fit_to_size(pixels, contract, Image.Resampling.BILINEAR), np.uint8)
    return array.reshape(height, width, channels).transpose(2, 0, 1)


def fit_to_size(pixels: Image.Image, contract: ImageContract, resampling: Image.Resampling) -> Image.Image:
    """An image resized until it just covers the contract's size, and centre-cropped."""
    _, height, width = contract.input_size
    scale = max(height / pixels.height, width / pixels.width)
    size = (max(width, round(pixels.width * scale)), max(height, round(pixels.height * scale)))
    if size != pixels.size:
        pixels = pixels.resize(size, resampling)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return pixels.crop((left, top, left + width, top + height))


def _by_order(folders: Sequence[str], num_classes: int) -> tuple[dict[str, int], tuple[str, ...]]:
    if len(folders) != num_classes:
        raise DfadcError(
            f"--data has {len(folders)} class folders, the teacher {num_classes} classes without names",
            "folders are then matched in sorted order, so there must be one for every class",
        )
    ordered = sorted(folders)
    order = _some([f"{index} = {name}" for index, name in enumerate(ordered)])
    note = f"the teacher's classes have no names: folders taken in sorted order ({order})"
    return {name: index for index, name in enumerate(ordered)}, (note,)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DfadcError(f"--data {folder} holds no folders", "lay the images out as FOLDER/CLASS/IMAGE.png")
    return names


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _folded(name: str) -> str:
    return name.strip().casefold().replace("/", "_")


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
