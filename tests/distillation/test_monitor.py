"""The probe that moves nothing, and the way back from a run that left the finite numbers or collapsed."""

from __future__ import annotations

import copy
import io
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from miniature import SmallNetwork, build_run
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
from dfadc.distillation.trainable import TrainableNetwork, forget_
from dfadc.errors import TrainingDiverged
from dfadc.teacher.load import Teacher, load_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from dfadc.distillation.distillation import Distillation


def play(run: Distillation, steps: int = 1) -> None:
    distill(run, run.state.step + steps, lambda _: None)


def spoil(module: nn.Module, value: float = math.nan) -> None:
    with torch.no_grad():
        next(iter(module.parameters())).fill_(value)


def rate(run: Distillation) -> float:
    run.state.student.set_learning_rate(0.0)
    rate: float = run.state.student.optimizer.param_groups[0]["lr"]
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
    run, twin = build_run(recipe), build_run(recipe)
    monitors = [Monitor(each) for each in (run, twin)]
    for each in (run, twin):
        play(each)
    before = copy.deepcopy(run.state.state_dict())
    teacher = copy.deepcopy(run.teacher.module.state_dict())
    monitors[0].probe()
    assert_same_state(run.state.state_dict(), before)
    assert_same_state(run.teacher.module.state_dict(), teacher)
    for each in (run, twin):
        play(each, 2)
    assert_same_state(run.state.state_dict(), twin.state.state_dict())


def test_the_probe_reads_the_same_twice_and_after_a_resume() -> None:
    run = build_run("auto")
    play(run)
    monitor = Monitor(run)
    assert monitor.probe() == monitor.probe() == Monitor(run).probe()


@pytest.mark.parametrize("num_used", [1, 2, 10])
def test_class_entropy_tells_a_collapse(num_used: int) -> None:
    # One part of the probe: this teacher ranks the images that it is given together.
    run = build_run("dfad", f"batch_size={PROBE_SIZE}", teacher=Classifier(num_used=num_used))
    counts = np.bincount(np.arange(PROBE_SIZE) % num_used, minlength=10) / PROBE_SIZE
    entropy = -sum(share * math.log(share) for share in counts if share) / math.log(10)
    reading = Monitor(run).probe()
    assert reading.class_entropy == pytest.approx(entropy, abs=1e-5)
    assert reading.num_classes == num_used
    # Whoever agrees on one class agrees on nothing.
    assert reading.collapse == ("collapsed: 1 class" if num_used == 1 else "")
    assert ProbeReading(COLLAPSED / 2, 1.0, 3).collapse == "collapsed: 3 classes"


def test_agreement_is_the_share_of_equal_classes_of_the_averaged_student() -> None:
    run = build_run("auto", "student.ema_decay=0.5", "generator.ema_decay=0.5")
    play(run, 2)
    monitor = Monitor(run)
    state = run.state
    with torch.no_grad():
        images = state.generator.average.eval()(monitor.latents)
        expected = np.equal(
            run.teacher.module(images).argmax(1).numpy(), state.student.average.eval()(images).argmax(1).numpy()
        ).mean()
    assert monitor.probe().agreement == pytest.approx(expected)


def test_a_student_that_is_the_teacher_agrees_on_everything() -> None:
    torch.manual_seed(5)
    teacher = SmallNetwork().eval().requires_grad_(requires_grad=False)
    student = SmallNetwork()
    student.load_state_dict(teacher.state_dict())
    assert Monitor(build_run("dfad", teacher=teacher, student=student)).probe().agreement == 1.0


def test_a_healthy_game_is_left_alone() -> None:
    run = build_run("auto")
    monitor = Monitor(run)
    play(run)
    before = copy.deepcopy(run.state.state_dict())
    assert monitor.check_finite() is None
    after = run.state.state_dict()
    # All but the state to go back to, which is now this one.
    assert before.pop("registered").keys() == after.pop("registered").keys()
    assert_same_state(after, before)


def test_a_few_skipped_updates_are_no_reason_to_go_back() -> None:
    run = build_run("auto")
    monitor = Monitor(run)
    run.state.student.skipped += MAX_SKIPPED - 1
    assert monitor.check_finite() is None
    assert monitor.rollbacks == 0


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
@pytest.mark.parametrize("who", ["student", "generator"])
def test_both_players_are_taken_back_and_go_on_at_half_the_rate(recipe: str, who: str) -> None:
    run = build_run(recipe, "steps=100")
    monitor = Monitor(run)
    play(run)
    assert monitor.check_finite() is None
    healthy = copy.deepcopy(run.state.state_dict())
    full_rate = rate(run)
    play(run)
    spoil(getattr(run.state, who).module)
    play(run, MAX_SKIPPED)
    note = monitor.check_finite()
    assert note is not None
    assert "taken back" in note
    for name, player in (("student", run.state.student), ("generator", run.state.generator)):
        assert_same_state(player.module.state_dict(), healthy[name]["module"])
        assert_same_state(player.optimizer.state_dict()["state"], healthy[name]["optimizer"]["state"])
        assert player.rate_scale == 0.5
    assert rate(run) == pytest.approx(full_rate / 2)
    # Whatever was remembered meanwhile must not carry the trouble on: the run really goes on.
    play(run, 3)
    assert float(run.state.student.skipped) == float(run.state.generator.skipped) == 0
    assert monitor.check_finite() is None


