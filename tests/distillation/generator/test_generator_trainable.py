"""The generator with its latents: renewal before a step's updates, its rate, and a reset after a collapse."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from miniature import build_run
from states import assert_same_state
from torch import Tensor

from dfadc.distillation.loop import distill, update_generator

if TYPE_CHECKING:
    from dfadc.distillation.distillation import Distillation

#: Latents that are trained belong to one batch, so the student is trained on replayed images alone.
NOISY = (
    *("replay.share=1", "replay.procedural_share=0", "replay.repeats=0", "generator.latents=noisy"),
    *("student.start=0.2", "student.steps=2", "generator.steps=3"),
)


def train(run: Distillation, steps: int = 1) -> None:
    distill(run, run.state.step + steps, lambda _: None)


def weights(run: Distillation) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.state.generator.module.parameters()])


def test_by_default_the_frame_of_the_updates_changes_nothing() -> None:
    run = build_run("dfad")
    train(run)
    before = copy.deepcopy(run.state.state_dict())
    run.generator.begin_updates()
    run.generator.end_updates()
    assert_same_state(run.state.state_dict(), before)


def test_a_reset_leaves_nothing_of_before() -> None:
    run = build_run("auto")
    train(run)
    generator, before = run.state.generator, weights(run)
    generator.reset(run.state.rng)
    assert not torch.equal(weights(run), before)
    assert generator.optimizer.state == {}
    assert generator.ema is not None
    assert int(generator.ema.n_averaged) == 0
    assert_same_state(generator.average.state_dict(), generator.module.state_dict())


def test_each_reset_gives_other_weights_and_the_same_in_another_run() -> None:
    found = []
    for _ in range(2):
        run = build_run("auto")
        torch.rand(3)
        run.state.generator.reset(run.state.rng)
        first = weights(run)
        run.state.generator.reset(run.state.rng)
        found.append((first, weights(run)))
    assert not torch.equal(*found[0])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_reset_leaves_torchs_stream_alone() -> None:
    run = build_run("auto")
    before = torch.get_rng_state()
    run.state.generator.reset(run.state.rng)
    assert torch.equal(torch.get_rng_state(), before)


def test_noisy_layers_are_trained_with_the_generator() -> None:
    run = build_run("auto", *NOISY)
    before = [parameter.detach().clone() for parameter in run.state.generator.latents.parameters()]
    update_generator(run)
    after = run.state.generator.latents.parameters()
    assert all(not torch.equal(now, was) for now, was in zip(after, before, strict=True))


def test_latents_that_are_trained_begin_each_step_without_momentum() -> None:
    run = build_run("auto", *NOISY)
    train(run)
    assert run.state.generator.optimizer.state
    run.generator.begin_updates()
    assert run.state.generator.optimizer.state == {}
    persistent = build_run("auto")
    train(persistent)
    persistent.generator.begin_updates()
    assert persistent.state.generator.optimizer.state


@pytest.mark.parametrize(("schedule", "rates"), [("as_student", [1.0, 0.5]), ("constant", [1.0, 1.0])])
def test_the_generators_rate_is_constant_or_the_students_without_its_warm_up(schedule: str, rates: list[float]) -> None:
    rules = (f"generator.schedule={schedule}", "generator.optimizer.learning_rate=1", "student.schedule.warmup=0.9")
    run = build_run("auto", "steps=10", *rules)
    found = []
    for step in (0, 5):
        run.state.step = step
        run.state.set_learning_rates()
        found.append(run.state.generator.optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(rates)
