"""One-sided exact McNemar test for paired predictions. Standard library only.

Two rates over the same samples are not independent: only the samples that changed sides say which side is better. The
question is whether a network became worse, so the test is one-sided: a gain is never significant.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: A drop is significant if chance alone gives one as lopsided less often than this.
SIGNIFICANCE = 0.05
#: Up to so many changed pairs the binomial coefficient is computed exactly; that of a million takes 12 s.
_MAX_EXACT = 100_000


@dataclass(frozen=True, slots=True)
class Pairs:
    """n samples predicted by both sides: correct in ``both``, before only (``lost``), after only (``gained``)."""

    n: int
    both: int
    lost: int
    gained: int

    @property
    def before(self) -> float:
        """Rate of correct predictions before; NaN for n = 0."""
        return (self.both + self.lost) / self.n if self.n else math.nan

    @property
    def after(self) -> float:
        """Rate of correct predictions after; NaN for n = 0."""
        return (self.both + self.gained) / self.n if self.n else math.nan

    @property
    def drop(self) -> float:
        """``before - after``: positive if more was lost than gained; NaN for n = 0."""
        return (self.lost - self.gained) / self.n if self.n else math.nan

    @property
    def p_value(self) -> float:
        """p-value of :func:`mcnemar_p`."""
        return mcnemar_p(self.lost, self.gained)

    @property
    def can_tell(self) -> bool:
        """True if the largest possible loss, of all that was correct before, would be significant."""
        return self.both + self.lost >= FEWEST_LOST

    def holds(self, limit: float) -> bool:
        """True if the drop is within ``limit``, in [0, 1], or not significant.

        False if no loss could be significant, and for a limit of NaN.
        """
        return self.can_tell and (self.drop <= limit or (limit >= 0 and self.p_value >= SIGNIFICANCE))

    def describe(self, limit: float) -> str:
        """The counts, the test and its rule in a sentence, and the drops that so few samples cannot show."""
        counts = f"{self.lost} lost and {self.gained} gained of {self.n}"
        if not self.can_tell:
            correct = self.both + self.lost
            return (
                f"{counts}: too few to tell, for even the loss of all {correct} that were correct before would be no "
                f"significant drop (p = {mcnemar_p(correct, 0):.2g}): take more samples or labelled images"
            )
        rule = f"fails if more than {100 * limit:g} points are lost and p < {SIGNIFICANCE:g}"
        return f"{counts}, one-sided exact McNemar p = {self.p_value:.2g}; {rule}{undetectable_drops(self.n, limit)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the rates may be NaN."""
        rates = {"before": self.before, "after": self.after, "drop": self.drop}
        return {"n": self.n, **rates, "lost": self.lost, "gained": self.gained, "p_value": self.p_value}


def pair(before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> Pairs:
    """Counts the pairs; both (N,): True if that side's prediction of the sample is correct.

    Raises:
        ValueError: the shapes differ or are not (N,).
    """
    if before.ndim != 1 or before.shape != after.shape:
        raise ValueError(f"not paired: {before.shape} predictions before, {after.shape} after")
    lost, gained = before & ~after, after & ~before
    return Pairs(len(before), int((before & after).sum()), int(lost.sum()), int(gained.sum()))


def mcnemar_p(lost: int, gained: int) -> float:
    """One-sided p-value of the exact McNemar test; 1 if nothing was lost.

    It is P(at least ``lost`` heads in ``lost + gained`` tosses of a fair coin).

    Source: McNemar 1947, with the binomial distribution in place of chi-squared, which is wrong for few changes.

    Raises:
        ValueError: a count is negative.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"{lost} lost and {gained} gained are no counts")
    if lost == 0:
        return 1.0
    # The smaller of the two tails is summed: the larger one is near 1.
    return 1 - _lower_tail(lost - 1, lost + gained) if lost <= gained else _lower_tail(gained, lost + gained)


def undetectable_drops(n: int, limit: float) -> str:
    """Remark on the drops beyond the limit that cannot be significant on n samples; empty if there are none."""
    if not n or limit >= FEWEST_LOST / n:
        return ""
    return f" ({n} pairs cannot show a drop of less than {100 * FEWEST_LOST / n:.4g} points)"


def _lower_tail(most: int, tosses: int) -> float:
    """P(at most ``most`` heads), for ``most`` up to half of the tosses of a fair coin."""
    if tosses <= _MAX_EXACT:
        probability = math.comb(tosses, most) / 2**tosses
    else:
        logarithm = math.lgamma(tosses + 1) - math.lgamma(most + 1) - math.lgamma(tosses - most + 1)
        probability = math.exp(logarithm - tosses * math.log(2))
    terms = [probability]
    for heads in range(most, 0, -1):
        terms.append(terms[-1] * heads / (tosses - heads + 1))
    return math.fsum(terms)


#: Fewest samples whose loss is significant if none is gained.
FEWEST_LOST = next(count for count in itertools.count(1) if mcnemar_p(count, 0) < SIGNIFICANCE)
