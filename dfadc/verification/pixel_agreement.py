"""How far answers for every pixel agree: what is kept of them, and two networks' against each other. numpy only."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.verification.agreement import (
    ALL_SOURCES,
    TIE_MARGIN,
    Accuracy,
    Agreement,
    Coverage,
    Ties,
    compare,
    logit_scale,
)
from dfadc.verification.pixel_scores import Classes, PairedPixels, PixelScores, boundary_band, count_pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

#: Pixels of each image whose logits are kept whole.
NUM_POSITIONS = 32


@dataclass(frozen=True, slots=True)
class DenseAnswers:
    """What a network answers to images, without most of its logits.

    Args:
        classes: (N, H, W) uint8, or uint16 from 255 classes; the dtype's highest value, which is no class, where a
            logit is NaN or infinite.
        margins: (N, H, W) float16, highest minus second highest logit.
        logits: (N, P, K) float32, all logits of a few pixels.
    """

    classes: Classes
    margins: npt.NDArray[np.float16]
    logits: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, part: Any) -> Self:
        return replace(self, classes=self.classes[part], margins=self.margins[part], logits=self.logits[part])

    @property
    def no_class(self) -> int:
        """The class of a pixel without one."""
        return int(np.iinfo(self.classes.dtype).max)

    @classmethod
    def of(cls, logits: npt.NDArray[np.float32], positions: npt.NDArray[np.int32]) -> Self:
        """Digests logits (N, K, H, W); positions: (P,), which pixels' logits are kept, counted row by row."""
        n, num_classes, height, width = logits.shape
        dtype = class_dtype(num_classes)
        finite = np.asarray(np.isfinite(logits).all(axis=1))
        top_two = np.partition(np.where(finite[:, None], logits, 0), num_classes - 2, axis=1)[:, -2:]
        margins = np.minimum(top_two[:, 1] - top_two[:, 0], np.finfo(np.float16).max).astype(np.float16)
        classes: Classes = np.where(finite, logits.argmax(axis=1), np.iinfo(dtype).max).astype(dtype)
        kept = logits.reshape(n, num_classes, height * width)[:, :, positions].transpose(0, 2, 1)
        return cls(classes, margins, np.ascontiguousarray(kept, np.float32))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One after the other; at least one."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def class_dtype(num_classes: int) -> type[np.uint8 | np.uint16]:
    """The smallest dtype that holds the classes and one value more."""
    return np.uint8 if num_classes < np.iinfo(np.uint8).max else np.uint16


def choose_positions(height: int, width: int) -> npt.NDArray[np.int32]:
    """(P,) pixels whose logits are kept, at random over the image and always the same."""
    number = min(NUM_POSITIONS, height * width)
    return np.sort(np.random.default_rng(0).choice(height * width, number, replace=False)).astype(np.int32)


@dataclass(frozen=True, slots=True)
class DenseAgreement(Ties, PixelScores):
    """A candidate's answers against a reference's on the same images.

    Args:
        num_ties: pixels whose reference margin is below ``TIE_MARGIN`` of their image's :func:`logit_scale`.
        num_tied_disagreements: of those, the ones whose class differs.
        kl: mean KL(softmax(reference) || softmax(candidate)), in nats, over the pixels whose logits are kept.
        sqnr_db: as in :class:`Agreement`, over those pixels.
        max_logit_error: likewise.
        num_nonfinite: images with a pixel without a class on either side.
        boundary_width: pixels within so many of a border between the reference's classes are left out.
    """

    num_ties: int
    num_tied_disagreements: int
    kl: float
    sqnr_db: float
    max_logit_error: float
    num_nonfinite: int
    boundary_width: int

    @property
    def outside_ties(self) -> Self:
        """Itself: the interval is one over whole images, and among so many pixels few ties fail no good export."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names that :class:`Agreement` has, and those of overlap; may be NaN or infinite."""
        shared = (
            *("n", "k", "agreement", "low", "high", "num_ties", "num_tied_disagreements"),
            *("kl", "sqnr_db", "max_logit_error", "num_nonfinite"),
        )
        return {
            **{name: getattr(self, name) for name in shared},
            "top5": None,
            **self.iou_dict(),
            "boundary_width": self.boundary_width,
            "per_class": [entry.to_dict() for entry in self.per_class],
        }


