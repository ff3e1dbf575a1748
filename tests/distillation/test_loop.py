"""The loop: the paper's algorithm to the letter, who moves when, and where a stop leaves the players."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import pytest
import torch
from miniature import build_game
from states import assert_same_state
from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.distillation.loop import StepLosses, distill, update_generator, update_student
from dfadc.networks.zoo.lenet import lenet5, lenet5_half

if TYPE_CHECKING:
    from dfadc.distillation.objectives import Game


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


def clone(game: Game) -> tuple[nn.Module, nn.Module, nn.Module]:
    return (
        copy.deepcopy(game.teacher).eval(),
        copy.deepcopy(game.players.student.module).train(),
        copy.deepcopy(game.players.generator.module).train(),
    )


def assert_close(module: nn.Module, expected: nn.Module) -> None:
    others = expected.state_dict()
    for name, value in module.state_dict().items():
        difference = (value - others[name]).abs().max().item()
        assert difference <= 1e-6 * max(1.0, others[name].abs().max().item()), name


@pytest.mark.parametrize("networks", ["batch norm", "lenet5"])
def test_recipe_dfad_is_the_papers_algorithm(networks: str) -> None:
    contract = ImageContract((1, 28, 28), 10) if networks == "lenet5" else ImageContract((1, 8, 8), 10)
    pair = {}
    if networks == "lenet5":
        torch.manual_seed(1)
        pair = {
            "teacher": lenet5(contract).eval().requires_grad_(requires_grad=False),
            "student": lenet5_half(contract),
        }
    game = build_game("dfad", "compute.channels_last=false", "batch_size=4", contract=contract, **pair)
    teacher, student, generator = clone(game)
    losses: list[StepLosses] = []
    distill(game, 2, losses.append)
    student_losses, generator_losses = play_the_paper(
        teacher, student, generator, steps=2, batch_size=4, latent_dim=game.recipe.generator.latent_dim
    )
    assert [float(each.student_loss) for each in losses] == pytest.approx(student_losses, abs=1e-6)
    assert [float(each.generator_loss) for each in losses] == pytest.approx(generator_losses, abs=1e-6)
    assert_close(game.players.student.module, student)
    assert_close(game.players.generator.module, generator)
    assert_close(game.teacher, teacher)


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_a_student_update_moves_the_student_alone(recipe: str) -> None:
    game = build_game(recipe)
    # From the second update on images are replayed too.
    update_student(game, game.draw_student_batch())
    teacher, student, generator = clone(game)
    update_student(game, game.draw_student_batch())
    assert_same_state(game.teacher.state_dict(), teacher.state_dict())
    for parameter, before in zip(game.players.generator.module.parameters(), generator.parameters(), strict=True):
        assert torch.equal(parameter, before)
        assert parameter.grad is None
    moved = [
        not torch.equal(parameter, before)
        for parameter, before in zip(game.players.student.parameters, student.parameters(), strict=True)
    ]
    assert all(moved)


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_a_generator_update_moves_the_generator_alone(recipe: str) -> None:
    """In eval mode not even the student's batch-norm statistics see the images."""
    game = build_game(recipe, "generator.student_mode=eval")
    distill(game, 1, lambda _: None)
    game.players.student.optimizer.zero_grad(set_to_none=True)
    teacher, student, generator = clone(game)
    update_generator(game)
    assert_same_state(game.teacher.state_dict(), teacher.state_dict())
    assert_same_state(game.players.student.module.state_dict(), student.state_dict())
    assert all(parameter.grad is None for parameter in game.players.student.module.parameters())
    assert any(
        not torch.equal(parameter, before)
        for parameter, before in zip(game.players.generator.parameters, generator.parameters(), strict=True)
    )


def test_in_train_mode_the_students_statistics_absorb_the_generators_images() -> None:
    """As in the paper's code: parameters stay, statistics do not."""
    game = build_game("dfad")
    assert game.recipe.generator.student_mode == "train"
    _, student, _ = clone(game)
    update_generator(game)
    for parameter, before in zip(game.players.student.parameters, student.parameters(), strict=True):
        assert torch.equal(parameter, before)
    now, was = game.players.student.module.state_dict(), student.state_dict()
    assert not torch.equal(now["features.1.running_mean"], was["features.1.running_mean"])


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_the_teacher_never_changes_nor_holds_a_gradient(recipe: str) -> None:
    game = build_game(recipe)
    teacher, _, _ = clone(game)
    distill(game, 2, lambda _: None)
    assert_same_state(game.teacher.state_dict(), teacher.state_dict())
    assert not game.teacher.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in game.teacher.parameters())


