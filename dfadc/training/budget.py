"""Budget of a run: steps, or minutes that a measured rate turns into steps. It is no part of the recipe."""

from __future__ import annotations

from dataclasses import dataclass

#: Minutes that buy fewer steps than this are remarked upon: no student was any good after so few.
FEW_STEPS = 100


@dataclass(frozen=True)
class Budget:
    """Length of a run.

    Args:
        steps: of the recipe; they count where there is no time limit.
        minutes: time limit of the training.
    """

    steps: int
    minutes: float | None = None

    def num_steps(self, seconds_per_step: float) -> int:
        """Steps at a measured rate, at least one."""
        return self.steps if self.minutes is None else max(1, int(self.minutes * 60 / seconds_per_step))

    def seconds(self, seconds_per_step: float) -> float:
        """Seconds of the whole training."""
        return self.steps * seconds_per_step if self.minutes is None else 60 * self.minutes