def test_a_game_that_diverges_before_the_first_look_is_taken_back_to_its_start() -> None:
    run = build_run("auto")
    start = copy.deepcopy(run.state.student.state_dict())
    monitor = Monitor(run)
    spoil(run.state.student.module)
    play(run, MAX_SKIPPED)
    assert monitor.check_finite() is not None
    assert_same_state(run.state.student.module.state_dict(), start["module"])


def test_statistics_that_are_not_finite_are_trouble_even_while_weights_move() -> None:
    """In train mode nothing else would ever show it: gradients do not depend on the running statistics."""
    run = build_run("dfad")
    monitor = Monitor(run)
    dict(run.state.student.module.named_buffers())["features.1.running_var"].fill_(math.inf)
    play(run)
    assert float(run.state.student.skipped) == 0
    assert monitor.check_finite() is not None
    assert all(buffer.isfinite().all() for buffer in run.state.student.module.buffers())


def test_a_learning_rate_beyond_reason_ends_the_run() -> None:
    """1e30 is what a recipe cannot ask for: the weights leave the finite numbers within a few updates."""
    run = build_run("auto", "steps=100")
    run.state.student.rate_scale = run.state.generator.rate_scale = 1e31
    monitor = Monitor(run)
    for _ in range(MAX_ROLLBACKS):
        play(run, 2)
        assert monitor.check_finite() is not None
    play(run, 2)
    with pytest.raises(TrainingDiverged, match=r"diverged at step \d+") as caught:
        monitor.check_finite()
    assert caught.value.exit_code == 6
    assert "optimizer.learning_rate" in caught.value.hint
    # Each time it goes on at half the rate before.
    assert run.state.student.rate_scale == 1e31 / 2**MAX_ROLLBACKS


def test_a_run_resumed_after_a_rollback_goes_on_bit_by_bit() -> None:
    """The state to go back to and the number of rollbacks are in the checkpoint, not made anew."""

    def taken_back() -> tuple[Distillation, Monitor]:
        run = build_run("auto", "steps=100")
        monitor = Monitor(run)
        play(run)
        monitor.check_finite()
        play(run)
        spoil(run.state.student.module)
        play(run, MAX_SKIPPED)
        assert monitor.check_finite() is not None
        # Sound, but not looked at: going back leads further than here.
        play(run, 2)
        return run, monitor

    def go_on(run: Distillation, monitor: Monitor) -> None:
        spoil(run.state.generator.module)
        play(run, MAX_SKIPPED)
        assert monitor.check_finite() is not None
        play(run, 2)

    whole, monitor = taken_back()
    stream = io.BytesIO()
    torch.save(whole.state.state_dict(), stream)
    go_on(whole, monitor)

    again = build_run("auto", "steps=100")
    stream.seek(0)
    again.state.load_state_dict(torch.load(stream, weights_only=True))
    resumed = Monitor(again)
    assert resumed.rollbacks == 1
    go_on(again, resumed)
    assert_same_state(again.state.state_dict(), whole.state.state_dict())
    assert resumed.rollbacks == monitor.rollbacks == 2


def test_a_state_with_skipped_updates_is_not_taken_for_healthy() -> None:
    run = build_run("auto")
    monitor = Monitor(run)
    first = next(iter(run.state.student.parameters))
    start = first.detach().clone()
    with torch.no_grad():
        first.add_(1)
    run.state.student.skipped += 1
    assert monitor.check_finite() is None
    run.state.student.skipped += MAX_SKIPPED
    assert monitor.check_finite() is not None
    assert torch.equal(first, start)


def test_where_the_student_lives_from_the_ring_alone_the_probe_is_its_newest_images() -> None:
    alone = ("replay.share=1", "replay.procedural_share=0", "replay.repeats=0", "student.start=0.1")
    rules = (*alone, "generator.latents=noisy", "replay.capacity=1000")
    run = build_run("auto", *rules)
    monitor = Monitor(run)
    play(run, 3)
    newest = run.state.replay.images[:24].float()
    with torch.no_grad():
        answers = [network.eval()(newest).argmax(1) for network in (run.teacher.module, run.state.student.average)]
    reading = monitor.probe()
    assert reading.agreement == pytest.approx(float((answers[0] == answers[1]).float().mean()))
    # Whatever the generator would draw from other latents.
    kill(run.state.generator)
    assert monitor.probe() == reading
    run.state.replay.push(torch.zeros(PROBE_SIZE, 1, 8, 8))
    assert monitor.probe().class_entropy == 0


# ----------------------------------------------------------------------------------------------------- collapse


@pytest.fixture(scope="module")
def digits(digits_teacher: Path) -> Teacher:
    """A teacher of real classes."""
    return load_teacher(digits_teacher)


