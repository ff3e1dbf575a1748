"""Errors of logits against scipy and independent formulas."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from dfadc.verification.agreement import compare
from dfadc.verification.logit_error import logit_scale, mean_kl, sqnr_db


def random_logits(seed: int, n: int = 40, num_classes: int = 10) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(scale=3.0, size=(n, num_classes)).astype(np.float32)


@given(seed=st.integers(0, 2**32 - 1))
def test_kl_is_scipys(seed: int) -> None:
    candidate, reference = random_logits(seed), random_logits(seed + 1)
    p, q = special.softmax(reference.astype(float), axis=1), special.softmax(candidate.astype(float), axis=1)
    assert mean_kl(candidate, reference) == pytest.approx(stats.entropy(p, q, axis=1).mean(), rel=1e-6)
    assert mean_kl(candidate, reference) >= 0.0


@pytest.mark.parametrize("noise_db", [10.0, 20.0, 40.0])
def test_sqnr_finds_the_noise_that_was_added(noise_db: float) -> None:
    reference = random_logits(0).astype(np.float64)
    noise = np.random.default_rng(1).normal(size=reference.shape)
    noise *= np.linalg.norm(reference) / np.linalg.norm(noise) * 10 ** (-noise_db / 20)
    assert sqnr_db(reference + noise, reference) == pytest.approx(noise_db, abs=1e-9)


def test_sqnr_of_a_silent_reference_is_minus_infinity() -> None:
    assert sqnr_db(np.ones((2, 3)), np.zeros((2, 3))) == -math.inf


def test_an_undecided_sample_is_not_measured_by_nearly_nothing() -> None:
    """With two classes the range is the margin: the scale of the others keeps float rounding from being an error."""
    reference = np.array([[0.0, 8.0], [2.0, -2.0], [1.0, 1.0 + 1e-6]])
    assert logit_scale(reference) == pytest.approx([8, 4, 4])
    assert compare(reference + 1e-6, reference).max_logit_error < 1e-6
