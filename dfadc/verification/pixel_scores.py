"""Pixel accuracy and IoU of segmentation, with bootstrap intervals. numpy only.

Pixels of an image are not independent, images are: intervals are percentiles of a bootstrap over images, with a fixed
seed. With fewer than ``MIN_IMAGES`` images the interval is [0, 1].
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from dfadc.verification.rates import Rate

if TYPE_CHECKING:
    from typing_extensions import Self

Classes = npt.NDArray[np.unsignedinteger[Any]]
Counts = npt.NDArray[np.int64]

#: With fewer images than this no interval is stated, neither of a class nor of the whole.
MIN_IMAGES = 10
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class PixelCounts:
    """Pixels of each image by class, for pixels that have a reference class.

    Args:
        both: (N, K) pixels that reference and candidate put into the class.
        reference: (N, K) that the reference puts into it.
        candidate: (N, K) that the candidate does, among pixels with a reference class.
    """

    both: Counts
    reference: Counts
    candidate: Counts


def count_pixels(candidate: Classes, reference: Classes, num_classes: int) -> PixelCounts:
    """Counts pixels of K classes, from classes (N, H, W) each.

    A candidate's class from K on is wrong; pixels with such a class of the reference are left out.
    """
    side = num_classes + 1
    confusion = np.empty((len(reference), num_classes, side), np.int64)
    for index, (of_candidate, of_reference) in enumerate(zip(candidate, reference, strict=True)):
        counted = of_reference < num_classes
        pairs = of_reference[counted].astype(np.int64) * side + np.minimum(of_candidate[counted], num_classes)
        confusion[index] = np.bincount(pairs, minlength=num_classes * side).reshape(num_classes, side)
    return PixelCounts(
        both=np.diagonal(confusion, axis1=1, axis2=2).copy(),
        reference=confusion.sum(axis=2),
        candidate=confusion[:, :, :num_classes].sum(axis=1),
    )


class _ImageRate(Rate):
    """k of n pixels, with an interval from a bootstrap over images."""

    __slots__ = ()

    interval: tuple[float, float]
    num_images: int

    def bounds(self) -> tuple[float, float]:
        """Bootstrap interval."""
        return self.interval

    @property
    def low_if_perfect(self) -> float:
        """Lower bound for k = n."""
        return 1.0 if self.num_images >= MIN_IMAGES else 0.0


@dataclass(frozen=True, slots=True)
class ClassScore(_ImageRate):
    """Pixels that the reference puts into class ``index``; the candidate puts k of these n there too.

    Args:
        interval: of k / n.
        iou: k over the pixels that either puts there; NaN without any.
        iou_interval: of the IoU.
        num_images: images in which the reference has the class.
    """

    plural: ClassVar[str] = "classes"

    n: int
    k: int
    index: int
    interval: tuple[float, float]
    iou: float
    iou_interval: tuple[float, float]
    num_images: int

    @property
    def name(self) -> str:
        """The class, for messages."""
        return f"class {self.index}"

    @property
    def too_few(self) -> bool:
        """True if the class is in fewer than ``MIN_IMAGES`` images."""
        return self.num_images < MIN_IMAGES

    def to_dict(self) -> dict[str, Any]:
        """Plain values; rates may be NaN."""
        iou = {"iou": self.iou, "iou_low": self.iou_interval[0], "iou_high": self.iou_interval[1]}
        counts = {"class": self.index, "n": self.n, "k": self.k}
        return {**counts, **self.rates(), **iou, "num_images": self.num_images, "too_few": self.too_few}


@dataclass(frozen=True, slots=True)
class PixelScores(_ImageRate):
    """Agreement of the pixels of some images, and the overlap (IoU) of their classes.

    Args:
        k: pixels of all n that candidate and reference put into the same class.
        interval: of k / n.
        mean_iou: over the classes that either predicts.
        mean_iou_interval: of that.
        per_class: one entry a class.
    """

    n: int
    k: int
    num_images: int
    interval: tuple[float, float]
    mean_iou: float
    mean_iou_interval: tuple[float, float]
    per_class: tuple[ClassScore, ...]

    @property
    def agreement(self) -> float:
        """Share of the pixels on which candidate and reference agree."""
        return self.rate

    @property
    def accuracy(self) -> float:
        """Pixel accuracy, if the reference is the labelled masks; the same number as :attr:`agreement`."""
        return self.rate

    @property
    def unit(self) -> str:
        """Plural noun of the samples, for messages."""
        return f"pixels of {self.num_images} images"

    def iou_dict(self) -> dict[str, Any]:
        """Mean IoU under the report's keys; rates may be NaN."""
        low, high = self.mean_iou_interval
        return {"num_images": self.num_images, "mean_iou": self.mean_iou, "mean_iou_low": low, "mean_iou_high": high}

    @classmethod
    def of(cls, counts: PixelCounts, **further: Any) -> Self:
        """Scores with their intervals; ``further`` are the fields that a subclass adds."""
        both, reference, candidate = (_resampled(part) for part in (counts.both, counts.reference, counts.candidate))
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = both / reference
            iou = both / (reference + candidate - both)
            rate = both.sum(axis=1) / reference.sum(axis=1)
            seen = np.isfinite(iou)
            mean_iou = np.where(seen, iou, 0).sum(axis=1) / seen.sum(axis=1)
        num_images = len(counts.reference)
        few = num_images < MIN_IMAGES
        images = (counts.reference > 0).sum(axis=0)
        return cls(
            n=int(counts.reference.sum()),
            k=int(counts.both.sum()),
            num_images=num_images,
            interval=_interval(rate, few=few),
            mean_iou=float(mean_iou[0]),
            mean_iou_interval=_interval(mean_iou, few=few),
            per_class=tuple(
                ClassScore(
                    n=int(counts.reference[:, index].sum()),
                    k=int(counts.both[:, index].sum()),
                    index=index,
                    interval=_interval(recall[:, index], few=few),
                    iou=float(iou[0, index]),
                    iou_interval=_interval(iou[:, index], few=few),
                    num_images=int(images[index]),
                )
                for index in range(counts.reference.shape[1])
            ),
            **further,
        )


