"""The updates of a training step as one value, which the loop executes and every count and estimate sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dfadc.recipe.schema import Recipe


class Kind(StrEnum):
    """Kinds of updates."""

    STUDENT = "student"
    #: Of the student, on a batch that it was trained on before.
    REPEATED = "repeated"
    GENERATOR = "generator"
    #: No update: a batch of the generator goes into the replay buffer.
    REPLAY = "replay"


class Updates(NamedTuple):
    """Updates of one kind in a step.

    Args:
        kind: of the updates.
        number: of them.
        start: share of the run before the first of them.
    """

    kind: Kind
    number: int
    start: float = 0.0


@dataclass(frozen=True)
class StepPlan:
    """The updates of a step in their order.

    Args:
        updates: of each kind that there is.
    """

    updates: tuple[Updates, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> StepPlan:
        """The plan of a recipe."""
        student, replay = recipe.student, recipe.replay
        updates = (
            Updates(Kind.STUDENT, student.steps, recipe.first_update),
            Updates(Kind.REPEATED, replay.repeats, recipe.first_update),
            Updates(Kind.GENERATOR, recipe.generator.steps),
            Updates(Kind.REPLAY, int(replay.share == 1)),
        )
        return cls(tuple(each for each in updates if each.number))

    def due(self, step: int, num_steps: int) -> Iterator[Updates]:
        """Updates of a step, of which ``step`` were done before."""
        return (each for each in self.updates if step >= each.start * num_steps)

    def total(self, num_steps: int, cost: Mapping[Kind, float]) -> float:
        """Sum over a run of what an update of each kind costs; a kind that is not named costs nothing."""
        return sum(
            each.number * (num_steps - math.ceil(each.start * num_steps)) * cost.get(each.kind, 0)
            for each in self.updates
        )

    def mean(self, cost: Mapping[Kind, float]) -> float:
        """The same for an average step of a run of any length."""
        return sum(each.number * (1 - each.start) * cost.get(each.kind, 0) for each in self.updates)


#: Cost of an update in batches of images that a network is trained on.
TRAINED_ON = {Kind.STUDENT: 1.0, Kind.REPEATED: 1.0, Kind.GENERATOR: 1.0}
