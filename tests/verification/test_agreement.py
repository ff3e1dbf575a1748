"""Agreement and its statistics against scipy, independent formulas, and properties."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from dfadc.verification.agreement import (
    MIN_PER_CLASS,
    TIE_MARGIN,
    Accuracy,
    compare,
    compare_by_source,
    coverage_by_source,
    logit_scale,
    mean_kl,
    measure_coverage,
    predict,
    sqnr_db,
    wilson_interval,
)

Logits = npt.NDArray[np.float32]


def random_logits(seed: int, n: int = 40, num_classes: int = 10) -> Logits:
    return np.random.default_rng(seed).normal(scale=3.0, size=(n, num_classes)).astype(np.float32)


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


def test_top5_is_the_sorted_definition() -> None:
    candidate, reference = random_logits(3, n=200), random_logits(4, n=200)
    best = np.argsort(-candidate, axis=1)[:, :5]
    expected = np.mean([top in row for top, row in zip(reference.argmax(axis=1), best, strict=True)])
    assert compare(candidate, reference).top5 == pytest.approx(expected)


def test_max_logit_error_is_a_share_of_the_range_of_its_own_sample() -> None:
    reference = np.array([[0.0, 8.0], [2.0, -2.0]])
    candidate = reference + np.array([[0.5, 0.0], [0.0, -1.0]])
    assert compare(candidate, reference).max_logit_error == pytest.approx(1.0 / 4.0)


def test_an_undecided_sample_is_not_measured_by_nearly_nothing() -> None:
    """With two classes the range is the margin: the scale of the others keeps float rounding from being an error."""
    reference = np.array([[0.0, 8.0], [2.0, -2.0], [1.0, 1.0 + 1e-6]])
    assert logit_scale(reference) == pytest.approx([8, 4, 4])
    assert compare(reference + 1e-6, reference).max_logit_error < 1e-6


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


def test_sources_are_reported_apart_and_together() -> None:
    reference = random_logits(0, n=30)
    candidate = reference.copy()
    candidate[:10] = -candidate[:10]
    source = np.repeat([0, 1], [10, 20]).astype(np.int8)
    results = compare_by_source(candidate, reference, source=source, sources=("generator", "snapshots", "prior"))
    assert {name: (result.n, result.k) for name, result in results.items()} == {
        "all": (30, 20),
        "generator": (10, 0),
        "snapshots": (20, 20),
        "prior": (0, 0),
    }
    coverages = coverage_by_source(reference, source=source, sources=("generator", "snapshots"))
    assert {name: value.n for name, value in coverages.items()} == {"all": 30, "generator": 10, "snapshots": 20}


def test_a_source_for_every_sample_is_needed() -> None:
    with pytest.raises(ValueError, match="values for 40 samples"):
        coverage_by_source(random_logits(0), source=np.zeros(3, np.int8), sources=("generator",))


@given(classes=st.lists(st.integers(0, 6), min_size=1, max_size=80))
def test_coverage_is_the_entropy_of_the_histogram(classes: list[int]) -> None:
    coverage = measure_coverage(np.eye(7)[classes])
    counts = np.bincount(classes, minlength=7)
    assert coverage.counts == tuple(counts)
    expected = stats.entropy(counts, base=min(7, len(classes))) if len(classes) > 1 else 0.0
    assert coverage.entropy == pytest.approx(expected, abs=1e-12)
    assert 0.0 <= coverage.entropy <= 1.0 + 1e-12
    assert coverage.num_empty == 7 - len(set(classes))


@pytest.mark.parametrize("num_classes", [50, 1000, 21_841])
def test_samples_that_are_all_of_other_classes_cover_all_that_they_can(num_classes: int) -> None:
    assert measure_coverage(np.eye(num_classes, dtype=np.float32)[:42]).entropy == pytest.approx(1.0)
    halves = measure_coverage(np.eye(num_classes, dtype=np.float32)[[0, 1] * 21])
    assert halves.entropy == pytest.approx(np.log(2) / np.log(42))


def test_coverage_leaves_nan_out_and_takes_nothing() -> None:
    logits = np.eye(3)
    logits[1, 1] = np.nan
    assert (measure_coverage(logits).counts, measure_coverage(logits).num_nonfinite) == ((1, 0, 1), 1)
    assert measure_coverage(np.empty((0, 3))).entropy == 0.0


def test_accuracy_counts_labels_and_never_nan() -> None:
    logits = np.eye(3)[[0, 1, 2, 2]]
    logits[3, 0] = np.nan
    assert list(predict(logits)) == [0, 1, 2, -1]
    result = Accuracy.of(predict(logits) == np.array([0, 1, 1, 2]))
    assert (result.n, result.k, result.accuracy) == (4, 2, 0.5)
    assert (result.low, result.high) == wilson_interval(2, 4)
    with pytest.raises(ValueError, match="must be"):
        predict(np.zeros(4))
