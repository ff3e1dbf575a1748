"""The networks without batch norm in examples/modern: each half is its teacher made smaller, and has its weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dfadc.student.inherit import SmallerCopy, find_copy

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "modern"))
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
