"""Images drawn by rule: in range, reproducible, and as varied as they are said to be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfadc.contract import ImageContract
from dfadc.distillation.images import procedural
from dfadc.distillation.images.procedural import draw_procedural

GREY = ImageContract((1, 28, 28), 10, mean=(0.3,), std=(0.4,))
COLOUR = ImageContract((3, 24, 32), 10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
UNKNOWN = ImageContract((2, 9, 5), 10)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("contract", [GREY, COLOUR, UNKNOWN])
def test_images_fill_the_value_range_and_never_leave_it(contract: ImageContract) -> None:
    images = draw_procedural(400, contract, rng())
    assert images.shape == (400, *contract.input_size)
    assert images.dtype == torch.float32
    low, high = (torch.tensor(bound) for bound in contract.value_range())
    torch.testing.assert_close(images.amin(dim=(0, 2, 3)), low)
    torch.testing.assert_close(images.amax(dim=(0, 2, 3)), high)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 9),
    size=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0),
)
def test_any_number_of_any_size_is_finite(count: int, size: tuple[int, int, int], seed: int) -> None:
    contract = ImageContract(size, 2)
    images = draw_procedural(count, contract, rng(seed % 2**32))
    assert images.shape == (count, *size)
    assert images.isfinite().all()


def test_the_same_dice_draw_the_same_images_and_others_do_not() -> None:
    torch.manual_seed(5)
    first = draw_procedural(16, GREY, rng(1))
    torch.manual_seed(6)
    assert torch.equal(first, draw_procedural(16, GREY, rng(1)))
    assert not torch.equal(first, draw_procedural(16, GREY, rng(2)))
    assert len({image.numpy().tobytes() for image in first}) == 16


def test_images_are_smooth_as_photographs_are() -> None:
    """Neighbouring pixels are alike, in white noise they are not."""
    images = draw_procedural(500, GREY, rng())
    varied = images[images.flatten(1).std(dim=1) > 0.05]
    left, right = varied[..., :-1].flatten(1), varied[..., 1:].flatten(1)
    correlations = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(left, right, strict=True)])
    assert 0.6 < correlations.nanmedian() < 0.99  # an edge along the border leaves nothing to correlate


@pytest.fixture
def _leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procedural, "_STROKES_SHARE", 0.0)


def test_strokes_are_thin_bright_and_on_black_for_the_most_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procedural, "_STROKES_SHARE", 1.0)
    images = draw_procedural(400, GREY, rng())
    pixels = images * GREY.std[0] + GREY.mean[0]  # type: ignore[index]
    on_black = pixels[(pixels == 0).flatten(1).float().mean(dim=1) > 0.5]
    assert 0.55 < len(on_black) / 400 < 0.85
    assert (on_black.flatten(1).amax(dim=1) > 0.55).float().mean() > 0.95
    inked = (on_black > 0.3).flatten(1).float().mean(dim=1)
    assert 0.03 < inked.median() < 0.25  # a written digit of 28 px covers an eighth
    # In one piece, for the most part, and longer than broad: further from end to end than an area so large is across.
    rows, columns = ((on_black > 0.3).any(dim=axis).squeeze(1).sum(dim=1) for axis in (3, 2))
    assert (torch.maximum(rows, columns) > 1.3 * (inked * 28**2).sqrt()).float().mean() > 0.6


@pytest.mark.usefixtures("_leaves_alone")
def test_single_objects_on_black_and_mirror_images_come_up() -> None:
    images = draw_procedural(1000, GREY, rng())
    black = images.amin()
    is_on_black = ((images == black).flatten(1).float().mean(dim=1) > 0.5).float().mean()
    assert 0.15 < is_on_black < 0.5
    # Outlines are mirrored, textures are not.
    varied = images[images.flatten(1).std(dim=1) > 0.05].flatten(1)
    mirrored = varied.view(-1, 28, 28).flip(2).flatten(1)
    alike = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(varied, mirrored, strict=True)])
    assert 0.2 < (alike > 0.8).float().mean() < 0.6


@pytest.mark.usefixtures("_leaves_alone")
def test_edges_are_upright_or_level_more_often_than_oblique() -> None:
    """Of the images whose structure tensor has one direction; by chance a quarter would, and the grid adds some."""
    images = draw_procedural(2000, GREY, rng())
    down = images[..., 2:, 1:-1] - images[..., :-2, 1:-1]
    across = images[..., 1:-1, 2:] - images[..., 1:-1, :-2]
    pairs = ((across, across), (down, down), (across, down))
    xx, yy, xy = ((first * second).sum((1, 2, 3)) for first, second in pairs)
    has_direction = torch.hypot(xx - yy, 2 * xy) > 0.4 * (xx + yy)
    angle = torch.atan2(2 * xy, xx - yy)[has_direction].abs() / 2
    leaning = torch.minimum(angle, torch.pi / 2 - angle)
    assert len(leaning) > 100
    assert (leaning < torch.pi / 16).float().mean() > 0.6


def test_colours_differ_by_channel() -> None:
    images = draw_procedural(100, COLOUR, rng())
    pixels = images * torch.tensor(COLOUR.std).view(-1, 1, 1) + torch.tensor(COLOUR.mean).view(-1, 1, 1)
    is_grey = (pixels.amax(dim=1) - pixels.amin(dim=1)).flatten(1).amax(dim=1) < 0.02
    assert is_grey.float().mean() < 0.1
