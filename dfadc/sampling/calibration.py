"""Selection of calibration images, and ``calibration.npz``, the file that holds them. Free of torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dfadc.array_file import read_arrays
from dfadc.distillation.images.class_order import class_order, classes_to_balance
from dfadc.errors import DfadcError
from dfadc.storage import atomic_write

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dfadc.contract import Task
    from dfadc.verification.stored_images import StoredImages

_ARRAYS = ("images", "source", "sources", "classes")
#: Share of each source; a reservoir over the whole run, the final generator and the prior generator.
_SHARES = {"reservoir": 0.5, "generator": 0.25, "prior": 0.25}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Images that INT8 is calibrated with; in random order, so that any stretch of them is a sample of all.

    Args:
        images: (N, C, H, W) as :func:`dfadc.verification.stored_images.quantise` stores them.
        source: (N,) int8 index into ``sources``.
        sources: names of the sources, e.g. ``("reservoir", "generator", "prior")``.
        classes: (N,) int64, the class that the teacher sees in each image, or the rarest state of its labels.
        notes: what was not as the recipe asks, for a person to read; not part of the file.
    """

    images: StoredImages
    source: npt.NDArray[np.int8]
    sources: tuple[str, ...]
    classes: npt.NDArray[np.int64]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def save(self, path: Path) -> None:
        """Writes the images, whole or not at all; the same images give the same bytes.

        Raises:
            StorageFailed: the file cannot be written.
        """
        arrays = {name: np.asarray(getattr(self, name)) for name in _ARRAYS}
        with atomic_write(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)


def load_images(path: Path, *, input_size: tuple[int, int, int]) -> StoredImages:
    """The images (N, C, H, W) of a ``calibration.npz``, as they are stored.

    Args:
        path: the file.
        input_size: (C, H, W) that the images must have.

    Raises:
        DfadcError: the file is missing or damaged, or its images are others.
    """
    remake = "a finished run holds it as calibration.npz: take it from there again"
    try:
        images: StoredImages = read_arrays(path, ("images",))["images"]
    except (OSError, KeyError, ValueError) as exc:
        raise DfadcError(f"cannot read the calibration images in {path}: {exc}", remake) from exc
    if images.ndim != 4 or images.shape[1:] != input_size or images.dtype not in (np.uint8, np.float16):
        found = f"images of {images.shape[1:]}, {images.dtype}"
        raise DfadcError(f"{path} holds {found}; expected {input_size}, uint8 or float16", remake)
    return images


def choose_calibration(
    candidates: Mapping[str, StoredImages],
    teacher_logits: Mapping[str, npt.NDArray[np.float32]],
    *,
    num_images: int,
    exclude: StoredImages,
    task: Task = "classification",
) -> Calibration:
    """Chooses images from several sources, evenly over the teacher's classes within each.

    Each source gives its share; where it has too few, the others fill up in the order of ``candidates``, and a note
    says so. Of images that occur twice the first is used.

    Args:
        candidates: images (N, C, H, W) of each source as they are stored, the earlier ones preferred.
        teacher_logits: (N, K) of each source; an image with a logit that is not finite is left out.
        num_images: how many images.
        exclude: stored images that must not be among them: the verification samples.
        task: of the teacher; images of several labels are chosen evenly over the labels' states.
    """
    seen = set(_digests(exclude))
    shares = [_SHARES[name] for name in candidates]
    usable = {name: _usable(images, teacher_logits[name], seen) for name, images in candidates.items()}
    classes = {name: classes_to_balance(teacher_logits[name][indices], task) for name, indices in usable.items()}
    ranked = {name: class_order(found) for name, found in classes.items()}
    available = [len(indices) for indices in ranked.values()]
    wanted = _quotas(shares, num_images)
    taken = _fill(wanted, available, num_images)
    chosen = {name: order[:count] for (name, order), count in zip(ranked.items(), taken, strict=True)}
    # Whoever holds every n-th image out must not hold out some classes and sources only.
    order = np.random.default_rng(0).permutation(sum(taken))
    return Calibration(
        images=np.concatenate([candidates[name][usable[name]][places] for name, places in chosen.items()])[order],
        source=np.repeat(np.arange(len(chosen), dtype=np.int8), taken)[order],
        sources=tuple(chosen),
        classes=np.concatenate([np.array(classes[name], np.int64)[places] for name, places in chosen.items()])[order],
        notes=_notes(list(chosen), wanted, available, num_images),
    )


def _usable(images: StoredImages, logits: npt.NDArray[np.float32], seen: set[bytes]) -> list[int]:
    """Indices of the usable images that are not in ``seen``, which grows by them."""
    usable = []
    for index, digest in enumerate(_digests(images)):
        if digest not in seen and np.isfinite(logits[index]).all():
            seen.add(digest)
            usable.append(index)
    return usable


def _quotas(shares: Sequence[float], count: int) -> list[int]:
    """Whole numbers in proportion to ``shares`` (which add up to 1) whose sum is ``count``."""
    ends = [round(share * count) for share in accumulate(shares)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _fill(wanted: Sequence[int], available: Sequence[int], total: int) -> list[int]:
    """Images of each source: as many as wanted and available; sources with more make up ``total``."""
    taken = [min(pair) for pair in zip(wanted, available, strict=True)]
    for position, stock in enumerate(available):
        taken[position] += min(total - sum(taken), stock - taken[position])
    return taken


def _notes(names: Sequence[str], wanted: Sequence[int], available: Sequence[int], total: int) -> tuple[str, ...]:
    short = [
        f"{name}: {stock} usable images, {count} wanted"
        for name, count, stock in zip(names, wanted, available, strict=True)
        if stock < count
    ]
    if sum(available) < total:
        short.append(f"{sum(available)} calibration images in all, {total} wanted")
    return tuple(short)


def _digests(images: StoredImages) -> Iterator[bytes]:
    """Digests of stored images, 16 bytes each, for the images themselves may be large."""
    for image in images:
        yield hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
