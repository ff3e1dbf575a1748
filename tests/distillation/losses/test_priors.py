"""Generator terms against independent NumPy formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from dfadc.distillation.losses.discrepancy import as_pairs
from dfadc.distillation.losses.priors import class_balance, one_hot

Array = npt.NDArray[np.float64]
SHAPES = ((9, 6), (2, 3), (3, 4, 5, 2))


def draw(shape: tuple[int, ...], seed: int, scale: float = 3.0) -> Array:
    return np.random.default_rng(seed).normal(scale=scale, size=shape)


def rows(logits: Array) -> Array:
    """One row of K logits for each sample and pixel."""
    return np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_one_hot_is_the_negative_log_of_the_largest_probability(shape: tuple[int, ...]) -> None:
    logits = draw(shape, 0)
    expected = np.mean([-np.log(special.softmax(row).max()) for row in rows(logits)])
    assert one_hot(torch.from_numpy(logits)).item() == pytest.approx(expected, rel=1e-5)


def test_one_hot_to_given_classes_is_the_negative_log_of_their_probabilities() -> None:
    logits, targets = draw((6, 4), 20), [3, 0, 1, 1, 2, 3]
    expected = np.mean([-np.log(special.softmax(row)[target]) for row, target in zip(logits, targets, strict=True)])
    assert one_hot(torch.from_numpy(logits), torch.tensor(targets)).item() == pytest.approx(expected, rel=1e-5)


def test_one_hot_to_its_own_argmax_is_one_hot_to_that_class() -> None:
    logits = torch.from_numpy(draw((6, 4), 21))
    assert torch.equal(one_hot(logits), one_hot(logits, logits.argmax(dim=1)))


@pytest.mark.parametrize("shape", SHAPES)
def test_class_balance_is_the_negative_entropy_of_the_mean_prediction(shape: tuple[int, ...]) -> None:
    logits = draw(shape, 1)
    mean = np.mean([special.softmax(row) for row in rows(logits)], axis=0)
    assert class_balance(torch.from_numpy(logits)).item() == pytest.approx(np.sum(mean * np.log(mean)), rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 9999), num_classes=st.integers(2, 9), scale=st.sampled_from([0.1, 3.0, 100.0]))
def test_class_balance_is_lowest_for_a_uniform_batch(seed: int, num_classes: int, scale: float) -> None:
    lowest = -math.log(num_classes)
    balance = class_balance(torch.from_numpy(draw((8, num_classes), seed, scale))).item()
    assert lowest - 1e-5 <= balance <= 1e-6
    sure_of_each = 1000 * torch.eye(num_classes)
    assert class_balance(sure_of_each).item() == pytest.approx(lowest, rel=1e-5)
    assert class_balance(torch.zeros(3, num_classes)).item() == pytest.approx(lowest, rel=1e-5)


def test_class_balance_of_a_collapsed_batch_is_zero_and_pushes_back() -> None:
    """A probability of exactly 0 must neither give NaN nor stop the gradient of the others."""
    logits = torch.full((4, 3), -20.0)
    logits[:, 0] = 20.0
    logits.requires_grad_()
    balance = class_balance(logits)
    (gradient,) = torch.autograd.grad(balance, logits)
    assert balance.item() == pytest.approx(0.0, abs=1e-6)
    assert gradient.isfinite().all()
    hard = torch.tensor([[1e4, -1e4]] * 2, requires_grad=True)
    assert torch.autograd.grad(class_balance(hard), hard)[0].isfinite().all()


@pytest.mark.parametrize("prior", [one_hot, class_balance])
def test_priors_of_half_precision_logits_are_computed_in_fp32(prior: Any) -> None:
    logits = torch.from_numpy(draw((32, 10), 3)).bfloat16()
    assert prior(logits).dtype == torch.float32
    assert prior(logits).item() == pytest.approx(prior(logits.double()).item(), rel=1e-5)


def test_labels_are_sure_and_balanced_each_for_itself() -> None:
    """The mean over labels of the binary terms."""
    logits = draw((9, 4), 5)
    p = special.expit(logits)
    pairs = as_pairs(torch.from_numpy(logits))
    assert one_hot(pairs).item() == pytest.approx(-np.log(np.maximum(p, 1 - p)).mean(), rel=1e-5)
    targets = draw((9, 4), 6) > 0
    expected = -np.log(np.where(targets, p, 1 - p)).mean()
    assert one_hot(pairs, torch.from_numpy(targets).long()).item() == pytest.approx(expected, rel=1e-5)
    mean = p.mean(axis=0)
    expected = (special.xlogy(mean, mean) + special.xlogy(1 - mean, 1 - mean)).mean()
    assert class_balance(pairs).item() == pytest.approx(expected, rel=1e-5)
