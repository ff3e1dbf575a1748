"""The same questions answered before and after: what was lost, and whether chance explains it. Standard library only.

Two rates of the same samples are not independent: only the samples that changed sides say which side is better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: A drop counts where chance alone would give one as lopsided less often than this.
SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class Pairs:
    """n questions, each answered by both sides.

    Args:
        n: questions.
        both: answered rightly before and after.
        lost: answered rightly before only.
        gained: answered rightly after only.
    """

    n: int
    both: int
    lost: int
    gained: int

    @property
    def before(self) -> float:
        """Rate of right answers before; NaN where n is 0."""
        return (self.both + self.lost) / self.n if self.n else math.nan

    @property
    def after(self) -> float:
        """Rate of right answers after; NaN where n is 0."""
        return (self.both + self.gained) / self.n if self.n else math.nan

    @property
    def drop(self) -> float:
        """``before - after``: positive where more was lost than gained; NaN where n is 0."""
        return (self.lost - self.gained) / self.n if self.n else math.nan

    @property
    def p_value(self) -> float:
        """Of :func:`mcnemar_p`."""
        return mcnemar_p(self.lost, self.gained)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the rates may be NaN."""
        rates = {"before": self.before, "after": self.after, "drop": self.drop}
        return {"n": self.n, **rates, "lost": self.lost, "gained": self.gained, "p_value": self.p_value}


def pair(before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> Pairs:
    """Counts the pairs; both (N,): whether each side answered each question rightly.

    Raises:
        ValueError: the shapes differ or are not (N,).
    """
    if before.ndim != 1 or before.shape != after.shape:
        raise ValueError(f"not paired: {before.shape} answers before, {after.shape} after")
    lost, gained = before & ~after, after & ~before
    return Pairs(len(before), int((before & after).sum()), int(lost.sum()), int(gained.sum()))


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided p-value of the exact McNemar test: how often a fair coin splits ``lost + gained`` at least as unevenly.

    1 where nothing changed sides.

    Source: McNemar 1947, with the binomial distribution in place of chi-squared, which is wrong for few changes.

    Raises:
        ValueError: a count is negative.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"{lost} lost and {gained} gained are no counts")
    changed, fewer = lost + gained, min(lost, gained)
    # The lower tail from its largest term down: each next one is its predecessor times i / (changed - i + 1).
    largest = math.lgamma(changed + 1) - math.lgamma(fewer + 1) - math.lgamma(changed - fewer + 1)
    term = total = 1.0
    for i in range(fewer, 0, -1):
        term *= i / (changed - i + 1)
        total += term
        if term < total * 1e-17:
            break
    return min(1.0, 2 * total * math.exp(largest - changed * math.log(2)))
