"""The replay buffer and the reservoir: what they keep, how evenly they draw, and their state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from states import assert_same_state

from dfadc.contract import ImageContract
from dfadc.distillation.images.replay import ReplayBuffer, Reservoir, bounded_capacity, build_replay
from dfadc.recipe.load import load_recipe

CPU = torch.device("cpu")
SIZE = (1, 1, 1)


def numbered(*numbers: int) -> torch.Tensor:
    """Images of one pixel that tell which they are (half precision counts exactly up to 2048)."""
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1)


def contents(memory: ReplayBuffer | Reservoir) -> list[int]:
    return sorted(int(value) for value in memory.images[: len(memory)].flatten())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=50)
@given(capacity=st.integers(1, 7), batches=st.lists(st.integers(1, 20), max_size=8))
def test_the_ring_holds_the_last_images(capacity: int, batches: list[int]) -> None:
    buffer, seen = ReplayBuffer(capacity, SIZE, CPU), 0
    for batch in batches:
        buffer.push(numbered(*range(seen, seen + batch)))
        seen += batch
    assert len(buffer) == min(seen, capacity)
    assert contents(buffer) == list(range(max(0, seen - capacity), seen))


def test_the_ring_draws_evenly_and_only_what_it_holds() -> None:
    buffer = ReplayBuffer(10, SIZE, CPU)
    buffer.push(numbered(1, 2, 3, 4))
    drawn, stored = buffer.draw(4000, rng())
    assert stored.shape == (4000, 0)
    assert drawn.shape == (4000, *SIZE)
    assert drawn.dtype == torch.float32
    counts = [int((drawn == number).sum()) for number in (1, 2, 3, 4)]
    assert sum(counts) == 4000
    assert stats.chisquare(counts).pvalue > 1e-3


@settings(deadline=None, max_examples=50)
@given(capacity=st.integers(1, 7), batches=st.lists(st.integers(1, 9), max_size=6), count=st.integers(1, 9))
def test_the_newest_are_the_last_that_were_pushed(capacity: int, batches: list[int], count: int) -> None:
    buffer, seen = ReplayBuffer(capacity, SIZE, CPU), 0
    for batch in batches:
        buffer.push(numbered(*range(seen, seen + batch)))
        seen += batch
    expected = list(range(max(0, seen - min(count, capacity)), seen))
    assert buffer.newest(count).flatten().tolist() == expected


def test_what_the_ring_keeps_is_no_part_of_a_graph() -> None:
    buffer = ReplayBuffer(4, SIZE, CPU)
    buffer.push(numbered(1, 2).requires_grad_() * 2)
    assert not buffer.draw(2, rng())[0].requires_grad


def test_images_are_kept_more_finely_than_pixels() -> None:
    """A step of an 8-bit pixel is 1/255 of the range; the largest normalised values are a few units."""
    buffer = ReplayBuffer(256, SIZE, CPU)
    pixels = (torch.arange(256.0) / 255 - 0.485) / 0.229
    buffer.push(pixels.view(-1, 1, 1, 1))
    error = (buffer.images.float().flatten() - pixels).abs().max().item()
    assert error < 0.5 / 255 / 0.229


# ------------------------------------------------------------------------------------------- stored and classes


def logits_to(*classes: int, num_classes: int = 3) -> torch.Tensor:
    """Logits that tell the class."""
    return 9.0 * torch.eye(num_classes)[list(classes)]


@settings(deadline=None, max_examples=50)
@given(capacity=st.integers(1, 7), batches=st.lists(st.integers(1, 20), max_size=6), seed=st.integers(0, 99))
def test_answers_stay_with_their_images(capacity: int, batches: list[int], seed: int) -> None:
    buffer, seen = ReplayBuffer(capacity, SIZE, CPU, logit_shape=(2,)), 0
    for batch in batches:
        numbers = torch.arange(seen, seen + batch, dtype=torch.float32)
        buffer.push(numbered(*numbers.int().tolist()), torch.stack([numbers, -numbers], dim=1))
        seen += batch
    if seen:
        images, stored = buffer.draw(20, rng(seed))
        torch.testing.assert_close(stored[:, 0], images.flatten())
        torch.testing.assert_close(stored[:, 1], -images.flatten())


def test_a_balanced_draw_gives_every_class_that_is_there_the_same_chance() -> None:
    buffer = ReplayBuffer(20, SIZE, CPU, logit_shape=(4,), balanced=True)
    # One image of class 2, three of class 0, eight of class 1, none of class 3.
    classes = [2, 0, 0, 0, *[1] * 8]
    buffer.push(numbered(*range(12)), logits_to(*classes, num_classes=4))
    images, stored = buffer.draw(6000, rng())
    drawn = np.bincount(stored.argmax(dim=1).numpy(), minlength=4)
    assert drawn[3] == 0
    assert stats.chisquare(drawn[:3]).pvalue > 1e-3
    # Within a class every image has the same chance too.
    within = np.bincount(images.flatten().int().numpy(), minlength=12)[4:]
    assert stats.chisquare(within).pvalue > 1e-3


def test_a_balanced_draw_of_labels_favours_rare_states() -> None:
    """Label 0 is on in one of eleven images and off in the others; label 1 the other way round."""
    buffer = ReplayBuffer(20, SIZE, CPU, logit_shape=(2,), balanced=True, task="multilabel")
    logits = torch.tensor([[1.0, -1.0], *[[-1.0, 1.0]] * 10])
    buffer.push(numbered(*range(11)), logits)
    _, stored = buffer.draw(4000, rng())
    drawn = np.bincount((stored[:, 0] > 0).int().numpy(), minlength=2)
    assert stats.chisquare(drawn).pvalue > 1e-3


def test_a_balanced_draw_forgets_what_gave_way() -> None:
    buffer = ReplayBuffer(3, SIZE, CPU, logit_shape=(3,), balanced=True)
    buffer.push(numbered(0, 1, 2), logits_to(0, 0, 0))
    buffer.push(numbered(3, 4, 5), logits_to(1, 1, 2))
    images, stored = buffer.draw(400, rng())
    assert set(images.flatten().tolist()) == {3.0, 4.0, 5.0}
    assert set(stored.argmax(dim=1).tolist()) == {1, 2}


def test_a_buffer_goes_on_with_its_answers() -> None:
    before, after = (ReplayBuffer(5, SIZE, CPU, logit_shape=(3,), balanced=True) for _ in range(2))
    before.push(numbered(*range(7)), logits_to(0, 1, 2, 0, 1, 2, 0))
    after.load_state_dict(before.state_dict())
    for each in (before, after):
        each.push(numbered(8, 9), logits_to(1, 1))
    for one, other in zip(before.draw(9, rng(1)), after.draw(9, rng(1)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("balanced", [False, True])
def test_logits_are_stored_where_classes_are_needed(balanced: bool) -> None:
    recipe = load_recipe("auto", [f"replay.balanced={str(balanced).lower()}"])
    buffer = build_replay(recipe, ImageContract((1, 8, 8), 10), CPU)
    assert buffer.keeps_logits is buffer.balanced is balanced


def test_logits_count_for_the_memory_bound() -> None:
    bounded = bounded_capacity(10**6, (1, 8, 8), logit_shape=(1000,), most_bytes=2**20)
    assert bounded == 2**20 // (64 * 2 + 1000 * 4)


@pytest.mark.parametrize("pushed", [0, 3, 5, 12])
def test_a_buffer_goes_on_from_its_state(pushed: int) -> None:
    before, after = ReplayBuffer(5, SIZE, CPU), ReplayBuffer(5, SIZE, CPU)
    before.push(numbered(*range(pushed)))
    state = before.state_dict()
    assert len(state["images"]) == min(pushed, 5)
    before.push(numbered(100, 101))
    after.load_state_dict(state)
    after.push(numbered(100, 101))
    assert after.seen == before.seen
    assert torch.equal(after.images[: len(after)], before.images[: len(before)])


def test_a_rings_state_is_a_copy() -> None:
    buffer = ReplayBuffer(2, SIZE, CPU)
    buffer.push(numbered(1, 2))
    state = buffer.state_dict()
    buffer.push(numbered(3, 4))
    assert state["images"].flatten().tolist() == [1, 2]


def test_the_reservoir_keeps_everything_while_it_has_room() -> None:
    reservoir = Reservoir(10, SIZE, CPU)
    reservoir.offer(numbered(*range(4)), rng())
    reservoir.offer(numbered(*range(4, 10)), rng())
    assert contents(reservoir) == list(range(10))


def test_the_reservoir_never_holds_an_image_twice_nor_more_than_it_may() -> None:
    reservoir, dice = Reservoir(8, SIZE, CPU), rng()
    for start in range(0, 200, 5):
        reservoir.offer(numbered(*range(start, start + 5)), dice)
    assert reservoir.seen == 200
    assert len(set(contents(reservoir))) == len(reservoir) == 8


@pytest.mark.parametrize("batch", [1, 4, 20])
def test_the_reservoir_is_a_uniform_sample_of_the_whole_run(batch: int) -> None:
    """Every image is kept equally often, the first as the last, whatever the size of the offers."""
    offered, capacity, repeats = 20, 5, 200
    counts, dice = np.zeros(offered), rng(1)
    for _ in range(repeats):
        reservoir = Reservoir(capacity, SIZE, CPU)
        for start in range(0, offered, batch):
            reservoir.offer(numbered(*range(start, min(start + batch, offered))), dice)
        counts[contents(reservoir)] += 1
    assert counts.sum() == capacity * repeats
    # Without replacement the counts vary less than multinomial ones: the test is on the safe side.
    assert stats.chisquare(counts).pvalue > 1e-3


def test_of_two_images_a_reservoir_of_one_keeps_each_with_probability_one_half() -> None:
    dice, kept_second = rng(2), 0
    for _ in range(500):
        reservoir = Reservoir(1, SIZE, CPU)
        reservoir.offer(numbered(1), dice)
        reservoir.offer(numbered(2), dice)
        kept_second += contents(reservoir) == [2]
    assert stats.binomtest(kept_second, 500).pvalue > 1e-3


@pytest.mark.parametrize("offered", [0, 3, 50])
def test_a_reservoir_goes_on_from_its_state(offered: int) -> None:
    before, after = Reservoir(5, SIZE, CPU), Reservoir(5, SIZE, CPU)
    before.offer(numbered(*range(offered)), rng())
    after.load_state_dict(before.state_dict())
    for reservoir in (before, after):
        reservoir.offer(numbered(*range(100, 140)), rng(1))
    assert after.seen == before.seen
    assert torch.equal(after.images[: len(after)], before.images[: len(before)])


@pytest.mark.parametrize(
    ("wanted", "input_size", "mebibytes", "expected"),
    [
        (20_000, (1, 28, 28), 512, 20_000),
        (20_000, (3, 224, 224), 512, 512 * 2**20 // (3 * 224 * 224 * 2)),
        (100, (1, 1024, 512), 1, 1),
        (100, (3, 4096, 4096), 1, 1),
    ],
)
def test_the_capacity_fits_the_memory_bound(
    wanted: int, input_size: tuple[int, int, int], mebibytes: int, expected: int
) -> None:
    assert bounded_capacity(wanted, input_size, most_bytes=mebibytes * 2**20) == expected


@settings(deadline=None, max_examples=60)
@given(
    capacity=st.integers(1, 7),
    before=st.lists(st.integers(1, 9), max_size=4),
    after=st.lists(st.integers(1, 9), max_size=6),
)
def test_a_store_goes_back_to_its_mark(capacity: int, before: list[int], after: list[int]) -> None:
    dice = rng()
    for store in (ReplayBuffer(capacity, SIZE, CPU), Reservoir(capacity, SIZE, CPU)):
        number = 0
        for counts in (before, after, after):
            for count in counts:
                images = numbered(*range(number, number + count))
                number += count
                store.push(images) if isinstance(store, ReplayBuffer) else store.offer(images, dice)
            if counts is before:
                store.mark()
                marked = store.state_dict()
            else:
                store.go_back()
                assert_same_state(store.state_dict(), marked)


def test_an_image_that_is_not_finite_is_stored_as_the_one_before() -> None:
    buffer = ReplayBuffer(4, SIZE, CPU)
    buffer.push(numbered(7))
    buffer.push(torch.stack([numbered(1)[0], numbered(2)[0] * float("nan"), numbered(3)[0] * 1e30]))
    assert buffer.images.flatten().tolist() == [7, 1, 7, 7]
