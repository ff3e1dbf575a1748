"""Procedural images of balanced classes."""

from __future__ import annotations

import pytest
import torch
from miniature import SMALL_CONTRACT, SmallNetwork, as_teacher, build_run, make_teacher

from dfadc.contract import ImageContract
from dfadc.distillation.images.balanced import draw_balanced
from dfadc.distillation.images.procedural import draw_procedural
from dfadc.distillation.losses.batch_norm import watch_images


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


def test_of_each_class_the_images_that_batch_norms_find_familiar_are_kept() -> None:
    """A teacher whose statistics are those of flat grey images prefers dull ones."""
    torch.manual_seed(0)
    teacher = as_teacher(SmallNetwork().train())
    for _ in range(50):
        teacher.module(0.05 * torch.randn(32, *SMALL_CONTRACT.input_size))
    teacher.module.eval()
    drawn, any_of_them = draw_balanced(40, teacher, rng()), draw_procedural(40, teacher.contract, rng())

    def distance(images: torch.Tensor) -> float:
        with watch_images(teacher.batch_norms) as by_layer, torch.no_grad():
            teacher.logits(images)
        return float(sum(part.median() for (part,) in by_layer))

    assert distance(drawn) < 0.7 * distance(any_of_them)
    assert drawn.flatten(1).std(dim=1).median() < any_of_them.flatten(1).std(dim=1).median()


@pytest.mark.parametrize("count", [0, 3])
def test_any_number_of_images_can_be_drawn(count: int) -> None:
    teacher = as_teacher(make_teacher(SMALL_CONTRACT), SMALL_CONTRACT)
    assert draw_balanced(count, teacher, rng()).shape == (count, *SMALL_CONTRACT.input_size)


def test_of_a_teacher_that_answers_every_pixel_none_are_chosen() -> None:
    contract = ImageContract((1, 8, 8), 3, task="segmentation")
    teacher = as_teacher(torch.nn.Conv2d(1, 3, 1), contract)
    assert torch.equal(draw_balanced(5, teacher, rng()), draw_procedural(5, contract, rng()))
