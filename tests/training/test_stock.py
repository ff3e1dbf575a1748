"""The stock of procedural images: as large as there is time for, the same each time, drawn where a run needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from miniature import MINIATURE, SMALL_CONTRACT, SmallNetwork, as_teacher, make_teacher
from torch import nn

from dfadc.recipe.load import load_recipe
from dfadc.training import build, stock
from dfadc.training.build import prepare
from dfadc.training.stock import class_notes, draw_stock

if TYPE_CHECKING:
    from torch import Tensor

    from dfadc.teacher.load import Teacher

TEACHER = as_teacher(make_teacher(SMALL_CONTRACT))


def test_a_run_that_goes_on_has_the_same_stock() -> None:
    first = draw_stock(30, TEACHER, seed=3)
    assert torch.equal(first, draw_stock(30, TEACHER, seed=3))
    assert not torch.equal(first, draw_stock(30, TEACHER, seed=4))


@pytest.mark.parametrize(
    ("num_seen", "said"), [(10, None), (6, None), (3, "sees 3 of its 10 classes"), (1, "check mean, std and channel")]
)
def test_a_teacher_that_sees_few_classes_is_noted(num_seen: int, said: str | None) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 10)
    with torch.no_grad():
        linear.bias[num_seen:] = -1e4
    network = nn.Sequential(nn.Flatten(), linear)
    teacher = as_teacher(network)
    images = draw_stock(400, teacher, seed=0)
    assert len(network(images).argmax(dim=1).unique()) == num_seen
    notes = class_notes(images, teacher)
    assert len(notes) == (said is not None)
    assert all(said in note for note in notes if said)
    assert class_notes(images[:9], teacher) == ()


@pytest.mark.parametrize(
    ("settings", "is_for_plan", "expected"),
    [((), False, 1), ((), True, 0), (("replay.procedural_share=0",), False, 0)],
)
def test_it_is_drawn_where_it_is_shown(
    settings: tuple[str, ...],
    is_for_plan: bool,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stock, "MOST_IMAGES", 1200)
    drawn: list[Tensor] = []

    def draw(count: int, teacher: Teacher, seed: int) -> Tensor:
        drawn.append(draw_stock(count, teacher, seed))
        return drawn[-1]

    monkeypatch.setattr(build, "draw_stock", draw)
    recipe = load_recipe("auto", [*MINIATURE, *settings])
    teacher = as_teacher(SmallNetwork(width=6).eval())
    training = prepare(teacher, "compact_resnet_4", recipe=recipe, device="cpu", is_for_plan=is_for_plan)
    assert len(drawn) == expected
    found = training.run.state.stock
    assert (found is not None) == bool(drawn)
    if found is not None:
        torch.testing.assert_close(found.float(), drawn[0], atol=2e-3, rtol=1e-3)
