"""Class-balanced subsampling by round-robin."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def class_order(classes: Iterable[int]) -> list[int]:
    """Positions in ``classes`` by round-robin: the first of every class, then the second, and so on.

    The first n of them are as even over the classes as can be, in their order within each.
    """
    turns: Counter[int] = Counter()
    keyed = []
    for position, found in enumerate(classes):
        turns[found] += 1
        keyed.append((turns[found], found, position))
    return [position for _, _, position in sorted(keyed)]