@dataclass(frozen=True, slots=True)
class PairedPixels:
    """Paired comparison of two networks' pixel agreement with one reference.

    Args:
        num_images: images compared.
        drop: pixel agreement of the first network less the second's.
        low: the drop is larger than this with 95 % confidence, by a bootstrap over images; ``drop`` itself for fewer
            than ``MIN_IMAGES``, so that no drop of theirs passes for chance.
    """

    num_images: int
    drop: float
    low: float

    @classmethod
    def of(cls, lost: Counts, counted: Counts) -> Self:
        """Drop with its bound; (N,) correct pixels of the first network less the second's, and pixels compared."""
        sums = _resampled(np.stack([lost, counted], axis=1))
        with np.errstate(invalid="ignore", divide="ignore"):
            drops = sums[:, 0] / sums[:, 1]
        finite = drops[1:][np.isfinite(drops[1:])]
        low = drops[0] if len(lost) < MIN_IMAGES or not finite.size else min(np.quantile(finite, 0.05), drops[0])
        return cls(len(lost), float(drops[0]), float(low))

    def holds(self, limit: float) -> bool:
        """True if the drop is within the limit, in [0, 1], or may be chance; NaN holds nothing."""
        return self.drop <= limit or (limit >= 0 and self.low <= 0)

    def describe(self, limit: float) -> str:
        """The interval and the rule in a sentence."""
        rule = f"fails if more than {100 * limit:g} points are lost"
        if self.num_images < MIN_IMAGES:
            return f"{rule}; {self.num_images} images are too few to tell a drop from chance, so every drop counts"
        return (
            f"at least {100 * self.low:+.2f} with 95 % confidence (paired bootstrap over {self.num_images} images); "
            f"{rule} and that bound is above 0"
        )


def boundary_band(classes: Classes, width: int) -> npt.NDArray[np.bool_]:
    """(N, H, W) pixels within ``width`` of a pixel of another class, diagonals counted as one."""
    band = np.zeros(classes.shape, np.bool_)
    for axis in (1, 2):
        border = np.diff(classes.astype(np.int32), axis=axis) != 0
        before, after = [slice(None)] * 3, [slice(None)] * 3
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        band[tuple(before)] |= border
        band[tuple(after)] |= border
    for _ in range(width - 1):
        grown = np.pad(band, ((0, 0), (1, 1), (1, 1)))
        height, breadth = classes.shape[1], classes.shape[2]
        band = np.logical_or.reduce(
            [grown[:, row : row + height, column : column + breadth] for row in range(3) for column in range(3)]
        )
    return band


def _resampled(counts: Counts) -> npt.NDArray[np.float64]:
    """(1 + RESAMPLES, K) sums over the images (N, K): first as they are, then over images drawn with replacement."""
    return np.concatenate([counts.sum(axis=0)[None], _draws(len(counts)) @ counts]).astype(np.float64)


@functools.lru_cache(maxsize=8)
def _draws(num_images: int) -> npt.NDArray[np.float64]:
    """(RESAMPLES, N): number of times that each image is drawn; the same in every call."""
    if num_images == 0:
        return np.zeros((RESAMPLES, 0))
    shares = np.full(num_images, 1 / num_images)
    return np.random.default_rng(0).multinomial(num_images, shares, size=RESAMPLES).astype(np.float64)


def _interval(values: npt.NDArray[np.float64], *, few: bool) -> tuple[float, float]:
    """The middle 95 % of resamples (1 + RESAMPLES,), widened to the observed value, which comes first."""
    finite = values[1:][np.isfinite(values[1:])]
    if few or not finite.size or not np.isfinite(values[0]):
        return 0.0, 1.0
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(min(low, values[0])), float(max(high, values[0]))
