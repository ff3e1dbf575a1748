"""A batch that is not finite leaves no trace: neither where its update is skipped, nor after going back."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniature import SmallNetwork, build_run
from states import assert_same_state
from torch import Tensor, nn

from dfadc.distillation.forward_state import ForwardState
from dfadc.distillation.loop import distill, update_generator, update_student
from dfadc.distillation.monitor import MAX_SKIPPED, Monitor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfadc.distillation.distillation import Distillation

#: Every memory that a forward pass writes to.
REMEMBERING = (
    "steps=100",
    "student.ema_decay=0.9",
    "generator.ema_decay=0.9",
    "generator.student_mode=train",
    "prior.batch_norm=1",
    "prior.batch_norm_momentum=0.9",
    "prior.balance=1",
)
#: Finite, but not its square, which a variance is made of.
HUGE = 1e30


def remembered(run: Distillation) -> dict[str, Any]:
    """What a checkpoint holds and a skipped update must leave alone."""
    state = copy.deepcopy(run.state.state_dict())
    both = {name: {k: v for k, v in state[name].items() if k != "skipped"} for name in ("student", "generator")}
    return {**both, "registered": {name: part for name, part in state["registered"].items() if name != "monitor"}}


def assert_finite(value: Any, path: str = "") -> None:
    if isinstance(value, Tensor):
        assert bool(value.isfinite().all()), path
    elif isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in pairs:
            assert_finite(part, f"{path}.{key}")


def play(run: Distillation, steps: int = 1) -> None:
    distill(run, run.state.step + steps, lambda _: None)


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, HUGE])
def test_a_student_update_on_a_bad_batch_leaves_no_trace(bad: float, micro_batch: int) -> None:
    run = build_run("auto", *REMEMBERING, f"compute.micro_batch={micro_batch}")
    play(run, 3)
    batch = run.student.draw_batch()
    assert len(batch.procedural)
    batch.procedural[0] = bad
    before = remembered(run)
    update_student(run, batch)
    assert float(run.state.student.skipped) == 1
    assert_same_state(remembered(run), before)
    assert_finite(run.state.state_dict())
    # The next one moves.
    update_student(run, run.student.draw_batch())
    assert float(run.state.student.skipped) == 0
    after = remembered(run)
    for part in ("module", "ema"):
        assert not torch.equal(
            *(
                state["student"][part]["module." * (part == "ema") + "features.1.running_mean"]
                for state in (before, after)
            )
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_generator_update_on_bad_latents_leaves_no_trace(bad: float) -> None:
    run = build_run("auto", *REMEMBERING)
    play(run, 3)
    draw = run.generator.draw_batch

    def draw_bad() -> Any:
        batch = draw()
        assert batch.latents is not None
        return batch._replace(latents=batch.latents.index_fill(0, torch.tensor([0]), bad))

    before = remembered(run)
    run.generator.draw_batch = draw_bad  # type: ignore[method-assign]
    run.generator.begin_updates()
    update_generator(run)
    run.generator.end_updates()
    assert float(run.state.generator.skipped) == 1
    assert_same_state(remembered(run), before)
    run.generator.draw_batch = draw  # type: ignore[method-assign]
    play(run)
    assert float(run.state.generator.skipped) == 0
    assert_finite(run.state.state_dict())


def test_a_first_update_that_is_skipped_is_not_the_first_of_an_average() -> None:
    run = build_run("auto", *REMEMBERING)
    batch = run.student.draw_batch()
    batch.procedural[0] = math.nan
    start = copy.deepcopy(run.state.student.module.state_dict())
    update_student(run, batch)
    assert_same_state(run.state.student.average.state_dict(), start)
    assert run.state.student.ema is not None
    assert int(run.state.student.ema.n_averaged) == 0


def test_going_back_restores_all_that_a_checkpoint_holds() -> None:
    run = build_run("auto", *REMEMBERING, "replay.share=0.5", "student.steps=2")
    monitor = Monitor(run)

    def everything() -> dict[str, Any]:
        state = copy.deepcopy(run.state.state_dict())
        rngs = ("rng", "latent_rng", "sample_rng", "global_rng", "cuda_rng")
        state["registered"].pop("monitor")
        for name in ("student", "generator"):
            state[name].pop("rate_scale")
        return {name: part for name, part in state.items() if name not in (*rngs, "step")}

    for steps in (1, 20):  # a replay buffer that is being filled, and one that is full
        play(run, steps)
        assert monitor.check_finite() is None
        healthy = everything()
        play(run, 2)
        run.state.snapshots = torch.cat([run.state.snapshots, torch.zeros(2, 1, 8, 8, dtype=torch.float16)])
        with torch.no_grad():
            next(iter(run.state.student.parameters)).fill_(math.nan)
        play(run, MAX_SKIPPED)
        assert monitor.check_finite() is not None
        assert_same_state(everything(), healthy)
        assert_finite(run.state.state_dict())


class Masked(SmallNetwork):
    """Keeps infinities in a buffer, as a causal mask does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.get_buffer("mask").softmax(dim=0)[0]


def test_infinities_that_were_there_from_the_start_are_no_trouble() -> None:
    run = build_run("auto", "student.ema_decay=0.9", student=Masked())
    monitor = Monitor(run)
    play(run, 3)
    assert float(run.state.student.skipped) == 0
    assert monitor.check_finite() is None
    assert bool(run.state.student.average(torch.zeros(2, 1, 8, 8)).isfinite().all())


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
