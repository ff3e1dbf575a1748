"""The loop: the paper's algorithm to the letter, who moves when, and where a stop leaves the state."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniature import build_run
from states import assert_same_state
from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.distillation.loop import StepLosses, distill, update_generator, update_student
from dfadc.networks.zoo.lenet import lenet5, lenet5_half

if TYPE_CHECKING:
    from dfadc.distillation.distillation import Distillation

#: The student is trained on replayed images alone.
REPLAY_ALONE = ("replay.share=1", "replay.procedural_share=0", "replay.repeats=0")


def play_the_paper(
    teacher: nn.Module, student: nn.Module, generator: nn.Module, *, steps: int, batch_size: int, latent_dim: int
) -> tuple[list[float], list[float]]:
    """Fang et al. 2019, algorithm 1, written down from the paper: 5 student updates, then 1 of the generator."""
    dice = torch.Generator().manual_seed(1)
    # Fused, for the same rounding: Adam makes a difference of 1e-6 out of one of 1e-9 in a gradient near 0.
    student_optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, fused=True)
    student_losses, generator_losses = [], []
    for _ in range(steps):
        for _ in range(5):
            z = torch.randn(batch_size, latent_dim, generator=dice)
            x = generator(z).detach()
            loss = (teacher(x) - student(x)).abs().mean()
            student_optimizer.zero_grad()
            torch.autograd.backward(loss)
            student_optimizer.step()
        student_losses.append(loss.item())
        z = torch.randn(batch_size, latent_dim, generator=dice)
        x = generator(z)
        loss = -(teacher(x) - student(x)).abs().mean()
        generator_optimizer.zero_grad()
        torch.autograd.backward(loss)
        generator_optimizer.step()
        generator_losses.append(loss.item())
    return student_losses, generator_losses


def clone(run: Distillation) -> tuple[nn.Module, nn.Module, nn.Module]:
    return (
        copy.deepcopy(run.teacher.module).eval(),
        copy.deepcopy(run.state.student.module).train(),
        copy.deepcopy(run.state.generator.module).train(),
    )


def assert_close(module: nn.Module, expected: nn.Module) -> None:
    others = expected.state_dict()
    for name, value in module.state_dict().items():
        difference = (value - others[name]).abs().max().item()
        assert difference <= 1e-6 * max(1.0, others[name].abs().max().item()), name


@pytest.mark.parametrize("networks", ["batch norm", "lenet5"])
def test_recipe_dfad_is_the_papers_algorithm(networks: str) -> None:
    contract = ImageContract((1, 28, 28), 10) if networks == "lenet5" else ImageContract((1, 8, 8), 10)
    pair: dict[str, Any] = {}
    if networks == "lenet5":
        torch.manual_seed(1)
        pair = {
            "teacher": lenet5(contract).eval().requires_grad_(requires_grad=False),
            "student": lenet5_half(contract),
        }
    run = build_run("dfad", "batch_size=4", contract=contract, channels_last=False, **pair)
    teacher, student, generator = clone(run)
    losses: list[StepLosses] = []
    distill(run, 2, losses.append)
    student_losses, generator_losses = play_the_paper(
        teacher, student, generator, steps=2, batch_size=4, latent_dim=run.recipe.generator.latent_dim
    )
    assert [float(each.student_loss) for each in losses] == pytest.approx(student_losses, abs=1e-6)
    assert [float(each.generator_loss) for each in losses] == pytest.approx(generator_losses, abs=1e-6)
    assert_close(run.state.student.module, student)
    assert_close(run.state.generator.module, generator)
    assert_close(run.teacher.module, teacher)


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_a_student_update_moves_the_student_alone(recipe: str) -> None:
    run = build_run(recipe)
    # From the second update on images are replayed too.
    update_student(run, run.student.draw_batch())
    teacher, student, generator = clone(run)
    update_student(run, run.student.draw_batch())
    assert_same_state(run.teacher.module.state_dict(), teacher.state_dict())
    for parameter, before in zip(run.state.generator.module.parameters(), generator.parameters(), strict=True):
        assert torch.equal(parameter, before)
        assert parameter.grad is None
    moved = [
        not torch.equal(parameter, before)
        for parameter, before in zip(run.state.student.parameters, student.parameters(), strict=True)
    ]
    assert all(moved)


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_a_generator_update_moves_the_generator_alone(recipe: str) -> None:
    """In eval mode not even the student's batch-norm statistics see the images."""
    run = build_run(recipe, "generator.student_mode=eval")
    distill(run, 1, lambda _: None)
    run.state.student.optimizer.zero_grad(set_to_none=True)
    teacher, student, generator = clone(run)
    update_generator(run)
    assert_same_state(run.teacher.module.state_dict(), teacher.state_dict())
    assert_same_state(run.state.student.module.state_dict(), student.state_dict())
    assert all(parameter.grad is None for parameter in run.state.student.module.parameters())
    assert any(
        not torch.equal(parameter, before)
        for parameter, before in zip(run.state.generator.parameters, generator.parameters(), strict=True)
    )


