"""The networks in examples/modern: each half is its teacher made smaller, and has its weights; others are not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dfadc.student.inherit import SmallerCopy, find_copy

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "modern"))
import digits_28
import networks


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (networks.vit(10, 28), networks.vit_half_width(10, 28)),
        (networks.vit(10, 28), networks.vit_half_depth(10, 28)),
        (networks.convnext(10), networks.convnext_half_width(10)),
        (networks.group_norm_resnet(10), networks.group_norm_resnet_half_width(10)),
        (networks.vgg(10), networks.vgg_half_width(10)),
    ],
)
def test_each_half_is_a_smaller_copy(teacher: torch.nn.Module, student: torch.nn.Module) -> None:
    images = torch.randn(2, 1, 28, 28)
    copy = find_copy(student.eval(), teacher.eval(), images)
    assert isinstance(copy, SmallerCopy), copy
    assert student(images).shape == teacher(images).shape == (2, 10)


@pytest.mark.parametrize("teacher", [networks.five_convolutions(10), networks.pooled(10)])
def test_three_convolutions_are_no_smaller_copy(teacher: torch.nn.Module) -> None:
    images, student = torch.randn(2, 1, 28, 28), networks.three_convolutions(10)
    assert isinstance(find_copy(student.eval(), teacher.eval(), images), str)
    assert student(images).shape == teacher(images).shape == (2, 10)


def test_digits_are_white_on_black_and_divided_by_the_seed() -> None:
    train, test = (digits_28.load_digits_28(split, seed=1) for split in ("train", "test"))
    assert train.images.shape == (1197, 1, 28, 28)
    assert (len(test.labels), test.images.dtype) == (600, torch.uint8)
    assert (train.images == 0).float().mean() > 0.6
    assert train.images.flatten(1).amax(dim=1).float().mean() > 240
    known = {image.numpy().tobytes() for image in train.images}
    assert sum(image.numpy().tobytes() in known for image in test.images) < 5
