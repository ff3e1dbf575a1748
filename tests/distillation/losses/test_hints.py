"""Hints: the layers that are compared, their distance, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from miniature import SMALL_CONTRACT, SmallNetwork, build_run
from torch import nn

from dfadc.contract import ImageContract
from dfadc.distillation.losses.hints import LayerHints
from dfadc.networks.adaptation import random_images
from dfadc.networks.names import build_architecture
from dfadc.student.build import build_student
from dfadc.student.inherit import Correspondence, copy_weights_, corresponding_layers, find_copy

if TYPE_CHECKING:
    from torch import Tensor

    from dfadc.distillation.distillation import Distillation


LENET_KINDS = [nn.Conv2d, nn.Conv2d, nn.Conv2d, nn.Linear]


def images(count: int) -> Tensor:
    return torch.randn(count, *SMALL_CONTRACT.input_size, generator=torch.Generator().manual_seed(3))


def layers_of(student: nn.Module, teacher: nn.Module, contract: ImageContract) -> list[Correspondence]:
    """Layers of a student that correspond to its teacher's; a smaller copy gets the teacher's weights before."""
    copy = find_copy(student, teacher, torch.randn(2, *contract.input_size))
    if isinstance(copy, str):
        return corresponding_layers(student, teacher, None)
    copy_weights_(student, teacher, copy)
    return corresponding_layers(student, teacher, copy)


def hooks_of(module: nn.Module) -> int:
    return sum(len(layer._forward_hooks) for layer in module.modules())  # noqa: SLF001


# ------------------------------------------------------------------------------------------------------ which layers


def test_a_layer_corresponds_to_the_channels_that_the_student_inherits() -> None:
    torch.manual_seed(0)
    teacher, student = (SmallNetwork(width=width) for width in (6, 4))
    for norm in teacher.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight)
    layers = layers_of(student, teacher, SMALL_CONTRACT)
    assert [layer.student for layer in layers] == [student.features[1], student.features[4]]
    assert [layer.teacher for layer in layers] == [teacher.features[1], teacher.features[4]]
    assert [layer.axis for layer in layers] == [1, 1]
    for layer in layers:
        given = layer.teacher.get_parameter("weight")[layer.channels]
        assert torch.equal(layer.student.get_parameter("weight"), given)


def test_without_batch_norm_it_is_what_is_narrower() -> None:
    contract = ImageContract((1, 28, 28), 10)
    student, teacher = (build_student(name, contract).module for name in ("lenet5_half", "lenet5"))
    layers = layers_of(student, teacher, contract)
    kinds = [type(layer.student) for layer in layers]
    assert kinds == LENET_KINDS
    assert [layer.axis for layer in layers] == [1 if kind is nn.Conv2d else -1 for kind in kinds]
    for layer in layers:
        assert len(layer.channels) == len(layer.student.get_parameter("weight"))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("lenet5", "lenet5"),
        ("lenet5_half", "compact_resnet_8"),
        ("resnet18_8x", "resnet34_8x"),
        ("lenet5", "lenet5_half"),
    ],
)
def test_nobody_else_has_any(student: str, teacher: str) -> None:
    contract = ImageContract((1, 32, 32), 10)
    narrow, wide = (build_architecture(name, contract).module for name in (student, teacher))
    assert layers_of(narrow, wide, contract) == []


# ----------------------------------------------------------------------------------------------------- the distance


@pytest.mark.parametrize("asked", [8, 5])
def test_the_distance_is_the_error_in_units_of_the_teachers_variance(asked: int) -> None:
    """Counted here once more; the teacher may be asked about the first images alone."""
    torch.manual_seed(0)
    teacher, student = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 2, 3)
    channels = torch.tensor([1, 4])
    with LayerHints([Correspondence(student, teacher, channels, axis=1)]) as hints:
        for _ in range(2):  # the second time nothing is left of the first
            with hints.comparing() as distances:
                expected = teacher(images(asked)).detach().numpy()[:, [1, 4]]
                found = student(images(8)).detach().numpy()[:asked]
            (distance,) = distances
            assert distance.item() == pytest.approx(np.square(found - expected).mean() / expected.var(), rel=1e-5)


def test_nothing_is_computed_but_while_comparing() -> None:
    teacher, student = nn.Linear(4, 4), nn.Linear(4, 2)
    with LayerHints([Correspondence(student, teacher, torch.tensor([0, 3]), axis=-1)]) as hints:
        teacher(torch.randn(3, 4))
        student(torch.randn(3, 4))
        with hints.comparing() as distances:
            student(torch.randn(3, 4))
        assert distances == []
        with pytest.raises(RuntimeError), hints.comparing():
            student(teacher(torch.randn(3, 4))[:, :2])
        with hints.comparing() as distances:
            student(torch.randn(3, 4))
        assert distances == [], "nothing is left of the teacher's layers"
    assert hooks_of(teacher) == hooks_of(student) == 0


# ------------------------------------------------------------------------------------------------- within the run


def run_of(*rules: str) -> Distillation:
    run = build_run("auto", "student.l1=0", "augmentation.mixup=0", *rules)
    run.state.student.module.eval()
    return run


def test_they_are_added_with_their_weight_and_move_the_student() -> None:
    run, plain = run_of("student.hints=3"), run_of("student.hints=0")
    assert plain.student.hints is None
    batch = run.student.draw_batch()
    step, without = run.student.loss(batch), plain.student.loss(batch)
    student, teacher = run.state.student.module, run.teacher.module
    seen: list[Tensor] = []
    expected = []
    copy = find_copy(student, teacher, random_images(SMALL_CONTRACT))
    assert not isinstance(copy, str)
    for layer in corresponding_layers(student, teacher, copy):
        handles = [each.register_forward_hook(lambda *args: seen.append(args[2])) for each in layer[:2]]
        student(step.images)
        teacher(step.images)
        for handle in handles:
            handle.remove()
        own, given = seen[-2].detach(), seen[-1][:, layer.channels]
        expected.append(float((own - given).square().mean() / given.var(correction=0)))
    assert step.loss.item() == pytest.approx(without.loss.item() + 3 * np.mean(expected), rel=1e-4)
    weights = [each.state.student.module.get_parameter("features.0.weight") for each in (run, plain)]
    losses = (step.loss, without.loss)
    gradients = [torch.autograd.grad(loss, weight)[0] for loss, weight in zip(losses, weights, strict=True)]
    assert not torch.allclose(gradients[0], gradients[1])


def test_a_run_that_is_over_leaves_both_networks_without_hooks() -> None:
    run = build_run("auto", "prior.batch_norm=0")
    assert hooks_of(run.teacher.module) == hooks_of(run.state.student.module) == 2
    assert hooks_of(run.state.student.average) == 0
    run.__exit__()
    assert hooks_of(run.teacher.module) == hooks_of(run.state.student.module) == 0