Measured = Agreement | DenseAgreement
MeasuredAccuracy = Accuracy | PixelScores


def compare_dense(
    candidate: DenseAnswers,
    reference: DenseAnswers,
    *,
    source: npt.NDArray[np.integer[Any]],
    sources: Sequence[str],
    boundary_width: int = 0,
) -> dict[str, DenseAgreement]:
    """Two networks' answers to the same images: over all (key ``ALL_SOURCES``) and over each source's.

    Args:
        candidate: what is being judged.
        reference: what it is held against.
        source: (N,) index into ``sources`` of each image.
        sources: the sources' names.
        boundary_width: how many pixels on each side of a border between the reference's classes do not count.

    Raises:
        ValueError: the answers are to other images or of other classes.
    """
    shapes = [(given.classes.shape, given.logits.shape) for given in (candidate, reference)]
    if shapes[0] != shapes[1] or source.shape != (len(reference),):
        raise ValueError(f"candidate answers are {shapes[0]}, reference answers {shapes[1]}, sources {source.shape}")
    num_classes = reference.logits.shape[2]
    judged = _judged_classes(reference, boundary_width)
    counts = count_pixels(candidate.classes, judged, num_classes)
    differs = (candidate.classes != judged) & (judged < num_classes)
    lost = ((candidate.classes >= num_classes) | (reference.classes >= num_classes)).any(axis=(1, 2))
    kept = np.where(np.isfinite(reference.logits), reference.logits, 0).reshape(len(reference), -1)
    ties = (judged < num_classes) & (reference.margins < TIE_MARGIN * logit_scale(kept)[:, None, None])
    parts = {ALL_SOURCES: np.ones(len(source), np.bool_)}
    parts |= {name: np.asarray(source == index) for index, name in enumerate(sources)}
    found = {}
    for name, part in parts.items():
        whole = compare(*(given.logits[part].reshape(-1, num_classes) for given in (candidate, reference)))
        scores = PixelScores.of(counts[part])
        found[name] = DenseAgreement(
            **{field.name: getattr(scores, field.name) for field in fields(scores)},
            num_ties=int(ties[part].sum()),
            num_tied_disagreements=int((ties & differs)[part].sum()),
            kl=whole.kl,
            sqnr_db=whole.sqnr_db,
            max_logit_error=whole.max_logit_error,
            num_nonfinite=int(lost[part].sum()),
            boundary_width=boundary_width,
        )
    return found


def pair_dense(
    before: DenseAnswers, after: DenseAnswers, reference: DenseAnswers, *, boundary_width: int
) -> PairedPixels:
    """Two networks' answers to the same images, each against the same reference's.

    Args:
        before: what must not be fallen behind.
        after: what is being judged.
        reference: whose classes both should answer with.
        boundary_width: as in :func:`compare_dense`.
    """
    judged = _judged_classes(reference, boundary_width)
    counted = judged < reference.logits.shape[2]
    right_before, right_after = ((answers.classes == judged) & counted for answers in (before, after))
    lost = right_before.sum(axis=(1, 2)) - right_after.sum(axis=(1, 2))
    return PairedPixels.of(lost, counted.sum(axis=(1, 2)))


def _judged_classes(reference: DenseAnswers, boundary_width: int) -> Classes:
    """(N, H, W) the reference's classes; no class within ``boundary_width`` of a border between two of them."""
    if not boundary_width:
        return reference.classes
    band = boundary_band(reference.classes, boundary_width)
    judged: Classes = np.where(band, reference.no_class, reference.classes).astype(reference.classes.dtype)
    return judged


def cover_dense(
    teacher: DenseAnswers, *, source: npt.NDArray[np.integer[Any]], sources: Sequence[str]
) -> dict[str, Coverage]:
    """How the teacher's pixels spread over its classes: over all images and over each source's."""
    num_classes = teacher.logits.shape[2]
    parts = {ALL_SOURCES: np.ones(len(source), np.bool_)}
    parts |= {name: np.asarray(source == index) for index, name in enumerate(sources)}
    found = {}
    for name, part in parts.items():
        counts = np.bincount(teacher.classes[part].ravel(), minlength=num_classes)
        lost = (teacher.classes[part] >= num_classes).any(axis=(1, 2)).sum()
        found[name] = Coverage(counts=tuple(map(int, counts[:num_classes])), num_nonfinite=int(lost))
    return found
