"""A batch that is not finite leaves no trace: neither where its update is skipped, nor after going back."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniature import SmallNetwork, build_game
from states import assert_same_state
from torch import Tensor, nn

from dfadc.distillation.forward_state import ForwardState
from dfadc.distillation.loop import distill, update_generator, update_student
from dfadc.distillation.monitor import MAX_SKIPPED, Monitor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfadc.distillation.objectives import Game

#: Every memory that a forward pass writes to.
REMEMBERING = (
    "steps=100",
    "student.ema_decay=0.9",
    "student.quantise_from=0",
    "generator.ema_decay=0.9",
    "generator.student_mode=train",
    "prior.batch_norm=1",
    "prior.batch_norm_momentum=0.9",
    "prior.balance=1",
    "prior.balance_momentum=0.9",
)
#: Finite, but not its square, which a variance is made of.
HUGE = 1e30


def remembered(game: Game) -> dict[str, Any]:
    """What a checkpoint holds and a skipped update must leave alone."""
    state = copy.deepcopy(game.players.state_dict())
    both = {name: {k: v for k, v in state[name].items() if k != "skipped"} for name in ("student", "generator")}
    return {**both, "carried": {name: part for name, part in state["carried"].items() if name != "monitor"}}


def assert_finite(value: Any, path: str = "") -> None:
    if isinstance(value, Tensor):
        assert bool(value.isfinite().all()), path
    elif isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in pairs:
            assert_finite(part, f"{path}.{key}")


def play(game: Game, steps: int = 1) -> None:
    distill(game, game.players.step + steps, lambda _: None)


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, HUGE])
def test_a_student_update_on_a_bad_batch_leaves_no_trace(bad: float, micro_batch: int) -> None:
    game = build_game("auto", *REMEMBERING, f"compute.micro_batch={micro_batch}")
    play(game, 3)
    batch = game.draw_student_batch()
    assert len(batch.procedural)
    batch.procedural[0] = bad
    before = remembered(game)
    update_student(game, batch)
    assert float(game.players.student.skipped) == 1
    assert_same_state(remembered(game), before)
    assert_finite(game.players.state_dict())
    # The next one moves.
    update_student(game, game.draw_student_batch())
    assert float(game.players.student.skipped) == 0
    after = remembered(game)
    for part in ("module", "ema"):
        assert not torch.equal(
            *(
                state["student"][part]["module." * (part == "ema") + "features.1.running_mean"]
                for state in (before, after)
            )
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_generator_update_on_bad_latents_leaves_no_trace(bad: float) -> None:
    game = build_game("auto", *REMEMBERING)
    play(game, 3)
    draw = game.draw_generator_batch

    def draw_bad() -> Any:
        batch = draw()
        assert batch.latents is not None
        return batch._replace(latents=batch.latents.index_fill(0, torch.tensor([0]), bad))

    before = remembered(game)
    game.draw_generator_batch = draw_bad  # type: ignore[method-assign]
    game.begin_turn()
    update_generator(game)
    game.end_turn()
    assert float(game.players.generator.skipped) == 1
    assert_same_state(remembered(game), before)
    game.draw_generator_batch = draw  # type: ignore[method-assign]
    play(game)
    assert float(game.players.generator.skipped) == 0
    assert_finite(game.players.state_dict())


def test_a_first_update_that_is_skipped_is_not_the_first_of_an_average() -> None:
    game = build_game("auto", *REMEMBERING)
    batch = game.draw_student_batch()
    batch.procedural[0] = math.nan
    start = copy.deepcopy(game.players.student.module.state_dict())
    update_student(game, batch)
    assert_same_state(game.players.student.average.state_dict(), start)
    assert game.players.student.ema is not None
    assert int(game.players.student.ema.n_averaged) == 0


def test_going_back_restores_all_that_a_checkpoint_holds() -> None:
    game = build_game("auto", *REMEMBERING, "replay.share=0.5", "student.steps=2")
    monitor = Monitor(game)

    def everything() -> dict[str, Any]:
        state = copy.deepcopy(game.players.state_dict())
        rngs = ("rng", "latent_rng", "sample_rng", "global_rng", "cuda_rng")
        state["carried"].pop("monitor")
        for name in ("student", "generator"):
            state[name].pop("rate_scale")
        return {name: part for name, part in state.items() if name not in (*rngs, "step")}

    for steps in (1, 20):  # a ring that is being filled, and one that is full
        play(game, steps)
        assert monitor.check_finite() is None
        healthy = everything()
        play(game, 2)
        game.players.set_aside = torch.cat([game.players.set_aside, torch.zeros(2, 1, 8, 8, dtype=torch.float16)])
        with torch.no_grad():
            next(iter(game.players.student.parameters)).fill_(math.nan)
        play(game, MAX_SKIPPED)
        assert monitor.check_finite() is not None
        assert_same_state(everything(), healthy)
        assert_finite(game.players.state_dict())


class Masked(SmallNetwork):
    """Keeps infinities in a buffer, as a causal mask does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.get_buffer("mask").softmax(dim=0)[0]


def test_infinities_that_were_there_from_the_start_are_no_trouble() -> None:
    game = build_game("auto", "student.ema_decay=0.9", student=Masked())
    monitor = Monitor(game)
    play(game, 3)
    assert float(game.players.student.skipped) == 0
    assert monitor.check_finite() is None
    assert bool(game.players.student.average(torch.zeros(2, 1, 8, 8)).isfinite().all())


def tensors() -> Iterator[Tensor]:
    yield torch.tensor([1.0, math.inf])
    yield torch.tensor(3)
    yield torch.ones(2, 2)


def test_values_are_put_back_only_where_the_update_was_skipped() -> None:
    for skipped in (0.0, 1.0):
        kept, moved = list(tensors()), list(tensors())
        state = ForwardState(moved)
        state.keep()
        spoiled = state.is_spoiled()
        assert spoiled is not None
        assert not spoiled
        for tensor in moved:
            tensor.mul_(2)
        moved[2][0, 0] = math.nan
        spoiled = state.is_spoiled()
        assert spoiled is not None
        assert spoiled
        state.undo(torch.tensor(skipped))
        assert all(torch.equal(one, other) for one, other in zip(kept, moved, strict=True)) == bool(skipped)
    assert ForwardState(nn.Linear(2, 2).buffers()).is_spoiled() is None
