"""What begins and ends a turn of the generator: latents, resets, a meta-generator, and the state to go on from."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from miniature import build_game
from states import assert_same_state
from torch import Tensor

from dfadc.distillation.loop import distill, update_generator

if TYPE_CHECKING:
    from dfadc.distillation.objectives import Game

#: Latents that move belong to one batch, so the student lives from the ring.
RING_ALONE = ("replay.share=1", "student.start=0.2", "student.steps=2", "generator.steps=3")


def play(game: Game, steps: int = 1) -> None:
    distill(game, game.players.step + steps, lambda _: None)


def weights(game: Game) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in game.players.generator.module.parameters()])


def begin_turn(game: Game, step: int) -> None:
    game.players.generator.begin_turn(step, game.players.rng)


def test_by_default_a_turn_changes_nothing() -> None:
    game = build_game("dfad")
    play(game)
    before = copy.deepcopy(game.players.state_dict())
    game.begin_turn()
    game.end_turn()
    assert_same_state(game.players.state_dict(), before)


def test_a_generator_begins_anew_every_n_steps() -> None:
    game = build_game("auto", "generator.reset_every=3")
    play(game)
    player = game.players.generator
    for step, resets in ((0, False), (1, False), (2, False), (3, True), (4, False), (6, True)):
        before = weights(game)
        begin_turn(game, step)
        assert torch.equal(weights(game), before) is not resets
    # Nothing of before is left: no momentum, no average.
    assert player.optimizer.state == {}
    assert player.ema is not None
    assert int(player.ema.n_averaged) == 0
    assert_same_state(player.average.state_dict(), player.module.state_dict())


def test_each_reset_gives_other_weights_and_the_same_in_another_run() -> None:
    found = []
    for _ in range(2):
        game = build_game("auto", "generator.reset_every=1")
        torch.rand(3)
        begin_turn(game, 1)
        first = weights(game)
        begin_turn(game, 2)
        found.append((first, weights(game)))
    assert not torch.equal(*found[0])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_reset_leaves_torchs_dice_alone() -> None:
    game = build_game("auto")
    before = torch.get_rng_state()
    game.players.generator.reset(game.players.rng)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("source", ["optimised", "noisy"])
def test_latents_move_with_the_generator_at_their_own_rate(source: str) -> None:
    game = build_game("auto", *RING_ALONE, f"generator.latents={source}", "generator.latent_rate=2.5")
    player = game.players.generator
    player.set_learning_rate(0.0)
    assert [group["lr"] for group in player.optimizer.param_groups] == pytest.approx([0.004, 0.01])
    before = [parameter.detach().clone() for parameter in player.latents.parameters()]
    update_generator(game)
    assert all(not torch.equal(now, was) for now, was in zip(player.latents.parameters(), before, strict=True))


def test_moving_latents_begin_each_turn_without_momentum() -> None:
    game = build_game("auto", *RING_ALONE, "generator.latents=optimised")
    play(game)
    assert game.players.generator.optimizer.state
    game.begin_turn()
    assert game.players.generator.optimizer.state == {}
    persistent = build_game("auto")
    play(persistent)
    persistent.begin_turn()
    assert persistent.players.generator.optimizer.state


@pytest.mark.parametrize("kind", ["fomaml", "reptile"])
def test_a_meta_generator_is_what_the_next_turn_begins_from(kind: str) -> None:
    game = build_game("auto", *RING_ALONE, "generator.latents=optimised", f"generator.meta={kind}")
    start = weights(game)
    play(game)
    fast = weights(game)
    game.begin_turn()
    begun = weights(game)
    assert not torch.equal(fast, begun)
    # The meta-weights moved once, by less than a turn's updates and in their sense.
    assert not torch.equal(begun, start)
    assert float(torch.dot(begun - start, fast - start)) > 0


@pytest.mark.parametrize(
    "rules",
    [
        ("generator.latents=shared",),
        ("generator.latents=optimised", *RING_ALONE),
        ("generator.latents=noisy", "generator.reset_every=2", *RING_ALONE),
        ("generator.latents=optimised", "generator.meta=fomaml", *RING_ALONE),
        ("generator.latents=noisy", "generator.meta=reptile", *RING_ALONE),
        ("generator.architecture=free_pixels", "generator.latent_dim=0", "generator.latents=optimised", *RING_ALONE),
    ],
    ids=["shared", "optimised", "noisy", "fomaml", "reptile", "pixels"],
)
def test_every_policy_goes_on_bit_by_bit(rules: tuple[str, ...]) -> None:
    whole, again = build_game("auto", *rules), build_game("auto", *rules)
    play(whole, 3)
    state = copy.deepcopy(whole.players.state_dict())
    play(whole, 3)
    torch.rand(5)
    again.players.load_state_dict(state)
    play(again, 3)
    assert_same_state(again.players.state_dict(), whole.players.state_dict())


def test_free_pixels_are_the_latents() -> None:
    rules = ("generator.architecture=free_pixels", "generator.latent_dim=0", "generator.latents=optimised")
    game = build_game("auto", *RING_ALONE, *rules)
    player = game.players.generator
    assert list(player.module.parameters()) == []
    assert [tuple(parameter.shape) for parameter in player.parameters] == [(8, 64)]
    before = game.players.draw_latents(8).clone()
    update_generator(game)
    after = game.players.draw_latents(8)
    assert not torch.equal(after, before)
    images = player.module(after)
    low, high = (torch.tensor(bound).view(1, -1, 1, 1) for bound in game.contract.value_range())
    torch.testing.assert_close(images, low + (high - low) * torch.sigmoid(after.view(8, 1, 8, 8)))