def test_in_train_mode_the_students_statistics_absorb_the_generators_images() -> None:
    """As in the paper's code: parameters stay, statistics do not."""
    run = build_run("dfad")
    assert run.recipe.generator.student_mode == "train"
    _, student, _ = clone(run)
    update_generator(run)
    for parameter, before in zip(run.state.student.parameters, student.parameters(), strict=True):
        assert torch.equal(parameter, before)
    now, was = run.state.student.module.state_dict(), student.state_dict()
    assert not torch.equal(now["features.1.running_mean"], was["features.1.running_mean"])


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_the_teacher_never_changes_nor_holds_a_gradient(recipe: str) -> None:
    run = build_run(recipe)
    teacher, _, _ = clone(run)
    distill(run, 2, lambda _: None)
    assert_same_state(run.teacher.module.state_dict(), teacher.state_dict())
    assert not run.teacher.module.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in run.teacher.module.parameters())


@pytest.mark.parametrize(("student_steps", "repeats", "generator_steps"), [(1, 0, 1), (3, 4, 2)])
def test_a_step_has_the_updates_that_the_recipe_says(student_steps: int, repeats: int, generator_steps: int) -> None:
    rules = (f"student.steps={student_steps}", f"replay.repeats={repeats}", f"generator.steps={generator_steps}")
    run = build_run("auto", *rules)
    distill(run, 3, lambda _: None)
    student_updates = student_steps + repeats
    for player, updates in ((run.state.student, student_updates), (run.state.generator, generator_steps)):
        assert player.ema is not None
        assert int(player.ema.n_averaged) == 3 * updates


def test_the_student_waits_for_its_start_while_the_buffer_fills() -> None:
    run = build_run("auto", "steps=8", "student.start=0.3", "generator.latents=noisy", *REPLAY_ALONE)
    start = copy.deepcopy(run.state.student.module.state_dict())
    losses: list[StepLosses] = []
    distill(run, 3, losses.append)
    assert_same_state(run.state.student.module.state_dict(), start)
    assert all(each.student_loss.isnan() for each in losses)
    assert len(run.state.replay) == 3 * run.recipe.batch_size
    assert len(run.state.reservoir) == 16
    distill(run, 4, losses.append)
    assert losses[-1].student_loss.isfinite()
    assert not torch.equal(run.state.student.module.state_dict()["classifier.weight"], start["classifier.weight"])


def test_the_students_schedule_begins_where_it_does() -> None:
    run = build_run("auto", "steps=10", "student.start=0.5", "student.optimizer.learning_rate=0.2", *REPLAY_ALONE)
    rates: list[float] = []
    distill(run, 10, lambda _: rates.append(run.state.student.optimizer.param_groups[0]["lr"]))
    cosine = [0.1 * (1 + math.cos(math.pi * part)) for part in (0, 0, 0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8)]
    assert rates == pytest.approx(cosine, rel=1e-5)


def test_on_step_is_told_of_every_step() -> None:
    run = build_run("auto")
    losses: list[StepLosses] = []
    distill(run, 3, losses.append)
    assert [each.step for each in losses] == [1, 2, 3]
    for each in losses:
        assert set(each.terms) == {"discrepancy", "batch_norm", "one_hot", "balance"}
        for value in (each.student_loss, each.generator_loss, *each.terms.values()):
            assert value.ndim == 0
            assert value.dtype == torch.float32
            assert not value.requires_grad
            assert value.isfinite()


def test_a_run_that_is_over_does_not_go_on() -> None:
    run = build_run("auto")
    distill(run, 2, lambda _: None)
    before = copy.deepcopy(run.state.state_dict())
    distill(run, 2, lambda _: None)
    assert_same_state(run.state.state_dict(), before)


