"""Folders of image files, one folder for each class, as pixels and labels. For evaluation only."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dfadc.errors import DfadcError, some_of
from dfadc.evaluation.image_files import (
    MODES,
    READ_ERRORS,
    SUFFIXES,
    preprocessing_note,
    read_image,
    unread_notes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dfadc.contract import ImageContract


def load_image_folder(
    folder: Path, contract: ImageContract
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], tuple[str, ...]]:
    """Decodes every image below ``folder/CLASS/``.

    Returns:
        (N, C, H, W) uint8 pixels, (N,) labels, and notes on the class order and on skipped files.

    Raises:
        DfadcError: no class folders or images, none readable, folders that fit no class, or a contract of other
            than 1 or 3 channels.
    """
    if contract.channels not in MODES:
        raise DfadcError(
            f"image files have 1 or 3 channels, the teacher takes {contract.channels}", "pass the images as an .npz"
        )
    class_of, notes = match_classes(_class_folders(folder), contract)
    by_class = {
        name: sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        for name in class_of
    }
    files = [(path, label) for name, label in class_of.items() for path in by_class[name]]
    if not files:
        raise DfadcError(f"--data {folder} holds no images", f"known suffixes: {', '.join(sorted(SUFFIXES))}")
    notes = (*notes, preprocessing_note(contract))
    if empty := [name for name, found in by_class.items() if not found]:
        notes = (*notes, f"{len(empty)} class folders hold no images: {some_of(empty)}")
    notes = (*notes, *unread_notes(folder, {path for path, _ in files}))
    images = np.empty((len(files), *contract.input_size), np.uint8)
    labels: list[int] = []
    unreadable: list[str] = []
    for path, label in files:
        try:
            images[len(labels)] = read_image(path, contract)
        except READ_ERRORS as exc:
            unreadable.append(f"{path.relative_to(folder)} ({exc})")
            continue
        labels.append(label)
    skipped = f"{len(unreadable)} of {len(files)} images in {folder} cannot be read: {some_of(unreadable)}"
    if not labels:
        raise DfadcError(f"--data: {skipped}")
    if unreadable:
        notes = (*notes, f"skipped: {skipped}")
    return images[: len(labels)], np.asarray(labels, np.int64), notes


def match_classes(folders: Sequence[str], contract: ImageContract) -> tuple[dict[str, int], tuple[str, ...]]:
    """Folder name -> class index, by the contract's class names if it has them, else by sorted folder name.

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
            f"--data: {len(unmatched)} folder(s) fit no class of the teacher: {some_of(unmatched)}",
            f"name folders after the classes: {some_of(contract.class_names)}",
        )
    ambiguous = [folder for folder in folders if names.count(folded[folder]) > 1]
    ambiguous += [folder for folder in folders if Counter(folded.values())[folded[folder]] > 1]
    if ambiguous:
        raise DfadcError(
            f"--data: folders do not name one class each: {some_of(ambiguous)}", "pass an .npz with labels"
        )
    class_of = {folder: names.index(folded[folder]) for folder in folders}
    notes = [f"{len(folders)} folders matched to classes by name"]
    absent = [name for index, name in enumerate(contract.class_names) if index not in class_of.values()]
    if absent:
        notes.append(f"{len(absent)} classes have no folder: {some_of(absent)}")
    return class_of, tuple(notes)


def _by_order(folders: Sequence[str], num_classes: int) -> tuple[dict[str, int], tuple[str, ...]]:
    if len(folders) != num_classes:
        raise DfadcError(
            f"--data has {len(folders)} class folders, the teacher {num_classes} classes without names",
            "folders are then matched in sorted order, so there must be one for every class",
        )
    ordered = sorted(folders)
    order = some_of([f"{index} = {name}" for index, name in enumerate(ordered)])
    note = f"the teacher's classes have no names: folders taken in sorted order ({order})"
    return {name: index for index, name in enumerate(ordered)}, (note,)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DfadcError(f"--data {folder} holds no folders", "lay the images out as FOLDER/CLASS/IMAGE.png")
    return names


def _folded(name: str) -> str:
    return name.strip().casefold().replace("/", "_")
