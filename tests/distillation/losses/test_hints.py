"""Hints: which layers are compared, what their distance is, whom it moves, and who has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from miniature import SMALL_CONTRACT, SmallNetwork, build_game
from torch import nn

from dfadc.contract import ImageContract
from dfadc.distillation.loop import distill, update_student
from dfadc.distillation.losses.hints import LayerHints
from dfadc.errors import DfadcError
from dfadc.recipe.load import load_recipe
from dfadc.recipe.resolve import fit_hints
from dfadc.student.build import build_student
from dfadc.student.inherit import Correspondence, corresponding_layers, inherit_weights_

if TYPE_CHECKING:
    from torch import Tensor

    from dfadc.distillation.objectives import Game


LENET_KINDS = [nn.Conv2d, nn.Conv2d, nn.Conv2d, nn.Linear]


def images(count: int) -> Tensor:
    return torch.randn(count, *SMALL_CONTRACT.input_size, generator=torch.Generator().manual_seed(3))


def hooks_of(module: nn.Module) -> int:
    return sum(len(layer._forward_hooks) for layer in module.modules())  # noqa: SLF001


# ------------------------------------------------------------------------------------------------------ which layers


def test_a_layer_corresponds_to_the_channels_that_the_student_inherits() -> None:
    torch.manual_seed(0)
    teacher, student = (SmallNetwork(width=width) for width in (6, 4))
    for norm in teacher.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight)
    assert inherit_weights_(student, teacher)
    layers = corresponding_layers(student, teacher)
    assert [layer.student for layer in layers] == [student.features[1], student.features[4]]
    assert [layer.teacher for layer in layers] == [teacher.features[1], teacher.features[4]]
    assert [layer.axis for layer in layers] == [1, 1]
    for layer in layers:
        given = layer.teacher.get_parameter("weight")[layer.channels]
        assert torch.equal(layer.student.get_parameter("weight"), given)


def test_without_batch_norm_it_is_what_is_narrower() -> None:
    contract = ImageContract((1, 28, 28), 10)
    student, teacher = (build_student(name, contract).module for name in ("lenet5_half", "lenet5"))
    layers = corresponding_layers(student, teacher)
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
    assert corresponding_layers(*(build_student(name, contract).module for name in (student, teacher))) == []


# ----------------------------------------------------------------------------------------------------- the distance


@pytest.mark.parametrize("asked", [8, 5])
def test_the_distance_is_the_error_in_units_of_the_teachers_variance(asked: int) -> None:
    """Counted here once more; the teacher may be asked about the first images alone."""
    torch.manual_seed(0)
    teacher, student = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 2, 3)
    channels = torch.tensor([1, 4])
    hints = LayerHints([Correspondence(student, teacher, channels, axis=1)])
    expected = hints.watch(teacher, images(asked)).detach().numpy()[:, [1, 4]]
    found = student(images(8)).detach().numpy()[:asked]
    distance = hints.take()
    assert distance is not None
    assert distance.item() == pytest.approx(np.square(found - expected).mean() / expected.var(), rel=1e-5)
    assert hints.take() is None


def test_nothing_is_seen_unless_it_watches() -> None:
    teacher, student = nn.Linear(4, 4), nn.Linear(4, 2)
    hints = LayerHints([Correspondence(student, teacher, torch.tensor([0, 3]), axis=-1)])
    teacher(torch.randn(3, 4))
    student(torch.randn(3, 4))
    assert hints.take() is None
    hints.close()
    assert hooks_of(teacher) == hooks_of(student) == 0


# ------------------------------------------------------------------------------------------------- within the game


def game_of(*rules: str) -> Game:
    game = build_game("auto", "student.l1=0", "augmentation.mixup=0", *rules)
    game.players.student.module.eval()
    return game


def test_they_are_added_with_their_weight_and_move_the_student() -> None:
    game, plain = game_of("student.hints=3"), game_of("student.hints=0")
    assert plain.hints is None
    batch = game.draw_student_batch()
    lesson, without = game.student_loss(batch), plain.student_loss(batch)
    student, teacher = game.players.student.module, game.teacher
    seen: list[Tensor] = []
    expected = []
    for layer in corresponding_layers(student, teacher):
        handles = [each.register_forward_hook(lambda *args: seen.append(args[2])) for each in layer[:2]]
        student(lesson.images)
        teacher(lesson.images)
        for handle in handles:
            handle.remove()
        own, given = seen[-2].detach(), seen[-1][:, layer.channels]
        expected.append(float((own - given).square().mean() / given.var(correction=0)))
    assert lesson.loss.item() == pytest.approx(without.loss.item() + 3 * np.mean(expected), rel=1e-4)
    weights = [each.players.student.module.get_parameter("features.0.weight") for each in (game, plain)]
    losses = (lesson.loss, without.loss)
    gradients = [torch.autograd.grad(loss, weight)[0] for loss, weight in zip(losses, weights, strict=True)]
    assert not torch.allclose(gradients[0], gradients[1])


def test_the_generator_and_other_looks_are_not_paid_for_them() -> None:
    game = build_game("auto", "student.hints=1")
    distill(game, 2, lambda _: None)
    assert game.hints is not None
    game.generator_loss(game.draw_generator_batch())
    assert game.hints.take() is None
    update_student(game, game.draw_student_batch())
    assert game.hints.take() is None, "the loss has taken it"


def test_a_game_that_is_over_leaves_both_networks_without_hooks() -> None:
    game = build_game("auto", "prior.batch_norm=0")
    assert hooks_of(game.teacher) == hooks_of(game.players.student.module) == 2
    assert hooks_of(game.players.student.average) == 0
    game.close()
    assert hooks_of(game.teacher) == hooks_of(game.players.student.module) == 0


# ---------------------------------------------------------------------------------------------------- who has none


def test_a_recipe_that_adapts_drops_them_and_who_asks_for_them_is_told() -> None:
    recipe = load_recipe("auto")
    assert recipe.student.hints > 0
    assert fit_hints(recipe, "lenet5", num_layers=5) is recipe
    assert fit_hints(recipe, "lenet5", num_layers=0).student.hints == 0
    for asked in (load_recipe("auto", ["student.hints=2"]), load_recipe("dfad", ["student.hints=2"])):
        with pytest.raises(DfadcError, match=r"student\.hints = 2 compares .* and lenet5 is not the teacher") as caught:
            fit_hints(asked, "lenet5", num_layers=0)
        assert caught.value.exit_code == 2
        assert "--set student.hints=0" in caught.value.hint
