"""Procedural images of balanced classes."""

from __future__ import annotations

import pytest
import torch
from miniature import SMALL_CONTRACT, as_teacher, build_run, make_teacher

from dfadc.contract import ImageContract
from dfadc.distillation.images.balanced import draw_balanced
from dfadc.distillation.images.procedural import draw_procedural


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def test_images_spread_over_the_classes_that_the_teacher_sees() -> None:
    teacher = build_run("auto").teacher
    drawn = draw_balanced(40, teacher, rng())
    assert torch.equal(drawn, draw_balanced(40, teacher, rng()))
    any_of_them = draw_procedural(40, teacher.contract, rng())
    most, most_of_any = (int(teacher.module(images).argmax(dim=1).bincount().max()) for images in (drawn, any_of_them))
    assert drawn.shape == (40, *teacher.contract.input_size)
    assert most < most_of_any


@pytest.mark.parametrize("count", [0, 3])
def test_any_number_of_images_can_be_drawn(count: int) -> None:
    teacher = as_teacher(make_teacher(SMALL_CONTRACT), SMALL_CONTRACT)
    assert draw_balanced(count, teacher, rng()).shape == (count, *SMALL_CONTRACT.input_size)


def test_of_a_teacher_that_answers_every_pixel_none_are_chosen() -> None:
    contract = ImageContract((1, 8, 8), 3, task="segmentation")
    teacher = as_teacher(torch.nn.Conv2d(1, 3, 1), contract)
    assert torch.equal(draw_balanced(5, teacher, rng()), draw_procedural(5, contract, rng()))
