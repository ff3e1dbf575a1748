"""Comparison C: how evenly the teacher's predictions spread over its classes, or over sets of labels. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Coverage:
    """Histogram of the teacher's predictions: of its classes, or of its sets of labels.

    Args:
        counts: samples (or pixels) of each of the K classes; of several labels those off and on, two entries a label.
        num_nonfinite: samples left out because the teacher's logits are NaN or infinite.
        sets: samples of each set of labels that occurs; None for one class a prediction.
    """

    counts: tuple[int, ...]
    num_nonfinite: int
    sets: tuple[int, ...] | None = None

    @property
    def histogram(self) -> tuple[int, ...]:
        """Samples of each prediction."""
        return self.counts if self.sets is None else self.sets

    @property
    def n(self) -> int:
        """Samples counted."""
        return sum(self.histogram)

    @property
    def entropy(self) -> float:
        """Entropy of the histogram over the most that n samples of K predictions can have, ln min(n, K).

        1 is as even as can be, 0 is one prediction (or fewer than two samples).
        """
        if self.n < 2:
            return 0.0
        num_predictions = len(self.counts) if self.sets is None else 2 ** (len(self.counts) // 2)
        shares = [count / self.n for count in self.histogram if count]
        most = math.log(min(self.n, num_predictions))
        return min(1.0, max(0.0, -math.fsum(share * math.log(share) for share in shares) / most))

    @property
    def largest_share(self) -> float:
        """Share of the teacher's commonest prediction; 0 without samples."""
        return max(self.histogram) / self.n if self.n else 0.0

    @property
    def num_empty(self) -> int:
        """Classes that the teacher never predicts."""
        return self.counts.count(0)

    @property
    def is_complete(self) -> bool:
        """False if a label is on or off in no sample: of another nothing is known. Classes may be missing."""
        return self.sets is None or self.num_empty == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "n": self.n,
            "entropy": self.entropy,
            "num_empty": self.num_empty,
            "num_nonfinite": self.num_nonfinite,
            "counts": list(self.counts),
        }


def measure_coverage(classes: npt.NDArray[np.integer[Any]], num_classes: int) -> Coverage:
    """Histogram of top-1 classes (N,), or of pixels (N, H, W); a value outside 0..K-1 has no class."""
    valid = (classes >= 0) & (classes < num_classes)
    counts = np.bincount(classes[valid], minlength=num_classes)
    incomplete = ~valid.all(axis=tuple(range(1, valid.ndim)))
    return Coverage(counts=tuple(map(int, counts)), num_nonfinite=int(incomplete.sum()))


def measure_label_coverage(labels: npt.NDArray[np.integer[Any]]) -> Coverage:
    """Histogram of the sets of labels; labels: (N, K), 1 on, 0 off, and -1 in samples without a prediction."""
    finite = (labels >= 0).all(axis=1)
    valid = labels[finite]
    states = np.stack([(valid == 0).sum(axis=0), (valid == 1).sum(axis=0)], axis=1)
    _, sets = np.unique(valid, axis=0, return_counts=True)
    return Coverage(tuple(map(int, states.reshape(-1))), int((~finite).sum()), tuple(map(int, sets)))
