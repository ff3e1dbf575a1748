"""Ridge regression of a student's layers."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from dfadc.student.inherit import Correspondence
from dfadc.student.regression import can_fit, fit_layers_


def tensors_of(network: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in network.state_dict().values()]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "bias"),
    [*product((1, 3), (1, 2), (0, 2), (1, 2), (True, False)), ((3, 1), (2, 1), (1, 0), 1, True)],
)
def test_a_convolution_becomes_the_channels_that_it_stands_for(
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int,
    bias: bool,
) -> None:
    torch.manual_seed(0)
    teacher, student = (
        nn.Conv2d(2, width, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias) for width in (6, 3)
    )
    before, channels = tensors_of(teacher), torch.tensor([0, 2, 5])
    fit_layers_(
        student, teacher, [Correspondence(student, teacher, channels, 1)], torch.randn(300, 2, 9, 9), ridge=1e-9
    )
    torch.testing.assert_close(student.weight, teacher.weight[channels], atol=1e-4, rtol=1e-4)
    if bias:
        assert student.bias is not None
        assert teacher.bias is not None
        torch.testing.assert_close(student.bias, teacher.bias[channels], atol=1e-4, rtol=1e-4)
    assert all(map(torch.equal, tensors_of(teacher), before))
    assert not teacher._forward_hooks and not student._forward_pre_hooks  # noqa: SLF001, PT018


def build(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(2), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5)
    )


@torch.no_grad()
def test_a_layer_makes_up_for_what_those_before_it_lack() -> None:
    """Tokens as well as vectors; each layer is fitted on the student's own inputs, so the answers come closer."""
    torch.manual_seed(0)
    teacher, student = build(32), build(16)
    images = torch.randn(500, 3, 4, 4)
    layers = []
    for own, given in zip(student, teacher, strict=True):
        if isinstance(own, nn.Linear) and isinstance(given, nn.Linear):
            own.weight.copy_(given.weight[: len(own.weight), : own.in_features])
            own.bias.copy_(given.bias[: len(own.bias)])
            layers.append(Correspondence(own, given, torch.arange(len(own.weight)), -1))
    student.train()
    errors = [float((student(images) - teacher(images)).square().mean())]
    for count in (1, 2, 3):
        fit_layers_(student, teacher, layers[3 - count :], images)
        errors.append(float((student(images) - teacher(images)).square().mean()))
    assert errors == sorted(errors, reverse=True), errors
    assert errors[3] < 0.4 * errors[0]
    assert student.training


def test_what_is_no_plain_layer_or_too_large_is_left() -> None:
    fitting = (nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    others = (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.Linear(5000, 4))
    assert all(map(can_fit, fitting))
    assert not any(map(can_fit, others))


def test_a_layer_that_no_image_reaches_is_left() -> None:
    student, teacher = nn.Linear(4, 2), nn.Linear(4, 4)
    student.unused, teacher.unused = nn.Linear(4, 2), nn.Linear(4, 4)
    before = tensors_of(student.unused)
    pairs = [
        Correspondence(s, t, torch.arange(2), -1) for s, t in ((student.unused, teacher.unused), (student, teacher))
    ]
    fit_layers_(student, teacher, pairs, torch.randn(50, 4), ridge=1e-9)
    assert all(map(torch.equal, tensors_of(student.unused), before))
    torch.testing.assert_close(student.weight, teacher.weight[:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_inputs_that_are_all_0_leave_the_weights(bias: bool) -> None:
    teacher, student = nn.Conv2d(2, 6, 3, bias=bias), nn.Conv2d(2, 3, 3, bias=bias)
    before = student.weight.clone()
    fit_layers_(student, teacher, [Correspondence(student, teacher, torch.arange(3), 1)], torch.zeros(20, 2, 9, 9))
    torch.testing.assert_close(student.weight.detach(), before.detach())


def test_a_layer_whose_maps_have_another_size_is_left() -> None:
    teacher, student = nn.Conv2d(2, 6, 3), nn.Conv2d(2, 3, 3, stride=2)
    before = student.weight.clone()
    fit_layers_(student, teacher, [Correspondence(student, teacher, torch.arange(3), 1)], torch.randn(20, 2, 9, 9))
    assert torch.equal(student.weight, before)
