"""Budgets: minutes become steps at a measured rate."""

from __future__ import annotations

import pytest

from dfadc.training.budget import Budget


@pytest.mark.parametrize(
    ("minutes", "seconds", "steps"), [(1, 0.5, 120), (10, 0.7, 857), (0.001, 100.0, 1), (1.5, 1.0, 90)]
)
def test_minutes_become_the_steps_that_fit(minutes: float, seconds: float, steps: int) -> None:
    budget = Budget(7, minutes)
    assert budget.num_steps(seconds) == steps
    assert budget.seconds(seconds) == 60 * minutes


def test_without_a_time_limit_the_steps_of_the_recipe_count() -> None:
    assert Budget(7).num_steps(0.5) == 7
    assert Budget(7).seconds(0.5) == 3.5
