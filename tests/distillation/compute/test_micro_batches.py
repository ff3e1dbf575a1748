"""Micro-batches: no image is lost, and gradients that add up are those of the whole batch where the maths says so."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import SMALL_CONTRACT, build_run
from states import assert_same_state
from torch import Tensor, nn

from dfadc.distillation.compute.micro_batches import split_generator_batch, split_student_batch
from dfadc.distillation.images.batches import StudentBatch
from dfadc.distillation.loop import distill, update_generator, update_student
from dfadc.distillation.objectives import GeneratorBatch
from dfadc.errors import DfadcError
from dfadc.recipe.schema import num_micro_batches
from dfadc.training.budget import Budget
from dfadc.training.cost import estimate

if TYPE_CHECKING:
    from dfadc.distillation.distillation import Distillation

#: Terms that are means over images; a student that never sees a batch as a whole.
LINEAR = (
    *("generator.latents=noisy", "replay.share=1", "replay.procedural_share=0", "replay.repeats=0"),
    *("student.start=0.1", "batch_size=10", "prior.batch_norm=0", "prior.balance=0", "prior.one_hot=1"),
    *("student.kl=1", "augmentation.mixup=0", "student.optimizer.clip_norm=0", "generator.optimizer.clip_norm=0"),
)


class PlainGenerator(nn.Module):
    """Draws each image from its latent alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 64)

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.linear(latents).view(-1, 1, 8, 8)
        return images


