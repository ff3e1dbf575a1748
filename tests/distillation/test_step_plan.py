"""Step plan: the loop makes the updates that it names, and every sum over a run counts the same ones."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import build_run

from dfadc.distillation import loop
from dfadc.distillation.loop import distill
from dfadc.distillation.step_plan import Kind, StepPlan, Updates
from dfadc.recipe.load import load_recipe


def test_the_plan_of_each_shipped_recipe() -> None:
    auto, pool = (StepPlan.of(load_recipe(name)).updates for name in ("auto", "pool"))
    assert auto == (Updates(Kind.STUDENT, 5), Updates(Kind.REPEATED, 10), Updates(Kind.GENERATOR, 1))
    assert pool == (Updates(Kind.STUDENT, 15, 0.05), Updates(Kind.GENERATOR, 4), Updates(Kind.REPLAY, 1))


@settings(deadline=None, max_examples=100)
@given(
    numbers=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    start=st.floats(0, 0.99),
    num_steps=st.integers(1, 60),
    costs=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_the_total_is_the_sum_over_the_steps(
    numbers: tuple[int, int], start: float, num_steps: int, costs: tuple[int, int]
) -> None:
    plan = StepPlan((Updates(Kind.STUDENT, numbers[0], start), Updates(Kind.GENERATOR, numbers[1])))
    cost = {Kind.STUDENT: costs[0], Kind.GENERATOR: costs[1]}
    steps = sum(each.number * cost[each.kind] for step in range(num_steps) for each in plan.due(step, num_steps))
    assert plan.total(num_steps, cost) == steps
    assert plan.mean(cost) * num_steps == pytest.approx(steps, abs=numbers[0] * costs[0] + 1e-6)


@pytest.mark.parametrize("recipe", ["auto", "dfad", "pool"])
def test_the_loop_makes_the_updates_of_the_plan(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run(recipe, "steps=6")
    made: Counter[str] = Counter()
    for name in ("update_student", "update_generator"):
        update = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *args, u=update, n=name: (made.update([n]), u(*args))[1])
    distill(run, 6, lambda _: None)
    students = run.plan.total(6, {Kind.STUDENT: 1, Kind.REPEATED: 1})
    assert made == {"update_student": students, "update_generator": run.plan.total(6, {Kind.GENERATOR: 1})}