def build_digits_run(teacher: Teacher, *overrides: str, adversarial: float = 1.0) -> Distillation:
    rules = ("steps=200", "batch_size=16", "student.steps=1", "replay.repeats=0", "generator.ema_decay=0")
    student = SmallNetwork(teacher.contract)
    return build_run(
        "auto",
        *rules,
        *overrides,
        teacher=teacher.module,
        student=student,
        contract=teacher.contract,
        adversarial=adversarial,
    )


def watch(run: Distillation, steps: int, monitor: Monitor | None = None) -> list[tuple[float, str]]:
    """Plays, looking after every step: class entropy and note of each."""
    seen = []
    monitor = monitor or Monitor(run)

    def look(losses: StepLosses) -> None:
        probe, note = monitor.check(float(losses.student_loss))
        seen.append((probe.class_entropy, note))

    distill(run, run.state.step + steps, look)
    return seen


def kill(player: TrainableNetwork) -> None:
    """No weight, no gradient, no momentum: such a generator draws one image for ever."""
    with torch.no_grad():
        for parameter in player.parameters:
            parameter.zero_()
    forget_(player.optimizer)


def test_a_game_of_many_classes_is_left_alone(digits: Teacher) -> None:
    """An untrained generator draws one class or two: that is a beginning, not a collapse."""
    seen = watch(build_digits_run(digits), 25)
    assert seen[0][0] < NARROW
    assert seen[-1][0] > NARROW
    assert all(note == "" for _, note in seen)


def test_a_collapsed_generator_begins_anew_and_the_game_recovers(digits: Teacher) -> None:
    run = build_digits_run(digits)
    distill(run, 10, lambda _: None)
    kill(run.state.generator)
    seen = watch(run, 40)
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
    rules = ("prior.balance=0", "prior.batch_norm=0", "prior.one_hot=10")
    run = build_digits_run(digits, *rules, adversarial=0.0)
    with pytest.raises(TrainingDiverged, match=f"again after it began anew {MAX_RESETS} times") as caught:
        watch(run, 100)
    assert caught.value.exit_code == 6
    assert "prior.balance" in caught.value.hint
    # Four times the patience, and nothing but patience.
    assert run.state.step == (MAX_RESETS + 1) * (PATIENCE_READINGS + 1)


def test_a_recipe_that_wants_no_resets_is_warned_and_left_alone(digits: Teacher) -> None:
    run = build_digits_run(digits, "generator.on_collapse=warn")
    kill(run.state.generator)
    seen = watch(run, 40)
    (note,) = [note for _, note in seen if note]
    assert "teach little" in note
    # All but the last layer's bias, which has a gradient.
    weights = [parameter for parameter in run.state.generator.parameters if parameter.dim() > 1]
    assert not any(weight.detach().any() for weight in weights)


def test_few_classes_are_warned_about_once() -> None:
    run = build_run("auto", "steps=100", "student.steps=1", teacher=Classifier(num_used=2))
    seen = watch(run, 30)
    (warned,) = [(index, note) for index, (_, note) in enumerate(seen) if note]
    assert warned[0] == PATIENCE_READINGS - 1
    assert "draws few classes (class entropy 0.30" in warned[1]


def test_a_tiny_loss_on_few_classes_is_a_collapse_and_no_success() -> None:
    """The student is the teacher, which answers two classes: loss 0 and agreement 100% are worth nothing."""
    run = build_run("auto", "steps=100", "student.steps=1", teacher=Classifier(num_used=2), student=Imitator())
    losses: list[float] = []
    distill(run, 1, lambda each: losses.append(float(each.student_loss)))
    assert losses[0] < TINY_LOSS
    notes = [note for _, note in watch(run, 12) if note]
    assert len(notes) == 1
    assert "has collapsed to few classes (class entropy 0.30, student loss 0)" in notes[0]


def test_a_trouble_that_passes_is_forgotten() -> None:
    run = build_run("auto", "steps=100")
    monitor = Monitor(run)
    for step in range(1, 40):
        run.state.step = step
        entropy = 0.9 if step % 8 == 0 else 0.01
        assert monitor.check_collapse(ProbeReading(entropy, 1.0, 5), student_loss=1.0) is None


def test_patience_is_a_share_of_a_long_run() -> None:
    run = build_run("auto", "steps=1000")
    monitor = Monitor(run)
    acted = []
    for step in range(2, 200, 2):
        run.state.step = step
        if monitor.check_collapse(ProbeReading(0.01, 1.0, 1), student_loss=1.0):
            acted.append(step)
    assert acted[0] == 2 + 0.05 * 1000


def test_a_collapse_in_progress_and_its_resets_are_in_the_checkpoint(digits: Teacher) -> None:
    rules = ("prior.balance=0", "prior.batch_norm=0", "prior.one_hot=10")
    whole, again = (build_digits_run(digits, *rules, adversarial=0.0) for _ in range(2))
    monitor = Monitor(whole)
    watch(whole, 18, monitor)
    state = copy.deepcopy(whole.state.state_dict())
    expected = watch(whole, 8, monitor)
    again.state.load_state_dict(state)
    assert watch(again, 8) == expected
    assert sum("2 of 3" in note for _, note in expected) == 1
    assert_same_state(again.state.state_dict(), whole.state.state_dict())