@pytest.mark.parametrize(("student_steps", "echoes", "generator_steps"), [(1, 0, 1), (3, 4, 2)])
def test_a_step_has_the_updates_that_the_recipe_says(student_steps: int, echoes: int, generator_steps: int) -> None:
    rules = (f"student.steps={student_steps}", f"replay.echoes={echoes}", f"generator.steps={generator_steps}")
    game = build_game("auto", *rules)
    distill(game, 3, lambda _: None)
    student_updates = student_steps + echoes
    for player, updates in ((game.players.student, student_updates), (game.players.generator, generator_steps)):
        assert player.ema is not None
        assert int(player.ema.n_averaged) == 3 * updates


def test_the_student_waits_for_its_start_while_the_ring_fills() -> None:
    game = build_game("auto", "steps=8", "replay.share=1", "student.start=0.3", "generator.latents=optimised")
    start = copy.deepcopy(game.players.student.module.state_dict())
    losses: list[StepLosses] = []
    distill(game, 3, losses.append)
    assert_same_state(game.players.student.module.state_dict(), start)
    assert all(each.student_loss.isnan() for each in losses)
    assert len(game.players.ring) == 3 * game.recipe.batch_size
    assert len(game.players.reservoir) == 16
    distill(game, 4, losses.append)
    assert losses[-1].student_loss.isfinite()
    assert not torch.equal(game.players.student.module.state_dict()["classifier.weight"], start["classifier.weight"])


def test_the_students_schedule_begins_where_it_does() -> None:
    game = build_game("auto", "steps=10", "replay.share=1", "student.start=0.5", "student.optimizer.learning_rate=0.2")
    rates: list[float] = []
    distill(game, 10, lambda _: rates.append(game.players.student.optimizer.param_groups[0]["lr"]))
    cosine = [0.1 * (1 + math.cos(math.pi * part)) for part in (0, 0, 0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8)]
    assert rates == pytest.approx(cosine, rel=1e-5)


def test_latents_shared_by_a_step_are_zskts() -> None:
    """ZSKT 1905.09768, algorithm 1: a generator update on new latents, then the student's updates on the same ones."""
    rules = ("generator.latents=shared", "student.steps=3", "generator.discrepancy=kl")
    game = build_game("dfad", *rules, "steps=100", "student.kl=1", "student.l1=0", "compute.channels_last=false")
    teacher, student, generator = clone(game)
    seen: list[Tensor] = []
    game.players.generator.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    distill(game, 3, lambda _: None)
    # The student's first turn has latents of its own; after that the generator's turn comes first, on new latents.
    turns = [seen[start : start + 4] for start in range(3, 11, 4)]
    for turn in turns:
        assert all(torch.equal(latents, turn[0]) for latents in turn)
    assert not torch.equal(turns[0][0], turns[1][0])
    assert not torch.equal(turns[0][0], seen[0])

    def kl(x: Tensor) -> Tensor:
        log_p, log_q = (network(x).log_softmax(dim=1) for network in (teacher, student))
        divergence: Tensor = (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
        return divergence

    # SGD where the paper has Adam, which would make a difference of 0.1 out of one of 1e-9 in a gradient near 0.
    student_optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, fused=True)
    for latents in [seen[0]] * 3:
        student_optimizer.zero_grad()
        torch.autograd.backward(kl(generator(latents).detach()))
        student_optimizer.step()
    for latents, *_ in [*turns, seen[-1:]]:
        generator_optimizer.zero_grad()
        torch.autograd.backward(-kl(generator(latents)))
        generator_optimizer.step()
        if latents is seen[-1]:
            break
        for _ in range(3):
            student_optimizer.zero_grad()
            torch.autograd.backward(kl(generator(latents).detach()))
            student_optimizer.step()
    assert_close(game.players.student.module, student)
    assert_close(game.players.generator.module, generator)


def test_on_step_is_told_of_every_step() -> None:
    game = build_game("auto")
    losses: list[StepLosses] = []
    distill(game, 3, losses.append)
    assert [each.step for each in losses] == [1, 2, 3]
    for each in losses:
        assert set(each.terms) == {"discrepancy", "batch_norm", "one_hot", "balance"}
        for value in (each.student_loss, each.generator_loss, *each.terms.values()):
            assert value.ndim == 0
            assert value.dtype == torch.float32
            assert not value.requires_grad
            assert value.isfinite()


def test_a_game_that_is_over_is_not_played_on() -> None:
    game = build_game("auto")
    distill(game, 2, lambda _: None)
    before = copy.deepcopy(game.players.state_dict())
    distill(game, 2, lambda _: None)
    assert_same_state(game.players.state_dict(), before)


