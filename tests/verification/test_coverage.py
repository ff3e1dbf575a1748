"""Class coverage against scipy's entropy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dfadc.verification.agreement import predict
from dfadc.verification.coverage import measure_coverage


@given(classes=st.lists(st.integers(0, 6), min_size=1, max_size=80))
def test_coverage_is_the_entropy_of_the_histogram(classes: list[int]) -> None:
    coverage = measure_coverage(np.array(classes), 7)
    counts = np.bincount(classes, minlength=7)
    assert coverage.counts == tuple(counts)
    expected = stats.entropy(counts, base=min(7, len(classes))) if len(classes) > 1 else 0.0
    assert coverage.entropy == pytest.approx(expected, abs=1e-12)
    assert 0.0 <= coverage.entropy <= 1.0 + 1e-12
    assert coverage.num_empty == 7 - len(set(classes))


@pytest.mark.parametrize("num_classes", [50, 1000, 21_841])
def test_samples_that_are_all_of_other_classes_cover_all_that_they_can(num_classes: int) -> None:
    assert measure_coverage(np.arange(42), num_classes).entropy == pytest.approx(1.0)
    halves = measure_coverage(np.array([0, 1] * 21), num_classes)
    assert halves.entropy == pytest.approx(np.log(2) / np.log(42))


def test_coverage_leaves_nan_out_and_takes_nothing() -> None:
    logits = np.eye(3)
    logits[1, 1] = np.nan
    coverage = measure_coverage(predict(logits), 3)
    assert (coverage.counts, coverage.num_nonfinite) == ((1, 0, 1), 1)
    assert measure_coverage(predict(np.empty((0, 3))), 3).entropy == 0.0
