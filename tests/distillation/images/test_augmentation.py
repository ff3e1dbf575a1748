"""Shift and mixup against NumPy loops, and how their dice fall."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from dfadc.contract import ImageContract
from dfadc.distillation.images.augmentation import draw_mixup, mixup, most_pixels, shift


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(count: int, *size: int) -> torch.Tensor:
    return torch.randn(count, *size, generator=rng(7))


def moved(image: npt.NDArray[np.float32], down: int, right: int) -> npt.NDArray[np.float32]:
    """The image moved pixel by pixel; what enters repeats the border."""
    result = np.empty_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            source = min(max(row - down, 0), height - 1), min(max(column - right, 0), width - 1)
            result[:, row, column] = image[:, source[0], source[1]]
    return result


@pytest.mark.parametrize(("size", "pixels"), [((1, 8, 8), 2), ((3, 5, 7), 1), ((2, 4, 3), 3), ((1, 3, 3), 5)])
def test_each_image_is_moved_as_a_whole_by_a_few_pixels(size: tuple[int, int, int], pixels: int) -> None:
    images = images_of(12, *size)
    results = shift(images, pixels, rng()).numpy()
    assert results.shape == images.shape
    reach = range(-pixels, pixels + 1)
    for image, result in zip(images.numpy(), results, strict=True):
        assert any(np.array_equal(moved(image, down, right), result) for down in reach for right in reach)


def test_every_shift_is_equally_likely_and_drawn_for_each_image_alone() -> None:
    ramp = torch.arange(49.0).view(1, 1, 7, 7).expand(5000, 1, 7, 7)
    centre = shift(ramp, 1, rng())[:, 0, 3, 3].tolist()
    counts = Counter(centre)
    assert sorted(counts) == [16, 17, 18, 23, 24, 25, 30, 31, 32]
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_no_shift_draws_nothing() -> None:
    dice = rng()
    before = dice.get_state()
    images = images_of(3, 1, 4, 4)
    assert shift(images, 0, dice) is images
    assert torch.equal(dice.get_state(), before)


@pytest.mark.parametrize(("size", "pixels"), [((1, 28, 28), 2), ((3, 2, 9), 1), ((3, 9, 1), 0)])
def test_a_replayed_image_moves_by_two_pixels_or_less_than_a_side(size: tuple[int, int, int], pixels: int) -> None:
    assert most_pixels(ImageContract(size, 10)) == pixels


def test_mixup_of_weight_one_is_the_identity() -> None:
    images = images_of(6, 1, 4, 4)
    assert torch.equal(mixup(images, torch.tensor(1.0)), images)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_mixup_blends_each_image_with_another_one(count: int) -> None:
    images = images_of(count, 1, 3, 3)
    mixed = mixup(images, torch.tensor(0.3)).numpy()
    for index in range(count):
        partner = (index - count // 2) % count
        assert partner != index
        expected = 0.3 * images[index].numpy() + 0.7 * images[partner].numpy()
        np.testing.assert_allclose(mixed[index], expected, rtol=1e-5, atol=1e-6)


def test_mixup_pairs_fresh_with_replayed_images_where_half_is_replayed() -> None:
    fresh, replayed = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)
    mixed = mixup(torch.cat([fresh, replayed]), torch.tensor(0.25))
    assert torch.equal(mixed[:4], torch.full((4, 1, 2, 2), 0.75))
    assert torch.equal(mixed[4:], torch.full((4, 1, 2, 2), 0.25))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_mixup_weights_are_uniform_for_the_share_of_batches_that_are_mixed(share: float) -> None:
    dice = rng()
    weights = np.array([draw_mixup(share, dice) for _ in range(2000)])
    mixed = weights[weights < 1]
    assert len(mixed) == pytest.approx(2000 * share, abs=90 if 0 < share < 1 else 0)
    if share:
        assert stats.kstest(mixed, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_dice_fall_equally_often_whether_mixed_or_not(share: float) -> None:
    """Otherwise a change of one setting would change every later draw of the run."""
    dice, other = rng(), rng()
    draw_mixup(share, dice)
    draw_mixup(0.5, other)
    assert torch.equal(dice.get_state(), other.get_state())
