"""Refined samples: a real teacher is surer of them, its batch norms know them, and nothing else has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from dfadc.distillation.losses.batch_norm import BatchNormMatching
from dfadc.networks.norm_layers import is_batch_norm_with_statistics
from dfadc.pipeline.distill import load_teacher
from dfadc.recipe.load import load_recipe
from dfadc.sampling.lengths import refine_steps
from dfadc.sampling.refine import refine, total_variation

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Digits
    from torch import Tensor, nn

    from dfadc.teacher.load import Teacher


@pytest.fixture(scope="module")
def teacher(digits_teacher: Path) -> Teacher:
    return load_teacher(digits_teacher)


def batch_norms_of(teacher: Teacher) -> list[nn.Module]:
    return [layer for layer in teacher.module.modules() if is_batch_norm_with_statistics(layer)]


@pytest.fixture(scope="module")
def noisy(teacher: Teacher, digits_split: tuple[Digits, Digits]) -> Tensor:
    """Unseen digits under noise, over the whole range of pixels, ends included."""
    digits = torch.from_numpy(digits_split[1].images[:64]).float() / 255
    pixels = digits + 0.6 * torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))
    (low,), (high,) = teacher.contract.value_range()
    return low + (high - low) * pixels.clamp(0, 1)


@torch.no_grad()
def look(teacher: Teacher, images: Tensor) -> tuple[float, float, Tensor]:
    """Mean confidence, distance of the batch-norm statistics, and classes."""
    with BatchNormMatching(batch_norms_of(teacher)) as matching, matching.recording() as distances:
        logits = teacher.logits(images)
    distance = float(torch.stack(distances).sum())
    return float(logits.softmax(dim=1).amax(dim=1).mean()), distance, logits.argmax(dim=1)


def test_the_teacher_is_surer_and_its_batch_norms_know_the_images(teacher: Teacher, noisy: Tensor) -> None:
    images, before = noisy, noisy.clone()
    weights = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    refined = refine(images, teacher, batch_norms_of(teacher), steps=40)
    (confidence, distance, classes), (surer, nearer, same) = (look(teacher, each) for each in (images, refined))
    assert surer > confidence
    assert nearer < distance / 4
    assert (classes == same).float().mean() > 0.9
    (low,), (high,) = teacher.contract.value_range()
    assert refined.shape == images.shape
    assert low <= float(refined.min()) < float(refined.max()) <= high
    assert not refined.requires_grad
    assert torch.equal(images, before)
    assert all(torch.equal(value, weights[name]) for name, value in teacher.module.state_dict().items())
    hooks = [layer._forward_pre_hooks for layer in batch_norms_of(teacher)]  # noqa: SLF001
    assert not any(hooks)


def test_without_updates_the_images_stay(teacher: Teacher, noisy: Tensor) -> None:
    still = refine(noisy, teacher, batch_norms_of(teacher), steps=0)
    (low,), (high,) = teacher.contract.value_range()
    torch.testing.assert_close(still, noisy, rtol=0, atol=2e-3 * (high - low))


def test_it_takes_a_quarter_of_what_the_run_takes_at_most() -> None:
    # 8 images, 5 + 1 updates a step: 48 images answered in each. Without steps as many as of 300.
    small = ["batch_size=8", "student.steps=5"]
    assert refine_steps(load_recipe("auto", ["steps=100000", *small]), 512) == 40
    assert refine_steps(load_recipe("auto", ["steps=1000", *small]), 512) == 23
    assert refine_steps(load_recipe("auto", ["steps=2", *small]), 512) == 0
    assert refine_steps(load_recipe("auto", ["steps=0", *small]), 512) == 7
    assert refine_steps(load_recipe("auto", ["steps=100000", *small]), 0) == 40


def test_without_batch_norms_neighbouring_pixels_are_drawn_together(teacher: Teacher, noisy: Tensor) -> None:
    refined = refine(noisy, teacher, [], steps=40)
    (confidence, _, classes), (surer, _, same) = (look(teacher, each) for each in (noisy, refined))
    assert surer > confidence
    assert total_variation(refined) < total_variation(noisy) / 2
    assert (classes == same).float().mean() > 0.9


def test_total_variation_counts_both_axes() -> None:
    images = torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])
    assert float(total_variation(images)) == (0 + 2) / 2 + (1 + 3) / 2
