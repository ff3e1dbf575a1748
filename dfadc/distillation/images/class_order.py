"""Class-balanced subsampling by round-robin. Free of torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from dfadc.verification.agreement import predict

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from dfadc.contract import Task


def classes_to_balance(logits: npt.NDArray[np.floating[Any]], task: Task) -> list[int]:
    """The class of each image that it is counted under, from finite logits (N, K).

    With several labels an image it is the rarest state among its labels, 2·label where that is off and 2·label + 1
    where it is on: taken in turns, each label is then on and off as often as the images allow.
    """
    predictions = predict(logits, task)
    if task != "multilabel":
        return [int(found) for found in predictions]
    states = 2 * np.arange(predictions.shape[1]) + predictions
    counts = np.bincount(states.reshape(-1), minlength=1)
    rarest = counts[states].argmin(axis=1)
    return [int(row[at]) for row, at in zip(states, rarest, strict=True)]


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
