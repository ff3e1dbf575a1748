"""The probe that moves nothing, and the way back from a game that left the finite numbers or collapsed."""

from __future__ import annotations

import copy
import io
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from miniature import SmallNetwork, build_game
from states import assert_same_state
from torch import Tensor, nn

from dfadc.distillation.loop import StepLosses, distill
from dfadc.distillation.monitor import (
    COLLAPSED,
    MAX_RESETS,
    MAX_ROLLBACKS,
    MAX_SKIPPED,
    NARROW,
    PATIENCE_READINGS,
    PROBE_SIZE,
    TINY_LOSS,
    Monitor,
    ProbeReading,
)
from dfadc.distillation.trainable import Player, forget_
from dfadc.errors import TrainingDiverged
from dfadc.teacher.load import Teacher, load_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.distillation.objectives import Game


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


class Imitator(Classifier):
    """A student that knows the teacher's two classes, with a weight that changes nothing."""

    def __init__(self) -> None:
        super().__init__(num_used=2)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + 0 * self.weight


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_the_probe_moves_nothing(recipe: str) -> None:
    game, twin = build_game(recipe), build_game(recipe)
    monitors = [Monitor(each) for each in (game, twin)]
    for each in (game, twin):
        play(each)
    before = copy.deepcopy(game.players.state_dict())
    teacher = copy.deepcopy(game.teacher.state_dict())
    monitors[0].probe()
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
    # One part of the probe: this teacher ranks the images that it is given together.
    game = build_game("dfad", f"batch_size={PROBE_SIZE}", teacher=Classifier(num_used=num_used))
    counts = np.bincount(np.arange(PROBE_SIZE) % num_used, minlength=10) / PROBE_SIZE
    entropy = -sum(share * math.log(share) for share in counts if share) / math.log(10)
    reading = Monitor(game).probe()
    assert reading.class_entropy == pytest.approx(entropy, abs=1e-5)
    assert reading.num_classes == num_used
    # Whoever agrees on one class agrees on nothing.
    assert reading.collapse == ("collapsed: 1 class" if num_used == 1 else "")
    assert ProbeReading(COLLAPSED / 2, 1.0, 3).collapse == "collapsed: 3 classes"


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
    after = game.players.state_dict()
    # All but the state to go back to, which is now this one.
    assert before.pop("carried").keys() == after.pop("carried").keys()
    assert_same_state(after, before)


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


def test_a_run_resumed_after_a_rollback_goes_on_bit_by_bit() -> None:
    """The state to go back to and the number of rollbacks are in the checkpoint, not made anew."""

    def taken_back() -> tuple[Game, Monitor]:
        game = build_game("auto", "steps=100")
        monitor = Monitor(game)
        play(game)
        monitor.check_finite()
        play(game)
        spoil(game.players.student.module)
        play(game, MAX_SKIPPED)
        assert monitor.check_finite() is not None
        # Sound, but not looked at: going back leads further than here.
        play(game, 2)
        return game, monitor

    def go_on(game: Game, monitor: Monitor) -> None:
        spoil(game.players.generator.module)
        play(game, MAX_SKIPPED)
        assert monitor.check_finite() is not None
        play(game, 2)

    whole, monitor = taken_back()
    stream = io.BytesIO()
    torch.save(whole.players.state_dict(), stream)
    go_on(whole, monitor)

    again = build_game("auto", "steps=100")
    stream.seek(0)
    again.players.load_state_dict(torch.load(stream, weights_only=True))
    resumed = Monitor(again)
    assert resumed.rollbacks == 1
    go_on(again, resumed)
    assert_same_state(again.players.state_dict(), whole.players.state_dict())
    assert resumed.rollbacks == monitor.rollbacks == 2


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


def test_where_the_student_lives_from_the_ring_alone_the_probe_is_its_newest_images() -> None:
    rules = ("replay.share=1", "student.start=0.1", "generator.latents=optimised", "replay.capacity=1000")
    game = build_game("auto", *rules)
    monitor = Monitor(game)
    play(game, 3)
    newest = game.players.ring.images[:24].float()
    with torch.no_grad():
        answers = [network.eval()(newest).argmax(1) for network in (game.teacher, game.players.student.average)]
    reading = monitor.probe()
    assert reading.agreement == pytest.approx(float((answers[0] == answers[1]).float().mean()))
    # Whatever the generator would draw from other latents.
    kill(game.players.generator)
    assert monitor.probe() == reading
    game.players.ring.push(torch.zeros(PROBE_SIZE, 1, 8, 8))
    assert monitor.probe().class_entropy == 0


# ----------------------------------------------------------------------------------------------------- collapse


@pytest.fixture(scope="module")
def digits(digits_teacher: Path) -> Teacher:
    """A teacher of real classes."""
    return load_teacher(digits_teacher)


def build_digits_game(teacher: Teacher, *overrides: str) -> Game:
    rules = ("steps=200", "batch_size=16", "student.steps=1", "replay.echoes=0", "generator.ema_decay=0")
    student = SmallNetwork(teacher.contract)
    return build_game("auto", *rules, *overrides, teacher=teacher.module, student=student, contract=teacher.contract)


