"""Generators trained after the game: whom they look at, whom they leave alone, and how long they take."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniature import SmallNetwork, build_game
from torch import Tensor

from dfadc.distillation.images.procedural import draw_procedural
from dfadc.distillation.losses import priors
from dfadc.distillation.losses.discrepancy import l1
from dfadc.recipe.load import change_recipe, load_recipe, recipe_names
from dfadc.sampling import generators
from dfadc.sampling.generators import (
    draw,
    draw_prior,
    draw_procedural_classes,
    examiner_steps,
    train_adversary,
    train_prior,
)

if TYPE_CHECKING:
    from dfadc.distillation.objectives import Game
    from dfadc.distillation.state import Players

LONG = ("steps=1000", "verify.prior_steps=100", "verify.adversary_steps=100")


def build_imitation() -> Game:
    """A game whose student is its teacher, a little damaged."""
    game = build_game("auto", *LONG, student=SmallNetwork(width=6))
    student = game.players.student.average
    student.load_state_dict(game.teacher.state_dict())
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=dice), alpha=0.2 * float(parameter.std()))
    return game


def images_of(players: Players, count: int = 64) -> Tensor:
    return torch.cat(list(draw(players, count)))


def disagreement(game: Game, players: Players) -> float:
    """Mean |student - teacher| logit over what a generator draws."""
    images = images_of(players)
    with torch.no_grad():
        return float(l1(game.players.student.average.eval()(images), game.teacher(images)))


def test_they_are_trained_by_rules_of_their_own_whatever_the_recipe() -> None:
    """No pool, no warm-up, no free pixels, no moving latents: a generator that draws from any latent."""
    for name in recipe_names():
        latents = ("generator.latent_dim=0",) if load_recipe(name).generator.latent_dim == 0 else ()
        game = build_game(name, "steps=20", "generator.steps=2", "student.steps=1", *latents)
        for players in (train_prior(game), train_adversary(game)):
            images = images_of(players, 12)
            assert images.shape == (12, 1, 8, 8)
            assert len({round(float(image.sum()), 4) for image in images}) > 6, name
        game.close()


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_nobody_in_the_game_moves(recipe: str) -> None:
    game = build_game(recipe, *LONG)
    before = copy.deepcopy(game.players.state_dict())
    teacher = copy.deepcopy(game.teacher.state_dict())
    train_prior(game)
    train_adversary(game)
    after = game.players.state_dict()
    for player in ("student", "generator"):
        for name, value in after[player]["module"].items():
            assert torch.equal(value, before[player]["module"][name]), f"{player}: {name}"
    assert torch.equal(after["latent_rng"], before["latent_rng"])
    assert torch.equal(after["global_rng"], before["global_rng"])
    for name, value in game.teacher.state_dict().items():
        assert torch.equal(value, teacher[name]), name
    hooks = 1 if game.priors.matching is not None else 0
    assert [len(layer._forward_pre_hooks) for layer in game.batch_norms] == [hooks, hooks]  # noqa: SLF001


def test_neither_student_nor_seed_moves_the_prior_generator() -> None:
    drawn = []
    for seed, width in ((0, 4), (1, 8)):
        game = build_game("auto", *LONG, f"seed={seed}", student=SmallNetwork(width=width))
        drawn.append(images_of(train_prior(game)))
    assert torch.equal(*drawn)


def test_the_length_of_a_run_moves_the_prior_generator_until_it_has_all_its_updates() -> None:
    lengths = {"steps=6": 2, "steps=9": 3, "steps=60": 5, "steps=90": 5}
    drawn = {}
    for steps, updates in lengths.items():
        game = build_game("auto", steps, "verify.prior_steps=5")
        assert examiner_steps(game.recipe)[0] == updates
        drawn[steps] = images_of(train_prior(game))
    assert torch.equal(drawn["steps=60"], drawn["steps=90"])
    assert not torch.equal(drawn["steps=6"], drawn["steps=9"])


def test_the_prior_generator_draws_what_the_priors_ask_for() -> None:
    game = build_game("auto", *LONG)

    def cost(players: Players) -> float:
        assert game.priors.matching is not None
        with torch.no_grad():
            game.priors.matching.watching = True
            logits = game.teacher(images_of(players))
            game.priors.matching.watching = False
            return float(game.priors.matching.take() + priors.one_hot(logits) + 5 * priors.class_balance(logits))

    assert cost(train_prior(game)) < cost(game.players) - 1


def test_the_adversary_finds_more_disagreement_than_the_prior_generator() -> None:
    game = build_imitation()
    assert disagreement(game, train_adversary(game)) > 1.2 * disagreement(game, train_prior(game))


def test_the_most_harmful_of_the_restarts_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    game = build_imitation()
    game.recipe = change_recipe(game.recipe, {"verify.adversary_restarts": 3})

    def agreement(players: Players) -> float:
        images = images_of(players, 512)
        with torch.no_grad():
            answers = [network.eval()(images).argmax(dim=1) for network in (game.teacher, game.players.student.average)]
        return float((answers[0] == answers[1]).float().mean())

    trained: list[Players] = []

    def remember(*args: Any, **settings: Any) -> Players:
        trained.append(train(*args, **settings))
        return trained[-1]

    train = generators._train  # noqa: SLF001
    monkeypatch.setattr(generators, "_train", remember)
    kept = train_adversary(game)
    found = [agreement(players) for players in trained]
    assert len({round(value, 2) for value in found}) == 3
    assert kept is trained[found.index(min(found))]


def test_they_take_no_more_than_their_shares_of_the_generators_updates() -> None:
    wanted = ("verify.prior_steps=600", "verify.adversary_steps=70")
    assert examiner_steps(load_recipe("auto", ["steps=5000", *wanted])) == (600, 70)
    assert examiner_steps(load_recipe("auto", ["steps=600", *wanted])) == (200, 60)
    assert examiner_steps(load_recipe("auto", ["steps=2", *wanted])) == (1, 1)
    assert examiner_steps(load_recipe("auto", ["steps=60", "generator.steps=10", *wanted])) == (200, 60)
    assert examiner_steps(load_recipe("auto", ["steps=5000", "verify.adversary_steps=0"])) == (600, 0)


def test_any_number_of_images_can_be_drawn() -> None:
    players = build_game("auto").players
    assert [len(batch) for batch in draw(players, 20, 8)] == [8, 8, 4]
    assert [tuple(batch.shape) for batch in draw(players, 0)] == [(0, 1, 8, 8)]


def test_procedural_samples_spread_over_the_classes_that_the_teacher_sees() -> None:
    game = build_game("auto")
    drawn = draw_procedural_classes(game, 40)
    assert torch.equal(drawn, draw_procedural_classes(build_game("auto", "seed=3"), 40))
    any_of_them = draw_procedural(40, game.contract, torch.Generator().manual_seed(11))
    most, most_of_any = (int(game.teacher(images).argmax(dim=1).bincount().max()) for images in (drawn, any_of_them))
    assert drawn.shape == (40, 1, 8, 8)
    assert most < most_of_any


@pytest.mark.parametrize(("share", "num_generated"), [(0.25, 30), (0.0, 40), (1.0, 0)])
def test_a_share_of_the_sharpened_samples_begins_as_procedural_images(
    monkeypatch: pytest.MonkeyPatch, share: float, num_generated: int
) -> None:
    game = build_game("auto", *LONG, f"verify.procedural_share={share}")
    monkeypatch.setattr(generators, "sharpen", lambda images, *_, **__: images)
    images = torch.cat(list(draw_prior(game, train_prior(game), 40)))
    assert len(images) == 40
    torch.testing.assert_close(images[:num_generated], images_of(train_prior(game), num_generated))
    torch.testing.assert_close(images[num_generated:], draw_procedural_classes(game, 40 - num_generated))


def test_what_is_not_sharpened_is_the_generators() -> None:
    game = build_game("auto", *LONG, "verify.sharpen_steps=0")
    images = torch.cat(list(draw_prior(game, train_prior(game), 40)))
    torch.testing.assert_close(images, images_of(train_prior(game), 40))
