"""Rates with 95 % intervals, and ties: what agreement over samples and agreement over pixels share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Two-sided 95 % quantile of the normal distribution.
Z_95 = 1.959963984540054
#: A sample is a tie if the reference's top-1 to top-2 margin is below this share of the sample's logit scale.
TIE_MARGIN = 1e-3
#: Comparison A leaves ties out up to this share of the samples; if there are more, all samples count.
MAX_TIE_SHARE = 0.05
#: Fewer samples of a class than this are reported as too few.
MIN_PER_CLASS = 30


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of the proportion k/n; (0, 1) for n = 0.

    Source: Wilson 1927; unlike the normal interval it stays in [0, 1] and is sound at k = 0 and k = n.

    Raises:
        ValueError: not 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"k = {k} is not between 0 and n = {n}")
    if n == 0:
        return 0.0, 1.0
    rate, z2 = k / n, Z_95 * Z_95
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # Rounding may push an end past the observed rate at k = 0 and k = n, where the exact ends are 0 and 1.
    return max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate))


class Rate(ABC):
    """k of n, with the 95 % interval of k / n that :meth:`bounds` computes."""

    __slots__ = ()

    n: int
    k: int

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end of the interval."""

    @property
    def rate(self) -> float:
        """Observed rate k / n; NaN for n = 0."""
        return self.k / self.n if self.n else math.nan

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.bounds()[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.bounds()[1]

    def rates(self) -> dict[str, float]:
        """Rate and interval under the report's keys; the rate may be NaN."""
        return {"agreement": self.rate, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Proportion(Rate):
    """k of n independent samples, with a Wilson interval."""

    #: Plural noun of the samples, for messages.
    unit: ClassVar[str] = "samples"

    n: int
    k: int

    def bounds(self) -> tuple[float, float]:
        """Wilson interval."""
        return wilson_interval(self.k, self.n)

    @property
    def low_if_perfect(self) -> float:
        """Lower bound for k = n: the highest that this number of samples can show."""
        return wilson_interval(self.n, self.n)[0]


@dataclass(frozen=True, slots=True)
class Accuracy(Proportion):
    """Labelled images, of which k are classified correctly."""

    unit: ClassVar[str] = "labelled images"

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified correctly."""
        return self.rate

    @classmethod
    def of(cls, correct: npt.NDArray[np.bool_]) -> Accuracy:
        """Accuracy from one flag for each image; correct: (N,)."""
        return cls(n=len(correct), k=int(correct.sum()))


class Ties:
    """Samples (or pixels) whose two highest reference logits are nearly equal, as comparison A treats them.

    A tie is decided by less than half precision resolves: which way it falls says nothing about an export. So ties are
    left out, whether they agree or not, unless they are so many that they could hide a bad export.
    """

    __slots__ = ()

    #: Plural noun of what ``num_ties`` counts, for messages; empty for samples.
    tie_unit: ClassVar[str] = ""
    n: int
    k: int
    num_ties: int
    num_tied_disagreements: int

    @property
    def num_decisions(self) -> int:
        """The number that ``num_ties`` is a part of."""
        return self.n

    @property
    def too_many_ties(self) -> bool:
        """True if more than ``MAX_TIE_SHARE`` of the samples are ties: then none is left out."""
        return self.num_ties > MAX_TIE_SHARE * self.num_decisions

    @property
    def num_left_out(self) -> int:
        """Ties that comparison A leaves out."""
        return 0 if self.too_many_ties else self.num_ties

    @property
    def num_compared(self) -> int:
        """Samples that comparison A counts."""
        return self.n - self.num_left_out

    @property
    def num_differing(self) -> int:
        """Disagreements among the samples that are not left out."""
        return self.n - self.k - (0 if self.too_many_ties else self.num_tied_disagreements)
