"""Pairs and the exact McNemar test against scipy and exact fractions, with properties."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dfadc.verification.paired import SIGNIFICANCE, Pairs, mcnemar_p, pair

counts = st.integers(0, 400)


@given(lost=counts, gained=counts)
def test_mcnemar_is_scipys_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-9)


@given(lost=st.integers(0, 40), gained=st.integers(0, 40))
def test_mcnemar_counts_coin_tosses(lost: int, gained: int) -> None:
    """The definition, in exact fractions."""
    changed = lost + gained
    tail = Fraction(sum(math.comb(changed, i) for i in range(min(lost, gained) + 1)), 2**changed)
    assert mcnemar_p(lost, gained) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


@given(lost=counts, gained=counts)
def test_mcnemar_is_a_symmetric_probability(lost: int, gained: int) -> None:
    assert 0 < mcnemar_p(lost, gained) <= 1
    assert mcnemar_p(lost, gained) == mcnemar_p(gained, lost)
    assert mcnemar_p(lost, lost) == 1


@given(gained=counts, lost=counts, more=st.integers(1, 50))
def test_losing_more_is_less_likely_chance(gained: int, lost: int, more: int) -> None:
    lost += gained
    assert mcnemar_p(lost + more, gained) < mcnemar_p(lost, gained) or mcnemar_p(lost, gained) == 1


@pytest.mark.parametrize(("lost", "gained"), [(500_000, 501_000), (1_000_000, 0), (60_000, 40_000)])
def test_a_million_changes_neither_overflow_nor_take_long(lost: int, gained: int) -> None:
    assert mcnemar_p(lost, gained) == pytest.approx(stats.binomtest(lost, lost + gained, 0.5).pvalue, rel=1e-6)


def test_few_changes_prove_nothing() -> None:
    assert mcnemar_p(5, 0) > SIGNIFICANCE > mcnemar_p(6, 0)


@pytest.mark.parametrize(("lost", "gained"), [(-1, 2), (2, -1)])
def test_impossible_counts_are_refused(lost: int, gained: int) -> None:
    with pytest.raises(ValueError, match="are no counts"):
        mcnemar_p(lost, gained)


@given(answers=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=80))
def test_pairs_count_as_the_two_rates_do(answers: list[tuple[bool, bool]]) -> None:
    before, after = np.array(answers, np.bool_).reshape(-1, 2).T
    found = pair(before, after)
    assert found.n == len(answers)
    if not answers:
        assert all(math.isnan(rate) for rate in (found.before, found.after, found.drop))
        assert found.p_value == 1
        return
    assert (found.before, found.after) == pytest.approx((before.mean(), after.mean()))
    assert found.drop == pytest.approx(before.mean() - after.mean())
    assert (found.lost, found.gained) == ((before > after).sum(), (after > before).sum())
    assert pair(after, before) == Pairs(found.n, found.both, lost=found.gained, gained=found.lost)


@pytest.mark.parametrize(("before", "after"), [((3,), (4,)), ((3, 1), (3, 1))])
def test_what_is_not_paired_is_refused(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not paired"):
        pair(np.zeros(before, np.bool_), np.zeros(after, np.bool_))