def watch(game: Game, steps: int, monitor: Monitor | None = None) -> list[tuple[float, str]]:
    """Plays, looking after every step: class entropy and note of each."""
    seen = []
    monitor = monitor or Monitor(game)

    def look(losses: StepLosses) -> None:
        probe, note = monitor.look(float(losses.student_loss))
        seen.append((probe.class_entropy, note))

    distill(game, game.players.step + steps, look)
    return seen


def kill(player: Player) -> None:
    """No weight, no gradient, no momentum: such a generator draws one image for ever."""
    with torch.no_grad():
        for parameter in player.parameters:
            parameter.zero_()
    forget_(player.optimizer)


def test_a_game_of_many_classes_is_left_alone(digits: Teacher) -> None:
    """An untrained generator draws one class or two: that is a beginning, not a collapse."""
    seen = watch(build_digits_game(digits), 25)
    assert seen[0][0] < NARROW
    assert seen[-1][0] > NARROW
    assert all(note == "" for _, note in seen)


def test_a_collapsed_generator_begins_anew_and_the_game_recovers(digits: Teacher) -> None:
    game = build_digits_game(digits)
    distill(game, 10, lambda _: None)
    kill(game.players.generator)
    seen = watch(game, 40)
    notes = [(index, note) for index, (_, note) in enumerate(seen) if note]
    # The 10 readings that it is given, and 5% of the run's 200 steps; then one reset is enough.
    (index, note), *others = notes
    assert others == []
    assert index == 10
    assert "has collapsed to few classes (class entropy 0.00" in note
    assert "begins anew (1 of 3)" in note
    assert max(entropy for entropy, _ in seen[:11]) < COLLAPSED
    assert seen[-1][0] > NARROW


def test_resets_that_do_not_help_end_the_run_with_what_to_try(digits: Teacher) -> None:
    """Nothing but sure answers are asked for: one class is the best answer, each time."""
    rules = ("prior.balance=0", "prior.batch_norm=0", "prior.one_hot=10", "generator.adversarial=0")
    game = build_digits_game(digits, *rules)
    with pytest.raises(TrainingDiverged, match=f"again after it began anew {MAX_RESETS} times") as caught:
        watch(game, 100)
    assert caught.value.exit_code == 6
    assert "prior.balance" in caught.value.hint
    # Four times the patience, and nothing but patience.
    assert game.players.step == (MAX_RESETS + 1) * (PATIENCE_READINGS + 1)


def test_a_recipe_that_wants_no_resets_is_warned_and_left_alone(digits: Teacher) -> None:
    game = build_digits_game(digits, "generator.on_collapse=warn")
    kill(game.players.generator)
    seen = watch(game, 40)
    (note,) = [note for _, note in seen if note]
    assert "worth little" in note
    # All but the last layer's bias, which has a gradient.
    weights = [parameter for parameter in game.players.generator.parameters if parameter.dim() > 1]
    assert not any(weight.detach().any() for weight in weights)


def test_few_classes_are_warned_about_once() -> None:
    game = build_game("auto", "steps=100", "student.steps=1", teacher=Classifier(num_used=2))
    seen = watch(game, 30)
    (warned,) = [(index, note) for index, (_, note) in enumerate(seen) if note]
    assert warned[0] == PATIENCE_READINGS - 1
    assert "draws few classes (class entropy 0.30" in warned[1]


def test_a_tiny_loss_on_few_classes_is_a_collapse_and_no_success() -> None:
    """The student is the teacher, which answers two classes: loss 0 and agreement 100% are worth nothing."""
    game = build_game("auto", "steps=100", "student.steps=1", teacher=Classifier(num_used=2), student=Imitator())
    losses: list[float] = []
    distill(game, 1, lambda each: losses.append(float(each.student_loss)))
    assert losses[0] < TINY_LOSS
    notes = [note for _, note in watch(game, 12) if note]
    assert len(notes) == 1
    assert "has collapsed to few classes (class entropy 0.30, student loss 0)" in notes[0]


def test_a_trouble_that_passes_is_forgotten() -> None:
    game = build_game("auto", "steps=100")
    monitor = Monitor(game)
    for step in range(1, 40):
        game.players.step = step
        entropy = 0.9 if step % 8 == 0 else 0.01
        assert monitor.check_collapse(ProbeReading(entropy, 1.0, 5), student_loss=1.0) is None


def test_patience_is_a_share_of_a_long_run() -> None:
    game = build_game("auto", "steps=1000")
    monitor = Monitor(game)
    acted = []
    for step in range(2, 200, 2):
        game.players.step = step
        if monitor.check_collapse(ProbeReading(0.01, 1.0, 1), student_loss=1.0):
            acted.append(step)
    assert acted[0] == 2 + 0.05 * 1000


def test_a_collapse_in_progress_and_its_resets_are_in_the_checkpoint(digits: Teacher) -> None:
    rules = ("prior.balance=0", "prior.batch_norm=0", "prior.one_hot=10", "generator.adversarial=0")
    whole, again = build_digits_game(digits, *rules), build_digits_game(digits, *rules)
    monitor = Monitor(whole)
    watch(whole, 18, monitor)
    state = copy.deepcopy(whole.players.state_dict())
    expected = watch(whole, 8, monitor)
    again.players.load_state_dict(state)
    assert watch(again, 8) == expected
    assert sum("2 of 3" in note for _, note in expected) == 1
    assert_same_state(again.players.state_dict(), whole.players.state_dict())
