"""Pairs and the exact McNemar test against scipy and exact fractions, with properties."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dfadc.verification.mcnemar import SIGNIFICANCE, Pairs, mcnemar_p, pair, undetectable_drops

counts = st.integers(0, 400)


@given(lost=counts, gained=counts)
def test_mcnemar_is_scipys_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue if lost + gained else 1.0
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-9)


@given(lost=st.integers(0, 40), gained=st.integers(0, 40))
def test_mcnemar_counts_coin_tosses(lost: int, gained: int) -> None:
    """The definition, in exact fractions."""
    changed = lost + gained
    tail = Fraction(sum(math.comb(changed, i) for i in range(lost, changed + 1)), 2**changed)
    assert mcnemar_p(lost, gained) == pytest.approx(float(tail), rel=1e-12)


@given(lost=counts, gained=counts)
def test_mcnemar_is_the_probability_of_a_loss_and_never_of_a_gain(lost: int, gained: int) -> None:
    assert 0 < mcnemar_p(lost, gained) <= 1
    assert mcnemar_p(0, gained) == 1
    assert mcnemar_p(min(lost, gained), max(lost, gained)) >= 0.5
    if lost:  # either so many heads, or fewer: more tails then
        assert mcnemar_p(lost, gained) + mcnemar_p(gained + 1, lost - 1) == pytest.approx(1)


@given(gained=counts, lost=counts, more=st.integers(1, 50))
def test_losing_more_is_less_likely_chance(gained: int, lost: int, more: int) -> None:
    lost += gained
    assert mcnemar_p(lost + more, gained) < mcnemar_p(lost, gained) or mcnemar_p(lost, gained) == 1


@pytest.mark.parametrize(
    ("lost", "gained"), [(500_000, 501_000), (501_000, 500_000), (1_000_000, 0), (50_400, 49_600), (5_150, 5_000)]
)
def test_a_million_changes_neither_overflow_nor_take_long(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-8)


def test_up_to_a_hundred_thousand_changes_the_binomial_coefficient_is_exact() -> None:
    """P(at least k + 1 of 2k + 1 heads) is one half; by logarithms of the gamma function only 12 digits of it are."""
    assert mcnemar_p(400, 399) == pytest.approx(0.5, rel=1e-14)
    assert mcnemar_p(50_000, 49_999) == pytest.approx(0.5, rel=1e-13)


def test_few_changes_prove_nothing() -> None:
    assert mcnemar_p(4, 0) > SIGNIFICANCE > mcnemar_p(5, 0)


def test_where_losing_all_would_be_no_drop_nothing_holds() -> None:
    """Five of five answered rightly and then none is a drop; of four it cannot be told, whatever became of them."""
    all_lost = Pairs(5, both=0, lost=5, gained=0)
    assert not all_lost.holds(0.01)
    assert "one-sided exact McNemar p = 0.031" in all_lost.describe(0.01)
    for few in (Pairs(4, 0, 4, 0), Pairs(4, 4, 0, 0), Pairs(100, 2, 2, 90)):
        assert not few.can_tell
        assert not few.holds(1.0)
        assert "too few to tell, for even the loss of all 4 that were correct before" in few.describe(0.01)
    nothing = Pairs(0, 0, 0, 0)
    assert (nothing.can_tell, nothing.holds(1.0)) == (False, False)


@given(n=st.integers(0, 60), data=st.data())
def test_what_holds_is_no_significant_drop_beyond_the_limit(n: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    both = data.draw(st.integers(0, n - lost - gained))
    limit = data.draw(st.sampled_from([0.0, 0.01, 0.1, 1.0]))
    pairs = Pairs(n, both, lost, gained)
    can_tell = 0.5 ** (both + lost) < SIGNIFICANCE
    falls = n > 0 and (lost - gained) / n > limit and mcnemar_p(lost, gained) < SIGNIFICANCE
    assert pairs.holds(limit) == (can_tell and not falls)
    assert not pairs.holds(math.nan)


def test_drops_that_so_few_samples_cannot_show_are_named() -> None:
    assert undetectable_drops(42, 0.01) == " (42 pairs cannot show a drop of less than 11.9 points)"
    assert undetectable_drops(42, 0.01) in Pairs(42, 40, 1, 0).describe(0.01)
    assert undetectable_drops(499, 0.01) == " (499 pairs cannot show a drop of less than 1.002 points)"
    assert undetectable_drops(500, 0.01) == undetectable_drops(0, 0.01) == ""


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
