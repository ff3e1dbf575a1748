"""The probe that moves nothing, and the way back from a game that left the finite numbers."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from miniature import SmallNetwork, build_game
from states import assert_same_state
from torch import Tensor, nn

from dfadc.distillation.loop import distill
from dfadc.distillation.monitor import MAX_ROLLBACKS, MAX_SKIPPED, PROBE_SIZE, Monitor
from dfadc.errors import TrainingDiverged

if TYPE_CHECKING:
    from dfadc.distillation.game import Game


def play(game: Game, steps: int = 1) -> None:
    distill(game, game.players.step + steps, lambda _: None)


def spoil(module: nn.Module, value: float = math.nan) -> None:
    with torch.no_grad():
        next(iter(module.parameters())).fill_(value)


def rate(game: Game) -> float:
    game.players.student.set_learning_rate(0.0)
    rate: float = game.players.student.optimizer.param_groups[0]["lr"]
    return rate


class Classifier(nn.Module):
    """A teacher whose classes are set by hand: an image's class is told by its mean."""

    def __init__(self, *, num_used: int) -> None:
        super().__init__()
        self.num_used = num_used

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean(dim=(1, 2, 3))
        chosen = means.argsort().argsort() % self.num_used
        return nn.functional.one_hot(chosen, 10).float() + 0 * means[:, None]


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_the_probe_moves_nothing(recipe: str) -> None:
    game, twin = build_game(recipe), build_game(recipe)
    for each in (game, twin):
        play(each)
    before = copy.deepcopy(game.players.state_dict())
    teacher = copy.deepcopy(game.teacher.state_dict())
    Monitor(game).probe()
    assert_same_state(game.players.state_dict(), before)
    assert_same_state(game.teacher.state_dict(), teacher)
    for each in (game, twin):
        play(each, 2)
    assert_same_state(game.players.state_dict(), twin.players.state_dict())


def test_the_probe_reads_the_same_twice_and_after_a_resume() -> None:
    game = build_game("auto")
    play(game)
    monitor = Monitor(game)
    assert monitor.probe() == monitor.probe() == Monitor(game).probe()


@pytest.mark.parametrize("num_used", [1, 2, 10])
def test_class_entropy_tells_a_collapse(num_used: int) -> None:
    game = build_game("dfad", teacher=Classifier(num_used=num_used))
    counts = np.bincount(np.arange(PROBE_SIZE) % num_used, minlength=10) / PROBE_SIZE
    entropy = -sum(share * math.log(share) for share in counts if share) / math.log(10)
    assert Monitor(game).probe().class_entropy == pytest.approx(entropy, abs=1e-5)


def test_agreement_is_the_share_of_equal_classes_of_the_averaged_student() -> None:
    game = build_game("auto", "student.ema_decay=0.5", "generator.ema_decay=0.5")
    play(game, 2)
    monitor = Monitor(game)
    players = game.players
    with torch.no_grad():
        images = players.generator.average.eval()(monitor.latents)
        expected = np.equal(
            game.teacher(images).argmax(1).numpy(), players.student.average.eval()(images).argmax(1).numpy()
        ).mean()
    assert monitor.probe().agreement == pytest.approx(expected)


def test_a_student_that_is_the_teacher_agrees_on_everything() -> None:
    torch.manual_seed(5)
    teacher = SmallNetwork().eval().requires_grad_(requires_grad=False)
    student = SmallNetwork()
    student.load_state_dict(teacher.state_dict())
    assert Monitor(build_game("dfad", teacher=teacher, student=student)).probe().agreement == 1.0


def test_a_healthy_game_is_left_alone() -> None:
    game = build_game("auto")
    monitor = Monitor(game)
    play(game)
    before = copy.deepcopy(game.players.state_dict())
    assert monitor.check_finite() is None
    assert_same_state(game.players.state_dict(), before)


def test_a_few_skipped_updates_are_no_reason_to_go_back() -> None:
    game = build_game("auto")
    monitor = Monitor(game)
    game.players.student.skipped += MAX_SKIPPED - 1
    assert monitor.check_finite() is None
    assert monitor.rollbacks == 0


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
@pytest.mark.parametrize("who", ["student", "generator"])
def test_both_players_are_taken_back_and_go_on_at_half_the_rate(recipe: str, who: str) -> None:
    game = build_game(recipe, "steps=100")
    monitor = Monitor(game)
    play(game)
    assert monitor.check_finite() is None
    healthy = copy.deepcopy(game.players.state_dict())
    full_rate = rate(game)
    play(game)
    spoil(getattr(game.players, who).module)
    play(game, MAX_SKIPPED)
    note = monitor.check_finite()
    assert note is not None
    assert "taken back" in note
    for name, player in (("student", game.players.student), ("generator", game.players.generator)):
        assert_same_state(player.module.state_dict(), healthy[name]["module"])
        assert_same_state(player.optimizer.state_dict()["state"], healthy[name]["optimizer"]["state"])
        assert player.rate_scale == 0.5
    assert rate(game) == pytest.approx(full_rate / 2)
    # Whatever was remembered meanwhile must not carry the trouble on: the game really goes on.
    play(game, 3)
    assert float(game.players.student.skipped) == float(game.players.generator.skipped) == 0
    assert monitor.check_finite() is None


def test_a_game_that_diverges_before_the_first_look_is_taken_back_to_its_start() -> None:
    game = build_game("auto")
    start = copy.deepcopy(game.players.student.state_dict())
    monitor = Monitor(game)
    spoil(game.players.student.module)
    play(game, MAX_SKIPPED)
    assert monitor.check_finite() is not None
    assert_same_state(game.players.student.module.state_dict(), start["module"])


def test_statistics_that_are_not_finite_are_trouble_even_while_weights_move() -> None:
    """In train mode nothing else would ever show it: gradients do not depend on the running statistics."""
    game = build_game("dfad")
    monitor = Monitor(game)
    dict(game.players.student.module.named_buffers())["features.1.running_var"].fill_(math.inf)
    play(game)
    assert float(game.players.student.skipped) == 0
    assert monitor.check_finite() is not None
    assert all(buffer.isfinite().all() for buffer in game.players.student.module.buffers())


def test_a_learning_rate_beyond_reason_ends_the_run() -> None:
    """1e30 is what a recipe cannot ask for: the weights leave the finite numbers within a few updates."""
    game = build_game("auto", "steps=100")
    game.players.student.rate_scale = game.players.generator.rate_scale = 1e31
    monitor = Monitor(game)
    for _ in range(MAX_ROLLBACKS):
        play(game, 2)
        assert monitor.check_finite() is not None
    play(game, 2)
    with pytest.raises(TrainingDiverged, match=r"diverged at step \d+") as caught:
        monitor.check_finite()
    assert caught.value.exit_code == 6
    assert "optimizer.learning_rate" in caught.value.hint
    # Each time it goes on at half the rate before.
    assert game.players.student.rate_scale == 1e31 / 2**MAX_ROLLBACKS


def test_a_state_with_skipped_updates_is_not_taken_for_healthy() -> None:
    game = build_game("auto")
    monitor = Monitor(game)
    first = next(iter(game.players.student.parameters))
    start = first.detach().clone()
    with torch.no_grad():
        first.add_(1)
    game.players.student.skipped += 1
    assert monitor.check_finite() is None
    game.players.student.skipped += MAX_SKIPPED
    assert monitor.check_finite() is not None
    assert torch.equal(first, start)
