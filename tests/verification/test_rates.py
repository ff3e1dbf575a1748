"""Wilson intervals against scipy, and accuracy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dfadc.verification.agreement import predict
from dfadc.verification.rates import Accuracy, wilson_interval


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (1, 3), (2048, 2048), (1999, 2048), (17, 1000)])
def test_wilson_interval_is_scipys(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_of_a_perfect_default_run() -> None:
    assert round(wilson_interval(2048, 2048)[0], 4) == 0.9981


def test_wilson_interval_of_nothing_is_everything() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "n"), [(3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="not between 0 and n"):
        wilson_interval(k, n)


@given(n=st.integers(1, 10_000), data=st.data())
def test_wilson_interval_holds_the_rate_and_stays_in_bounds(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = wilson_interval(k, n)
    assert 0.0 <= low <= k / n <= high <= 1.0
    assert low < high


@given(n=st.integers(1, 1000), factor=st.integers(2, 20), data=st.data())
def test_wilson_interval_shrinks_with_n(n: int, factor: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = wilson_interval(k, n)
    narrow_low, narrow_high = wilson_interval(k * factor, n * factor)
    assert narrow_high - narrow_low < high - low


def test_accuracy_counts_labels_and_never_nan() -> None:
    logits = np.eye(3)[[0, 1, 2, 2]]
    logits[3, 0] = np.nan
    assert list(predict(logits)) == [0, 1, 2, -1]
    result = Accuracy.of(predict(logits) == np.array([0, 1, 1, 2]))
    assert (result.n, result.k, result.accuracy) == (4, 2, 0.5)
    assert (result.low, result.high) == wilson_interval(2, 4)
    with pytest.raises(ValueError, match="must be"):
        predict(np.zeros(4))