def test_rates_are_set_before_each_step_from_the_share_of_the_whole_run() -> None:
    run = build_run("auto", "steps=4", "student.optimizer.learning_rate=0.2")
    rates: list[float] = []
    distill(run, 4, lambda _: rates.append(run.state.student.optimizer.param_groups[0]["lr"]))
    # The cosine at 0, 1/4, 1/2 and 3/4 of the run.
    assert rates == pytest.approx([0.2, 0.2 * 0.853553, 0.1, 0.2 * 0.146447], rel=1e-5)


def test_what_on_step_raises_stops_between_two_steps() -> None:
    class Stop(Exception):
        pass

    def stop_after_two(losses: StepLosses) -> None:
        if losses.step == 2:
            raise Stop

    run, whole = build_run("auto"), build_run("auto")
    with pytest.raises(Stop):
        distill(run, 4, stop_after_two)
    assert run.state.step == 2
    distill(run, 4, lambda _: None)
    distill(whole, 4, lambda _: None)
    assert_same_state(run.state.state_dict(), whole.state.state_dict())


def test_the_student_learns_to_agree() -> None:
    """Against a generator that stands still the student's loss falls: signs and wiring are right."""
    run = build_run("dfad", "generator.optimizer.learning_rate=1e-12", "student.steps=30", "batch_size=16")
    first = update_student(run, run.student.draw_batch())
    losses: list[Tensor] = []
    distill(run, 2, lambda each: losses.append(each.student_loss))
    assert float(losses[-1]) < 0.5 * float(first)


def test_the_generator_learns_to_disagree() -> None:
    """Against a student that stands still the discrepancy grows."""
    run = build_run("dfad", "student.optimizer.learning_rate=1e-12", "student.steps=1", "generator.steps=20")
    _, before = update_generator(run)
    terms: list[dict[str, Tensor]] = []
    distill(run, 2, lambda each: terms.append(each.terms))
    assert float(terms[-1]["discrepancy"]) > 1.2 * float(before["discrepancy"])


# -------------------------------------------------------------------------------------------------------- repeats


def test_a_repeated_batch_asks_neither_teacher_nor_generator() -> None:
    run = build_run("auto", "replay.repeats=3")
    update_student(run, run.student.draw_batch())
    asked: list[int] = []
    handles = [
        network.register_forward_pre_hook(lambda *_: asked.append(1))
        for network in (run.teacher.module, run.state.generator.module, run.state.generator.average)
    ]
    student = copy.deepcopy(run.state.student.module.state_dict())
    update_student(run, run.student.draw_repeated_batch())
    for handle in handles:
        handle.remove()
    assert not asked
    assert any(not torch.equal(value, student[name]) for name, value in run.state.student.module.state_dict().items())


def test_a_repeated_batch_has_the_images_and_the_logits_of_before() -> None:
    """Mixed images included: the teacher answers a repeated batch now as it is remembered to have answered them."""
    run = build_run("auto", "replay.repeats=3", "augmentation.mixup=1")
    distill(run, 3, lambda _: None)
    batch = run.student.draw_repeated_batch()
    assert batch.replayed.shape == (8, 1, 8, 8)
    assert len(batch.latents) == 0
    torch.testing.assert_close(batch.stored_logits, run.teacher.module(batch.replayed), rtol=1e-2, atol=1e-2)


def test_echoes_are_no_new_images() -> None:
    """Neither replay buffer nor store of repeats nor reservoir takes what a repeated batch repeats."""
    run = build_run("auto", "replay.repeats=3")
    distill(run, 2, lambda _: None)
    state, recipe = run.state, run.recipe
    new = 2 * recipe.student.steps * recipe.batch_size
    assert state.repeats.seen == new
    before = state.replay.seen, state.reservoir.seen
    update_student(run, run.student.draw_repeated_batch())
    assert (state.replay.seen, state.reservoir.seen, state.repeats.seen) == (*before, new)


def test_without_echoes_nothing_is_kept_for_them() -> None:
    assert len(build_run("auto", "replay.repeats=0").state.repeats.images) == 0
    assert len(build_run("dfad").state.repeats.images) == 0


def test_a_run_with_echoes_resumes_bit_by_bit() -> None:
    rules = ("replay.repeats=2", "augmentation.mixup=0.5")
    whole, first = build_run("auto", *rules), build_run("auto", *rules)
    distill(whole, 6, lambda _: None)
    distill(first, 3, lambda _: None)
    rest = build_run("auto", *rules)
    rest.state.load_state_dict(copy.deepcopy(first.state.state_dict()))
    distill(rest, 6, lambda _: None)
    assert_same_state(rest.state.state_dict(), whole.state.state_dict())