class Plain(nn.Module):
    """A network without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def train(*overrides: str, adversarial: float = 1.0) -> Distillation:
    torch.manual_seed(1)
    run = build_run("auto", *overrides, student=Plain(), generator=PlainGenerator(), adversarial=adversarial)
    torch.manual_seed(2)
    distill(run, 1, lambda _: None)
    return run


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


# ------------------------------------------------------------------------------------------------ parts of a batch


@settings(deadline=None, max_examples=100)
@given(
    counts=st.tuples(*[st.integers(0, 20)] * 3).filter(lambda n: sum(n) > 1),
    micro_batch=st.integers(0, 25),
    answered=st.booleans(),
)
def test_every_image_of_a_student_batch_is_in_one_part(
    counts: tuple[int, int, int], micro_batch: int, answered: bool
) -> None:
    rows = torch.arange(sum(counts), dtype=torch.float32).view(-1, 1)
    latents, procedural, replayed = rows.split(list(counts))
    answers = replayed.clone() if answered else replayed[:0]
    batch = StudentBatch(latents, procedural, replayed, answers, torch.tensor(0.3))
    parts = list(split_student_batch(batch, micro_batch))
    assert len(parts) == num_micro_batches(sum(counts), micro_batch)
    assert sum(share for share, _ in parts) == pytest.approx(1)
    sizes = [sum(len(source) for source in part[:3]) for _, part in parts]
    assert [size / sum(counts) for size in sizes] == pytest.approx([share for share, _ in parts])
    assert max(sizes) - min(sizes) <= 1
    assert not micro_batch or max(sizes) <= micro_batch
    for which in range(3):
        together = torch.cat([part[which] for _, part in parts])
        assert sorted(together.flatten().tolist()) == batch[which].flatten().tolist()
        # In the batch's proportion: within one image.
        expected = counts[which] / len(parts)
        assert all(abs(len(part[which]) - expected) < 1 for _, part in parts)
    if answered:
        assert all(torch.equal(part.stored_logits, part.replayed) for _, part in parts)


def test_a_generator_batch_keeps_latents_and_classes_together() -> None:
    latents, targets = torch.arange(7.0).view(-1, 1), torch.arange(7)
    batch = GeneratorBatch(latents, targets, torch.tensor(1.0))
    parts = [part for _, part in split_generator_batch(batch, 7, 3)]
    assert [part.targets.tolist() for part in parts if part.targets is not None] == [[0, 3, 6], [1, 4], [2, 5]]
    for part in parts:
        assert part.latents is not None
        assert part.targets is not None
        assert part.latents.flatten().tolist() == part.targets.tolist()


@pytest.mark.parametrize("recipe", ["auto", "dfad", "pool"])
def test_a_micro_batch_of_a_whole_batch_is_no_micro_batch(recipe: str) -> None:
    rules = ["student.steps=1", "generator.steps=2"]
    runs = [build_run(recipe, *rules, f"compute.micro_batch={size}") for size in (0, 8, 100)]
    for run in runs:
        torch.manual_seed(0)
        distill(run, 2, lambda _: None)
    for run in runs[1:]:
        assert_same_state(run.state.student.state_dict(), runs[0].state.student.state_dict())
        assert_same_state(run.state.generator.state_dict(), runs[0].state.generator.state_dict())


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("micro_batch", [4, 5, 9])
def test_the_students_gradient_is_that_of_the_whole_batch(micro_batch: int) -> None:
    whole, cut = (train(*LINEAR, f"compute.micro_batch={size}") for size in (0, micro_batch))
    cut.state.load_state_dict(copy.deepcopy(whole.state.state_dict()))
    losses = [update_student(run, run.student.draw_batch()) for run in (whole, cut)]
    torch.testing.assert_close(losses[1], losses[0])
    expected, found = (gradients(run.state.student.module) for run in (whole, cut))
    assert len(expected) == 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [4, 5, 9])
@pytest.mark.parametrize("discrepancy", ["l1", "agree_kl"])
def test_the_generators_gradient_is_that_of_the_whole_batch(micro_batch: int, discrepancy: str) -> None:
    rules = (*LINEAR, f"generator.discrepancy={discrepancy}")
    whole, cut = (train(*rules, f"compute.micro_batch={size}") for size in (0, micro_batch))
    cut.state.load_state_dict(copy.deepcopy(whole.state.state_dict()))
    outcomes = [update_generator(run) for run in (whole, cut)]
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0])
    assert set(outcomes[0][1]) == {"discrepancy", "one_hot"}
    torch.testing.assert_close(outcomes[1][1], outcomes[0][1])
    expected, found = (
        [*gradients(run.state.generator.module), *gradients(run.state.generator.latents)] for run in (whole, cut)
    )
    assert len(expected) == 4
    assert all(float(gradient.abs().max()) > 1e-5 for gradient in expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_what_belongs_to_a_batch_is_averaged_over_micro_batches() -> None:
    rules = tuple(rule for rule in LINEAR if "prior" not in rule)
    priors = ("prior.batch_norm=1", "prior.balance=1", "prior.one_hot=0")
    run = train(*rules, *priors, "compute.micro_batch=5", adversarial=0.0)
    batch = run.generator.draw_batch()
    _, whole = run.generator.loss(batch)
    parts = [run.generator.loss(part)[1] for _, part in split_generator_batch(batch, 10, 5)]
    _, found = update_generator(run)
    for name in ("batch_norm", "balance"):
        torch.testing.assert_close(found[name], sum(0.5 * part[name] for part in parts))
    # Negative entropy is convex in the mean prediction.
    assert float(found["balance"]) > float(whole["balance"])


@pytest.mark.parametrize("recipe", ["auto", "dfad", "pool"])
def test_every_recipe_trains_in_micro_batches(recipe: str) -> None:
    whole, cut = (build_run(recipe, f"compute.micro_batch={size}", "student.steps=2") for size in (0, 3))
    before = copy.deepcopy(cut.state.student.module.state_dict())
    losses: list[Any] = []
    distill(cut, 3, losses.append)
    distill(whole, 3, lambda _: None)
    assert all(torch.isfinite(step.generator_loss) for step in losses)
    assert len(cut.state.replay) == len(whole.state.replay)
    moved = cut.state.student.module.state_dict()
    assert any(not torch.equal(moved[name], before[name]) for name in before)


def test_memory_of_the_graph_falls_with_the_micro_batch() -> None:
    alone = ("replay.share=0", "replay.repeats=0")
    network = ("batch_size=64", *alone)
    whole, cut = (estimate(build_run("auto", *network, f"compute.micro_batch={size}"), Budget(8)) for size in (0, 8))
    fixed = estimate(build_run("auto", "batch_size=2", *alone), Budget(8)).memory_bytes
    assert (cut.memory_bytes - fixed) < 0.25 * (whole.memory_bytes - fixed)


@pytest.mark.parametrize(("batch_size", "micro_batch"), [(4, 1), (7, 2)])
def test_a_part_of_one_image_is_refused(batch_size: int, micro_batch: int) -> None:
    with pytest.raises(DfadcError, match="leaves a single image") as caught:
        build_run("dfad", f"batch_size={batch_size}", f"compute.micro_batch={micro_batch}", contract=SMALL_CONTRACT)
    assert "compute.micro_batch=4" in caught.value.hint
