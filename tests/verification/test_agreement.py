"""Agreement against independent formulas, and its properties."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfadc.verification.agreement import compare, split_by_source
from dfadc.verification.rates import MIN_PER_CLASS, TIE_MARGIN

Logits = npt.NDArray[np.float32]


def random_logits(seed: int, n: int = 40, num_classes: int = 10) -> Logits:
    return np.random.default_rng(seed).normal(scale=3.0, size=(n, num_classes)).astype(np.float32)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 60), num_classes=st.integers(2, 12))
def test_anything_agrees_with_itself(seed: int, n: int, num_classes: int) -> None:
    logits = random_logits(seed, n, num_classes)
    same = compare(logits, logits)
    assert (same.n, same.k, same.agreement, same.num_tied_disagreements, same.num_nonfinite) == (n, n, 1.0, 0, 0)
    assert same.outside_ties.k == same.outside_ties.n > 0
    assert same.kl == pytest.approx(0.0, abs=1e-12)
    assert same.sqnr_db == math.inf
    assert same.max_logit_error == 0.0
    assert same.top5 == (1.0 if num_classes > 5 else None)


@given(seed=st.integers(0, 2**32 - 1))
def test_order_of_samples_does_not_matter(seed: int) -> None:
    candidate, reference = random_logits(seed), random_logits(seed + 1)
    order = np.random.default_rng(seed).permutation(len(reference))
    plain, shuffled = compare(candidate, reference), compare(candidate[order], reference[order])
    assert (shuffled.k, shuffled.num_ties, shuffled.per_class) == (plain.k, plain.num_ties, plain.per_class)
    assert (shuffled.top5, shuffled.max_logit_error) == (plain.top5, plain.max_logit_error)
    assert (shuffled.kl, shuffled.sqnr_db) == pytest.approx((plain.kl, plain.sqnr_db), rel=1e-9)


@given(seed=st.integers(0, 2**32 - 1))
def test_order_of_classes_does_not_matter_to_the_totals(seed: int) -> None:
    candidate, reference = random_logits(seed), random_logits(seed + 1)
    order = np.random.default_rng(seed).permutation(reference.shape[1])
    plain, shuffled = compare(candidate, reference), compare(candidate[:, order], reference[:, order])
    assert (shuffled.k, shuffled.top5) == (plain.k, plain.top5)
    assert [shuffled.per_class[new].k for new in np.argsort(order)] == [entry.k for entry in plain.per_class]


def test_top5_is_the_sorted_definition() -> None:
    candidate, reference = random_logits(3, n=200), random_logits(4, n=200)
    best = np.argsort(-candidate, axis=1)[:, :5]
    expected = np.mean([top in row for top, row in zip(reference.argmax(axis=1), best, strict=True)])
    assert compare(candidate, reference).top5 == pytest.approx(expected)


def test_max_logit_error_is_a_share_of_the_range_of_its_own_sample() -> None:
    reference = np.array([[0.0, 8.0], [2.0, -2.0]])
    candidate = reference + np.array([[0.5, 0.0], [0.0, -1.0]])
    assert compare(candidate, reference).max_logit_error == pytest.approx(1.0 / 4.0)


def test_one_extreme_sample_makes_no_ties_and_hides_no_error() -> None:
    """904 disagreements of 1,000 were ties of the one sample with logits of 1e6."""
    reference = np.random.default_rng(0).normal(size=(1000, 10)) * 3
    candidate = np.random.default_rng(1).normal(size=(1000, 10)) * 3
    reference[0], candidate[0] = np.arange(10) * 1e6, np.arange(10) * 1e6
    with_it, without = compare(candidate, reference), compare(candidate[1:], reference[1:])
    assert with_it.agreement < 0.15
    assert with_it.num_ties <= 10
    assert with_it.outside_ties.rate == pytest.approx(without.outside_ties.rate, abs=2e-3)
    assert with_it.max_logit_error == without.max_logit_error > 0.5
    assert with_it.sqnr_db == pytest.approx(without.sqnr_db, abs=0.1)
    assert with_it.sqnr_db < 3


@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
def test_ties_are_left_out_whichever_way_they_fall(num_classes: int) -> None:
    reference = np.zeros((100, num_classes))
    reference[:, 0] = np.where(np.arange(100) < 4, 1e-4, 5.0)
    reference[:, 2:] = -5.0
    candidate = reference.copy()
    candidate[:2, 1] = 2e-4
    result = compare(candidate, reference)
    assert (result.n - result.k, result.num_ties, result.num_tied_disagreements) == (2, 4, 2)
    assert (result.outside_ties.n, result.outside_ties.k, result.num_differing) == (96, 96, 0)


def test_more_than_a_twentieth_of_ties_is_not_left_out() -> None:
    reference = np.tile([[5.0, 0.0, -5.0]], (100, 1))
    reference[:6] = [1e-4, 0.0, -5.0]
    candidate = reference.copy()
    candidate[:3, 1] = 1.0
    result = compare(candidate, reference)
    assert (result.num_ties, result.num_tied_disagreements) == (6, 3)
    assert (result.outside_ties.n, result.outside_ties.k, result.num_differing) == (100, 97, 3)


def test_a_constant_reference_makes_any_error_infinite() -> None:
    assert compare(np.array([[0.0, 1.0]]), np.zeros((1, 2))).max_logit_error == math.inf


@pytest.mark.parametrize(("margin", "num_ties"), [(0.99 * TIE_MARGIN, 1), (1.01 * TIE_MARGIN, 0)])
def test_a_tie_is_a_margin_below_a_thousandth_of_the_samples_range(margin: float, num_ties: int) -> None:
    reference = np.tile([[10.0, 0.0, 2.0]], (40, 1))
    reference[0] = [10.0, 10.0 + 20 * margin, -10.0]
    assert compare(reference, reference).num_ties == num_ties


def test_per_class_counts_by_the_references_class() -> None:
    reference = np.eye(3)[[0, 0, 1]]
    candidate = np.eye(3)[[0, 2, 1]]
    first, second, third = compare(candidate, reference).per_class
    assert [(entry.index, entry.n, entry.k) for entry in (first, second, third)] == [(0, 2, 1), (1, 1, 1), (2, 0, 0)]
    assert math.isnan(third.rate)
    assert first.too_few
    many = np.tile(reference[:1], (MIN_PER_CLASS, 1))
    assert not compare(many, many).per_class[0].too_few


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["candidate", "reference"])
def test_a_sample_that_is_not_finite_never_agrees(value: float, side: str) -> None:
    candidate, reference = random_logits(0), random_logits(0)
    (candidate if side == "candidate" else reference)[7, 2] = value
    result = compare(candidate, reference)
    assert (result.num_nonfinite, result.n - result.k) == (1, 1)
    assert result.kl == pytest.approx(0.0, abs=1e-12)


def test_all_nan_leaves_nothing_to_measure() -> None:
    result = compare(np.full((4, 3), np.nan), np.eye(4, 3))
    assert (result.k, result.num_nonfinite) == (0, 4)
    assert all(math.isnan(value) for value in (result.kl, result.sqnr_db, result.max_logit_error))


def test_zero_samples_are_no_crash_and_no_agreement() -> None:
    result = compare(np.empty((0, 10)), np.empty((0, 10)))
    assert (result.n, result.low, result.high) == (0, 0.0, 1.0)
    assert math.isnan(result.agreement)
    assert result.top5 is not None
    assert math.isnan(result.top5)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        compare(np.zeros(shape), np.zeros(shape))


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="candidate logits are"):
        compare(np.zeros((4, 3)), np.zeros((4, 2)))


def test_sources_are_split_and_taken_together() -> None:
    source = np.repeat([0, 1], [10, 20]).astype(np.int8)
    parts = split_by_source(source, ("generator", "snapshots", "prior"))
    sizes = {name: int(part.sum()) for name, part in parts.items()}
    assert sizes == {"all": 30, "generator": 10, "snapshots": 20, "prior": 0}
    assert parts["generator"][:10].all()