def test_rates_are_set_before_each_step_from_the_share_of_the_whole_run() -> None:
    game = build_game("auto", "steps=4", "student.optimizer.learning_rate=0.2")
    rates: list[float] = []
    distill(game, 4, lambda _: rates.append(game.players.student.optimizer.param_groups[0]["lr"]))
    # The cosine at 0, 1/4, 1/2 and 3/4 of the run.
    assert rates == pytest.approx([0.2, 0.2 * 0.853553, 0.1, 0.2 * 0.146447], rel=1e-5)


def test_what_on_step_raises_stops_between_two_steps() -> None:
    class Stop(Exception):
        pass

    def stop_after_two(losses: StepLosses) -> None:
        if losses.step == 2:
            raise Stop

    game, whole = build_game("auto"), build_game("auto")
    with pytest.raises(Stop):
        distill(game, 4, stop_after_two)
    assert game.players.step == 2
    distill(game, 4, lambda _: None)
    distill(whole, 4, lambda _: None)
    assert_same_state(game.players.state_dict(), whole.players.state_dict())


def test_the_student_learns_to_agree() -> None:
    """Against a generator that stands still the student's loss falls: signs and wiring are right."""
    game = build_game("dfad", "generator.optimizer.learning_rate=1e-12", "student.steps=30", "batch_size=16")
    first = update_student(game, game.draw_student_batch())
    losses: list[Tensor] = []
    distill(game, 2, lambda each: losses.append(each.student_loss))
    assert float(losses[-1]) < 0.5 * float(first)


def test_the_generator_learns_to_disagree() -> None:
    """Against a student that stands still the discrepancy grows."""
    game = build_game("dfad", "student.optimizer.learning_rate=1e-12", "student.steps=1", "generator.steps=20")
    _, before = update_generator(game)
    terms: list[dict[str, Tensor]] = []
    distill(game, 2, lambda each: terms.append(each.terms))
    assert float(terms[-1]["discrepancy"]) > 1.2 * float(before["discrepancy"])


# -------------------------------------------------------------------------------------------------------- echoes


def test_an_echo_asks_neither_teacher_nor_generator() -> None:
    game = build_game("auto", "replay.echoes=3")
    update_student(game, game.draw_student_batch())
    asked: list[int] = []
    handles = [
        network.register_forward_pre_hook(lambda *_: asked.append(1))
        for network in (game.teacher, game.players.generator.module, game.players.generator.average)
    ]
    student = copy.deepcopy(game.players.student.module.state_dict())
    update_student(game, game.draw_echo_batch())
    for handle in handles:
        handle.remove()
    assert not asked
    assert any(
        not torch.equal(value, student[name]) for name, value in game.players.student.module.state_dict().items()
    )


def test_an_echo_is_what_was_shown_with_the_answers_to_it() -> None:
    """Mixed images included: the teacher answers an echo's images now as it is remembered to have answered them."""
    game = build_game("auto", "replay.echoes=3", "augmentation.mixup=1")
    distill(game, 3, lambda _: None)
    batch = game.draw_echo_batch()
    assert batch.replayed.shape == (8, 1, 8, 8)
    assert len(batch.latents) == 0
    torch.testing.assert_close(batch.answers, game.teacher(batch.replayed), rtol=1e-2, atol=1e-2)


def test_echoes_are_no_new_images() -> None:
    """Neither ring nor echo store nor reservoir takes what an echo repeats."""
    game = build_game("auto", "replay.echoes=3")
    distill(game, 2, lambda _: None)
    players, recipe = game.players, game.recipe
    new = 2 * recipe.student.steps * recipe.batch_size
    assert players.echo.seen == new
    before = players.ring.seen, players.reservoir.seen
    update_student(game, game.draw_echo_batch())
    assert (players.ring.seen, players.reservoir.seen, players.echo.seen) == (*before, new)


def test_without_echoes_nothing_is_kept_for_them() -> None:
    assert len(build_game("auto", "replay.echoes=0").players.echo.images) == 0
    assert len(build_game("dfad").players.echo.images) == 0


def test_a_run_with_echoes_resumes_bit_by_bit() -> None:
    rules = ("replay.echoes=2", "augmentation.mixup=0.5")
    whole, first = build_game("auto", *rules), build_game("auto", *rules)
    distill(whole, 6, lambda _: None)
    distill(first, 3, lambda _: None)
    rest = build_game("auto", *rules)
    rest.players.load_state_dict(copy.deepcopy(first.players.state_dict()))
    distill(rest, 6, lambda _: None)
    assert_same_state(rest.players.state_dict(), whole.players.state_dict())
