"""Answers of every pixel: counted by hand, against an independent formula, and in intervals that cover."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfadc.verification.coverage import measure_coverage
from dfadc.verification.pixel_agreement import compare_dense, pair_dense
from dfadc.verification.pixel_outputs import DenseOutputs, choose_positions
from dfadc.verification.pixel_scores import MIN_IMAGES, PairedPixels, PixelScores, boundary_band, count_pixels

if TYPE_CHECKING:
    from dfadc.verification.pixel_agreement import DenseAgreement


def answers(rng: np.random.Generator, n: int = 12, classes: int = 4, size: tuple[int, int] = (5, 7)) -> np.ndarray:
    logits: np.ndarray = rng.normal(size=(n, classes, *size)).astype(np.float32)
    return logits


def digest(logits: np.ndarray) -> DenseOutputs:
    return DenseOutputs.of(logits, choose_positions(*logits.shape[2:]))


def compare_all(candidate: np.ndarray, reference: np.ndarray, boundary_width: int = 0) -> DenseAgreement:
    return compare_dense(digest(candidate), digest(reference), boundary_width=boundary_width)


def test_counts_and_iou_by_hand() -> None:
    reference = np.array([[[0, 0, 1, 1]]], np.uint8)
    candidate = np.array([[[0, 1, 1, 2]]], np.uint8)
    scores = PixelScores.of(count_pixels(candidate, reference, 3))
    assert (scores.n, scores.k) == (4, 2)
    assert [entry.iou for entry in scores.per_class] == [1 / 2, 1 / 3, 0.0]
    assert scores.mean_iou == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert [entry.n for entry in scores.per_class] == [2, 2, 0]


def test_a_class_that_neither_answers_with_is_no_part_of_the_mean() -> None:
    classes = np.array([[[0, 1]]], np.uint8)
    scores = PixelScores.of(count_pixels(classes, classes, 5))
    assert scores.mean_iou == 1.0
    assert math.isnan(scores.per_class[4].iou)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_against_an_independent_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    candidate, reference = rng.integers(0, 4, (2, 3, 6, 5)).astype(np.uint8)
    scores = PixelScores.of(count_pixels(candidate, reference, 4))
    assert scores.k == (candidate == reference).sum()
    for index, entry in enumerate(scores.per_class):
        mine, theirs = candidate == index, reference == index
        union = (mine | theirs).sum()
        assert math.isnan(entry.iou) if union == 0 else entry.iou == pytest.approx((mine & theirs).sum() / union)


def test_pixels_without_a_label_do_not_count_and_those_without_an_answer_are_wrong() -> None:
    reference = np.array([[[0, 3, 1]]], np.uint16)
    candidate = np.array([[[255, 0, 1]]], np.uint8)
    scores = PixelScores.of(count_pixels(candidate, reference, 3))
    assert (scores.n, scores.k) == (2, 1)
    assert scores.per_class[0].iou == 0.0


def test_a_network_agrees_with_itself_and_nothing_is_claimed_of_few_images() -> None:
    logits = answers(np.random.default_rng(0))
    same = compare_all(logits, logits)
    assert (same.agreement, same.low, same.high, same.mean_iou) == (1.0, 1.0, 1.0, 1.0)
    assert (same.max_logit_error, same.num_tied_disagreements, same.num_nonfinite) == (0.0, 0, 0)
    few = compare_all(logits[: MIN_IMAGES - 1], logits[: MIN_IMAGES - 1])
    assert (few.agreement, few.low, few.high, few.low_if_perfect) == (1.0, 0.0, 1.0, 0.0)
    assert all(entry.too_few for entry in few.per_class)


def test_the_interval_is_of_images_not_of_pixels() -> None:
    """Images that agree wholly or not at all: as uncertain as that many coins, however many pixels they have."""
    reference = np.zeros((40, 20, 20), np.uint8)
    candidate = reference.copy()
    candidate[::2] = 1
    scores = PixelScores.of(count_pixels(candidate, reference, 2))
    assert scores.rate == 0.5
    assert 0.25 < scores.high - scores.low < 0.36  # 2 · 1.96 · √(.25 / 40) = .31; of 16,000 pixels it were .015


def test_the_interval_covers_what_the_images_were_drawn_from() -> None:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(60):
        share = rng.beta(8, 2, size=60)
        candidate = (rng.random((60, 8, 8)) > share[:, None, None]).astype(np.uint8)
        scores = PixelScores.of(count_pixels(candidate, np.zeros_like(candidate), 2))
        covered += scores.low <= 0.8 <= scores.high
    assert covered >= 52  # 57 are expected


def test_pixels_that_are_no_number_are_found() -> None:
    logits = answers(np.random.default_rng(0))
    broken = logits.copy()
    broken[3, 1, 2, 2] = np.nan
    found = compare_all(broken, logits)
    assert found.num_nonfinite == 1
    assert found.k == found.n - 1


def test_ties_are_pixels_that_the_reference_hardly_decided() -> None:
    reference = answers(np.random.default_rng(0))
    reference[0, :, 0, 0] = [5, 4.9999, 0, 0]
    candidate = reference.copy()
    candidate[0, 1, 0, 0] = 5.1
    found = compare_all(candidate, reference)
    assert (found.num_tied_disagreements, found.num_differing) == (1, 0)
    assert found.num_ties == compare_all(reference, reference).num_ties


def test_one_extreme_image_makes_no_ties_of_the_others() -> None:
    reference, candidate = (answers(np.random.default_rng(seed)) for seed in (0, 1))
    reference[0] *= 1e6
    found = compare_all(candidate, reference)
    assert found.num_ties < 0.02 * found.n
    assert found.num_differing > 0.5 * found.n


def test_a_band_along_the_borders() -> None:
    classes = np.zeros((1, 6, 6), np.uint8)
    classes[:, :, 3:] = 1
    assert boundary_band(classes, 1)[0].sum(axis=1).tolist() == [2] * 6
    assert boundary_band(classes, 2)[0].sum(axis=1).tolist() == [4] * 6
    assert not boundary_band(np.zeros((1, 6, 6), np.uint8), 3).any()


def test_pixels_near_a_border_of_the_reference_can_be_left_out() -> None:
    reference = np.zeros((12, 2, 6, 6), np.float32)
    reference[:, 0, :, :3] = reference[:, 1, :, 3:] = 1
    candidate = np.roll(reference, 1, axis=3)
    candidate[:, :, :, 0] = reference[:, :, :, 0]
    whole, inner = compare_all(candidate, reference), compare_all(candidate, reference, boundary_width=1)
    assert whole.agreement == pytest.approx(5 / 6)
    assert (inner.agreement, inner.n) == (1.0, 12 * 6 * 4)


def test_coverage_is_of_pixels() -> None:
    logits = np.zeros((2, 3, 4, 4), np.float32)
    logits[0, 1], logits[1, 2] = 1, 1
    logits[1, 0, 0, 0] = np.nan
    classes = digest(logits).classes
    found = measure_coverage(classes, 3)
    assert (found.counts, found.num_nonfinite) == ((0, 16, 15), 1)
    assert measure_coverage(classes[:1], 3).entropy == 0.0
    assert found.entropy == pytest.approx(math.log(2) / math.log(3), abs=1e-3)


def test_pixels_lost_are_paired_image_by_image_and_away_from_borders() -> None:
    rng = np.random.default_rng(0)
    before, after, reference = (digest(answers(rng)) for _ in range(3))
    for width in (0, 1):
        rates = [compare_dense(outputs, reference, boundary_width=width).agreement for outputs in (before, after)]
        assert pair_dense(before, after, reference, boundary_width=width).drop == pytest.approx(rates[0] - rates[1])
    assert pair_dense(before, before, reference, boundary_width=0) == PairedPixels(12, 0.0, 0.0)


def test_a_drop_of_pixels_fails_where_its_images_show_that_it_is_no_chance() -> None:
    rng = np.random.default_rng(0)
    n, pixels = 200, 1000
    counted = np.full(n, pixels)
    one_image = np.where(np.arange(n) == 7, pixels, 0)
    everywhere = rng.normal(30, 20, n).round().astype(np.int64)
    chance = rng.normal(0, 300, n).round().astype(np.int64)
    chance += round(0.012 * pixels - chance.mean())
    collapsed = np.where(np.arange(n) < n // 20, pixels, -1)  # five images in a hundred, and a pixel better elsewhere
    for lost, limit, held in (
        (np.zeros(n, np.int64), 0.01, True),
        (one_image, 0.001, True),  # half a point, all of one image
        (everywhere, 0.01, False),
        (everywhere, 0.05, True),
        (chance, 0.01, True),
        (collapsed, 0.01, False),
    ):
        pairs = PairedPixels.of(lost, counted)
        assert pairs.drop == pytest.approx(lost.sum() / counted.sum())
        assert pairs.holds(limit) == held, pairs
        assert not pairs.holds(math.nan)
    # A normal approximation of the same bound.
    found = PairedPixels.of(everywhere, counted)
    assert found.low == pytest.approx((everywhere.mean() - 1.645 * everywhere.std() / math.sqrt(n)) / pixels, abs=5e-4)
    assert "paired bootstrap over 200 images" in found.describe(0.01)


def test_of_few_images_every_drop_beyond_the_limit_counts() -> None:
    lost, counted = np.zeros(MIN_IMAGES - 1, np.int64), np.full(MIN_IMAGES - 1, 1000)
    lost[0] = 200
    few = PairedPixels.of(lost, counted)
    assert not few.holds(0.01)
    assert "9 images are too few to tell a drop from chance" in few.describe(0.01)
    assert PairedPixels.of(np.append(lost, 0), np.append(counted, 1000)).holds(0.01)
    nothing = PairedPixels.of(lost[:0], counted[:0])
    assert not nothing.holds(1.0)


def test_answers_to_other_images_are_refused() -> None:
    logits = answers(np.random.default_rng(0))
    with pytest.raises(ValueError, match="outputs are"):
        compare_all(logits[:, :3], logits)
