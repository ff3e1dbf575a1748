"""The stock of procedural images: as large as there is time for, the same each time, drawn where a run needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from miniature import MINIATURE, SMALL_CONTRACT, SmallNetwork, as_teacher, make_teacher
from torch import nn

from dfadc.distillation.state import LEAST_STOCK
from dfadc.networks.zoo.compact_resnet import CompactResNet
from dfadc.recipe.load import load_recipe
from dfadc.training import build, stock
from dfadc.training.build import prepare
from dfadc.training.stock import class_notes, draw_stock

if TYPE_CHECKING:
    from torch import Tensor

    from dfadc.teacher.load import Teacher

TEACHER = as_teacher(make_teacher(SMALL_CONTRACT))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The stocks that are drawn, of 1,200 images."""
    stocks: list[Tensor] = []

    def draw(count: int, teacher: Teacher, seed: int) -> Tensor:
        stocks.append(draw_stock(count, teacher, seed))
        return stocks[-1]

    monkeypatch.setattr(stock, "MOST_IMAGES", 1200)
    monkeypatch.setattr(build, "draw_stock", draw)
    return stocks


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
    drawn: list[Tensor],
) -> None:
    recipe = load_recipe("auto", [*MINIATURE, *settings])
    teacher = as_teacher(SmallNetwork(width=6).eval())
    training = prepare(teacher, "compact_resnet_4", recipe=recipe, device="cpu", is_for_plan=is_for_plan)
    assert len(drawn) == expected
    found = training.run.state.stock
    assert (found is not None) == bool(drawn)
    if found is not None:
        torch.testing.assert_close(found.float(), drawn[0], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("is_resumed", "number_drawn"), [(False, 1), (True, 0)])
def test_a_student_that_inherits_is_fitted_on_it_and_sees_new_images(
    is_resumed: bool, number_drawn: int, drawn: list[Tensor]
) -> None:
    recipe = load_recipe("auto", MINIATURE)
    teacher = as_teacher(CompactResNet(SMALL_CONTRACT, width=8).eval())
    training = prepare(teacher, "compact_resnet_4", recipe=recipe, device="cpu", has_checkpoint=is_resumed)
    assert training.student.is_inherited
    assert [len(images) for images in drawn] == [1200] * number_drawn
    assert training.run.state.stock is None


def test_too_few_images_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that there is time for at 224 px: a student would learn each by heart."""
    monkeypatch.setattr(stock, "MOST_IMAGES", LEAST_STOCK - 1)
    monkeypatch.setattr(build, "draw_stock", lambda *_: pytest.fail("drawn for nothing"))
    teacher = as_teacher(SmallNetwork(width=6).eval())
    training = prepare(teacher, "compact_resnet_4", recipe=load_recipe("auto", MINIATURE), device="cpu")
    assert training.run.state.stock is None
