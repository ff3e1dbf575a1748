"""Verification generators: trained after the run, independent of it where they must be, and bounded in length."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from miniature import SmallNetwork, build_run
from torch import Tensor

from dfadc.distillation.images.balanced import draw_balanced
from dfadc.distillation.losses import priors
from dfadc.distillation.losses.discrepancy import l1
from dfadc.recipe.load import load_recipe, recipe_names
from dfadc.sampling import generators, lengths
from dfadc.sampling.generators import (
    PRIOR_SEED,
    draw,
    draw_prior,
    train_adversary,
    train_prior,
)
from dfadc.sampling.lengths import verification_steps

if TYPE_CHECKING:
    from dfadc.distillation.distillation import Distillation
    from dfadc.distillation.state import TrainingState

#: Updates of each verification generator.
UPDATES = 100
LONG = ("steps=1000",)


def build_imitation() -> Distillation:
    """A run whose student is its teacher, a little damaged."""
    run = build_run("auto", *LONG, student=SmallNetwork(width=6))
    student = run.state.student.average
    student.load_state_dict(run.teacher.module.state_dict())
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=dice), alpha=0.2 * float(parameter.std()))
    return run


def images_of(state: TrainingState, count: int = 64) -> Tensor:
    return torch.cat(list(draw(state, count)))


def disagreement(run: Distillation, state: TrainingState) -> float:
    """Mean |student - teacher| logit over what a generator draws."""
    images = images_of(state)
    with torch.no_grad():
        return float(l1(run.state.student.average.eval()(images), run.teacher.module(images)))


def test_they_are_trained_by_rules_of_their_own_whatever_the_recipe() -> None:
    """No replay, no warm-up, no noisy layers: a generator that draws from any latent."""
    for name in recipe_names():
        run = build_run(name, "steps=20", "generator.steps=2", "student.steps=1")
        for state in (train_prior(run), train_adversary(run)):
            images = images_of(state, 12)
            assert images.shape == (12, 1, 8, 8)
            assert len({round(float(image.sum()), 4) for image in images}) > 6, name
        run.__exit__()


@pytest.mark.parametrize("recipe", ["auto", "dfad"])
def test_the_run_stays_as_it_is(recipe: str) -> None:
    run = build_run(recipe, *LONG)
    before = copy.deepcopy(run.state.state_dict())
    teacher = copy.deepcopy(run.teacher.module.state_dict())
    train_prior(run, UPDATES)
    train_adversary(run, UPDATES)
    after = run.state.state_dict()
    for player in ("student", "generator"):
        for name, value in after[player]["module"].items():
            assert torch.equal(value, before[player]["module"][name]), f"{player}: {name}"
    assert torch.equal(after["latent_rng"], before["latent_rng"])
    assert torch.equal(after["global_rng"], before["global_rng"])
    for name, value in run.teacher.module.state_dict().items():
        assert torch.equal(value, teacher[name]), name
    hooks = 1 if run.generator.matching is not None else 0
    assert [len(layer._forward_pre_hooks) for layer in run.batch_norms] == [hooks, hooks]  # noqa: SLF001


def test_neither_student_nor_seed_moves_the_prior_generator() -> None:
    drawn = []
    for seed, width in ((0, 4), (1, 8)):
        run = build_run("auto", *LONG, f"seed={seed}", student=SmallNetwork(width=width))
        drawn.append(images_of(train_prior(run, UPDATES)))
    assert torch.equal(*drawn)


def test_the_length_of_a_run_moves_the_prior_generator_until_it_has_all_its_updates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lengths, "PRIOR_STEPS", 5)
    updates = {"steps=6": 2, "steps=9": 3, "steps=60": 5, "steps=90": 5}
    drawn = {}
    for steps, number in updates.items():
        run = build_run("auto", steps)
        assert verification_steps(run.recipe)[0] == number
        drawn[steps] = images_of(train_prior(run))
    assert torch.equal(drawn["steps=60"], drawn["steps=90"])
    assert not torch.equal(drawn["steps=6"], drawn["steps=9"])


def test_the_prior_generator_draws_what_the_priors_ask_for() -> None:
    run = build_run("auto", *LONG)

    def cost(state: TrainingState) -> float:
        assert run.generator.matching is not None
        with torch.no_grad(), run.generator.matching.recording() as distances:
            logits = run.teacher.logits(images_of(state))
            return float(torch.stack(distances).sum() + priors.one_hot(logits) + 5 * priors.class_balance(logits))

    assert cost(train_prior(run, UPDATES)) < cost(run.state) - 1


def test_the_adversary_finds_more_disagreement_than_the_prior_generator() -> None:
    run = build_imitation()
    assert disagreement(run, train_adversary(run, UPDATES)) > 1.2 * disagreement(run, train_prior(run, UPDATES))


def test_the_most_harmful_of_the_restarts_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_imitation()

    def agreement(state: TrainingState) -> float:
        images = images_of(state, 512)
        with torch.no_grad():
            answers = [
                network.eval()(images).argmax(dim=1) for network in (run.teacher.module, run.state.student.average)
            ]
        return float((answers[0] == answers[1]).float().mean())

    trained: list[TrainingState] = []

    def remember(*args: Any, **settings: Any) -> TrainingState:
        trained.append(train(*args, **settings))
        return trained[-1]

    train = generators._train  # noqa: SLF001
    monkeypatch.setattr(generators, "_train", remember)
    kept = train_adversary(run, UPDATES, restarts=3)
    found = [agreement(state) for state in trained]
    assert len({round(value, 2) for value in found}) == 3
    assert kept is trained[found.index(min(found))]


def test_they_take_no_more_than_their_shares_of_the_generators_updates() -> None:
    assert verification_steps(load_recipe("auto", ["steps=5000"])) == (600, 150)
    assert verification_steps(load_recipe("auto", ["steps=600"])) == (200, 60)
    assert verification_steps(load_recipe("auto", ["steps=2"])) == (1, 1)
    assert verification_steps(load_recipe("auto", ["steps=60", "generator.steps=10"])) == (200, 60)


def test_any_number_of_images_can_be_drawn() -> None:
    state = build_run("auto").state
    assert [len(batch) for batch in draw(state, 20, 8)] == [8, 8, 4]
    assert [tuple(batch.shape) for batch in draw(state, 0)] == [(0, 1, 8, 8)]


@pytest.mark.parametrize(("share", "num_generated"), [(0.25, 30), (0.0, 40), (1.0, 0)])
def test_a_share_of_the_refined_samples_begins_as_procedural_images(
    monkeypatch: pytest.MonkeyPatch, share: float, num_generated: int
) -> None:
    run = build_run("auto", *LONG)
    monkeypatch.setattr(generators, "refine", lambda images, *_, **__: images)
    images = torch.cat(list(draw_prior(run, train_prior(run, UPDATES), 40, procedural_share=share)))
    assert len(images) == 40
    torch.testing.assert_close(images[:num_generated], images_of(train_prior(run, UPDATES), num_generated))
    expected = draw_balanced(40 - num_generated, run.teacher, torch.Generator().manual_seed(PRIOR_SEED))
    torch.testing.assert_close(images[num_generated:], expected)


def test_what_is_not_refined_is_the_generators() -> None:
    run = build_run("auto", *LONG)
    images = torch.cat(list(draw_prior(run, train_prior(run, UPDATES), 40, steps=0)))
    torch.testing.assert_close(images, images_of(train_prior(run, UPDATES), 40))
