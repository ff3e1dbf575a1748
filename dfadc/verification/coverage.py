"""Comparison C: how evenly the teacher's predictions spread over its classes. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Coverage:
    """Class histogram of the teacher's predictions.

    Args:
        counts: samples (or pixels) of each of the K classes.
        num_nonfinite: samples left out because the teacher's logits are NaN or infinite.
    """

    counts: tuple[int, ...]
    num_nonfinite: int

    @property
    def n(self) -> int:
        """Samples counted."""
        return sum(self.counts)

    @property
    def entropy(self) -> float:
        """Entropy of the class histogram over the most that n samples of K classes can have, ln min(n, K).

        1 is as even as can be, 0 is one class (or fewer than two samples).
        """
        if self.n < 2:
            return 0.0
        shares = [count / self.n for count in self.counts if count]
        most = math.log(min(self.n, len(self.counts)))
        return min(1.0, max(0.0, -math.fsum(share * math.log(share) for share in shares) / most))

    @property
    def largest_share(self) -> float:
        """Share of the teacher's commonest class; 0 without samples."""
        return max(self.counts) / self.n if self.n else 0.0

    @property
    def num_empty(self) -> int:
        """Classes that the teacher never predicts."""
        return self.counts.count(0)

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
    """Class histogram of the teacher's predictions.

    Args:
        classes: (N,) top-1 classes of samples, or (N, H, W) of pixels; a value outside 0..K-1 has no class.
        num_classes: K.
    """
    valid = (classes >= 0) & (classes < num_classes)
    counts = np.bincount(classes[valid], minlength=num_classes)
    incomplete = ~valid.all(axis=tuple(range(1, valid.ndim)))
    return Coverage(counts=tuple(map(int, counts)), num_nonfinite=int(incomplete.sum()))
