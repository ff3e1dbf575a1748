"""Layers of student and teacher are paired by name, or by the order in which images reach them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from dfadc.student.inherit import copy_weights_, corresponding_layers, find_copy
from dfadc.student.pairing import Pairing, pair
from dfadc.student.regression import normalise_

IMAGES = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A residual block with a shortcut, whose layers have these names, in any order of running."""

    def __init__(self, width: int, names: tuple[str, str, str], *, shortcut_first: bool, norms: bool) -> None:
        super().__init__()
        self.names, self.shortcut_first = names, shortcut_first
        sizes = ((1, width, 3), (width, width, 3), (1, width, 1))
        for name, (inputs, outputs, kernel) in zip(names, sizes, strict=True):
            layer: nn.Module = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norms)
            setattr(self, name, nn.Sequential(layer, nn.BatchNorm2d(outputs)) if norms else layer)
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        first, second, shortcut = (self.get_submodule(name) for name in self.names)
        side = shortcut(images) if self.shortcut_first else None
        maps = second(first(images).relu())
        maps = maps + (shortcut(images) if side is None else side)
        logits: Tensor = self.head(maps.relu().mean(dim=(2, 3)))
        return logits


def plain(width: int, *, names: tuple[str, str, str] = ("a", "b", "c"), shortcut_first: bool = False) -> Block:
    return Block(width, names, shortcut_first=shortcut_first, norms=False).eval()


def normalising(width: int) -> Block:
    network = Block(width, ("x", "y", "z"), shortcut_first=False, norms=True)
    with torch.no_grad():
        for _ in range(100):
            network(3 * torch.randn(16, 1, 12, 12) + 1)
    return network.eval()


@pytest.mark.parametrize("shortcut_first", [True, False])
@torch.no_grad()
def test_networks_with_other_names_are_paired_by_order_and_compute_the_same(shortcut_first: bool) -> None:
    torch.manual_seed(0)
    teacher, student = plain(6, names=("p", "q", "r"), shortcut_first=shortcut_first), plain(6)
    found = pair(student, teacher, IMAGES)
    assert isinstance(found, Pairing)
    assert found.layers == {"a": "p", "b": "q", "c": "r", "head": "head"}
    for name, tensor in student.state_dict().items():
        tensor.copy_(found.given(teacher)[name])
    torch.testing.assert_close(student(IMAGES), teacher(IMAGES))


def test_other_kinds_of_layers_are_no_pairs() -> None:
    teacher = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(256, 5))
    assert "its last layer is head, the teacher's 2" in str(pair(plain(3), teacher, IMAGES))


@torch.no_grad()
def test_a_batch_norm_that_a_file_folded_away_belongs_to_its_convolution() -> None:
    """The student computes what the folded layers do, whether it normalises by its statistics or by the batch's."""
    torch.manual_seed(0)
    teacher, student = (
        plain(6, names=("p", "q", "r")),
        Block(6, ("a", "b", "c"), shortcut_first=False, norms=True).eval(),
    )
    narrow = Block(3, ("a", "b", "c"), shortcut_first=False, norms=True).eval()
    found = pair(student, teacher, IMAGES)
    assert isinstance(found, Pairing)
    assert found.folded == ("a.1", "b.1", "c.1")
    assert found.layers["b.1"] == found.layers["b.0"] == "q"
    for name, tensor in found.given(teacher).items():
        student.state_dict()[name].copy_(tensor)
    torch.testing.assert_close(student(IMAGES), teacher(IMAGES), rtol=1e-4, atol=1e-5)
    normalise_(student, found.folded, IMAGES)
    assert all(student.get_buffer(f"{name}.running_mean").abs().min() > 0 for name in found.folded)
    torch.testing.assert_close(student(IMAGES), teacher(IMAGES), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.train()(IMAGES), teacher(IMAGES), rtol=1e-4, atol=1e-5)
    copy = find_copy(narrow, teacher, IMAGES)
    assert not isinstance(copy, str)
    copy_weights_(narrow, teacher, copy)
    layers = corresponding_layers(narrow, teacher, copy)
    assert [type(layer.student) for layer in layers] == 3 * [nn.BatchNorm2d]
    assert [layer.teacher for layer in layers] == [teacher.get_submodule(name) for name in "pqr"]


def test_a_student_without_batch_norms_is_no_part_of_a_teacher_with_them() -> None:
    assert isinstance(pair(plain(3), normalising(6), IMAGES), str)


@torch.no_grad()
def test_a_batch_norm_that_begins_with_weight_0_is_used_too() -> None:
    """As in networks whose residual branches begin with nothing."""
    torch.manual_seed(0)
    teacher = plain(6, names=("p", "q", "r"))
    student = Block(3, ("a", "b", "c"), shortcut_first=False, norms=True).eval()
    ordinary = find_copy(student, teacher, IMAGES)
    assert not isinstance(ordinary, str)
    copy_weights_(student, teacher, ordinary)
    expected = student(IMAGES)
    nn.init.zeros_(student.get_parameter("b.1.weight"))
    student.get_buffer("b.1.running_mean").fill_(3)
    copy_weights_(student, teacher, ordinary)
    torch.testing.assert_close(student(IMAGES), expected)


def test_a_scripted_teacher_does_not_say_how_its_layers_move() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice to export instead
        teacher = torch.jit.trace(plain(6), IMAGES)
    found = find_copy(plain(3), teacher, IMAGES)
    assert isinstance(found, str)
    assert "does not say how it moves over an image" in found


@torch.no_grad()
def test_a_bias_that_a_file_left_away_is_0() -> None:
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Conv2d(1, width, 12), nn.Flatten(), nn.Linear(width, 5)) for width in (6, 3))
    teacher = nn.Sequential(teacher[0], nn.Identity(), teacher[1], nn.Linear(6, 5, bias=False))
    copy = find_copy(student, teacher, IMAGES)
    assert not isinstance(copy, str)
    copy_weights_(student, teacher, copy)
    assert torch.count_nonzero(student.get_parameter("2.bias")) == 0
    assert torch.count_nonzero(student.get_parameter("0.bias")) == 3


class Branches(nn.Module):
    """Two layers of one shape, of which one sees the image at half its size; either may run first."""

    def __init__(self, width: int, *, coarse_first: bool) -> None:
        super().__init__()
        self.coarse, self.fine, self.head = nn.Conv2d(1, width, 1), nn.Conv2d(1, width, 1), nn.Linear(width, 5)
        self.coarse_first = coarse_first

    def forward(self, images: Tensor) -> Tensor:
        layers = (self.coarse, nn.functional.avg_pool2d(images, 2)), (self.fine, images)
        maps = [layer(given).relu() for layer, given in (layers if self.coarse_first else layers[::-1])]
        logits: Tensor = self.head(sum(each.mean(dim=(2, 3)) for each in maps))
        return logits


def test_layers_of_one_shape_are_told_apart_by_their_maps() -> None:
    teacher = Branches(6, coarse_first=True)
    student = nn.Sequential(Branches(3, coarse_first=False))  # a wrapper changes all names
    found = pair(student, teacher, IMAGES)
    assert isinstance(found, Pairing)
    assert found.layers == {"0.fine": "fine", "0.coarse": "coarse", "0.head": "head"}
