"""Which images calibrate INT8: none of the samples, none twice, evenly over classes, each source its share."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfadc.errors import DfadcError, StorageFailed
from dfadc.sampling.calibration import Calibration, choose_calibration, load_images

if TYPE_CHECKING:
    from pathlib import Path

NUM_CLASSES = 4
#: (pixel, class) of every image of a source; a pixel is an image, so few pixels make many duplicates.
SOURCE = st.lists(st.tuples(st.integers(0, 255), st.integers(0, NUM_CLASSES - 1)), max_size=80)


def image(*pixels: int) -> np.ndarray:
    """(N, 1, 1, 1), images of one pixel that tell which they are."""
    return np.array(pixels, np.uint8).reshape(-1, 1, 1, 1)


def logits(*classes: int) -> np.ndarray:
    return np.eye(NUM_CLASSES, dtype=np.float32)[list(classes)]


def choose(sources: dict[str, list[tuple[int, int]]], *exclude: int, num_images: int = 1024) -> Calibration:
    return choose_calibration(
        {name: image(*(pixel for pixel, _ in pairs)) for name, pairs in sources.items()},
        {name: logits(*(predicted for _, predicted in pairs)) for name, pairs in sources.items()},
        num_images=num_images,
        exclude=image(*exclude),
    )


def pixels(found: Calibration) -> list[int]:
    return [int(value) for value in found.images.flatten()]


def count(found: Calibration) -> dict[str, int]:
    return {name: int((found.source == index).sum()) for index, name in enumerate(found.sources)}


def wide(start: int, length: int) -> list[tuple[int, int]]:
    """``length`` different images, the classes in turn."""
    return [(start + index, index % NUM_CLASSES) for index in range(length)]


@settings(deadline=None, max_examples=150)
@given(
    drawn=st.tuples(SOURCE, SOURCE, SOURCE),
    exclude=st.lists(st.integers(0, 255), max_size=60),
    num_images=st.integers(8, 120),
)
def test_what_is_chosen(drawn: tuple[list[tuple[int, int]], ...], exclude: list[int], num_images: int) -> None:
    sources = dict(zip(("reservoir", "generator", "prior"), drawn, strict=True))
    found = choose(sources, *exclude, num_images=num_images)
    chosen = pixels(found)
    assert not set(chosen) & set(exclude)
    assert len(set(chosen)) == len(chosen) == len(found)
    # Every image is one that its source drew, under the class that the teacher gave it there.
    for pixel, source, predicted in zip(chosen, found.source, found.classes, strict=True):
        assert (pixel, predicted) in sources[found.sources[source]]
    # As many images as can be had are taken.
    there = {pixel for pairs in sources.values() for pixel, _ in pairs} - set(exclude)
    assert len(found) == min(num_images, len(there))
    again = choose(sources, *exclude, num_images=num_images)
    assert pixels(again) == chosen
    assert (again.source == found.source).all()


@settings(deadline=None, max_examples=50)
@given(num_images=st.integers(8, 60))
def test_each_source_gives_its_share_where_it_can(num_images: int) -> None:
    sources = {"reservoir": wide(0, 60), "generator": wide(60, 60), "prior": wide(120, 60)}
    found = choose(sources, num_images=num_images)
    for name, number in count(found).items():
        assert abs(number - (0.5 if name == "reservoir" else 0.25) * num_images) <= 1
    assert len(found) == num_images
    assert found.notes == ()


@settings(deadline=None, max_examples=50)
@given(of_class=st.lists(st.integers(0, 40), min_size=NUM_CLASSES, max_size=NUM_CLASSES), num_images=st.integers(8, 90))
def test_classes_are_even_and_where_one_is_short_the_others_fill_up(of_class: list[int], num_images: int) -> None:
    source = list(enumerate(predicted for predicted, number in enumerate(of_class) for _ in range(number)))
    found = choose({"reservoir": source}, num_images=num_images)
    counts = Counter(found.classes.tolist())
    most = max(counts.values(), default=0)
    assert all(counts[predicted] in (number, most, most - 1) for predicted, number in enumerate(of_class))
    assert all(counts[predicted] >= min(number, most - 1) for predicted, number in enumerate(of_class))


def test_a_short_source_is_filled_up_and_said() -> None:
    sources = {"reservoir": wide(0, 100), "generator": wide(100, 3), "prior": []}
    found = choose(sources, num_images=40)
    assert count(found) == {"reservoir": 37, "generator": 3, "prior": 0}
    assert found.notes == ("generator: 3 usable images, 10 wanted", "prior: 0 usable images, 10 wanted")


def test_no_candidates_are_no_images_and_a_note(tmp_path: Path) -> None:
    found = choose({"reservoir": [], "generator": [], "prior": []})
    assert found.notes[-1] == "0 calibration images in all, 1024 wanted"
    found.save(tmp_path / "calibration.npz")
    assert load_images(tmp_path / "calibration.npz", input_size=(1, 1, 1)).shape == (0, 1, 1, 1)


def test_an_image_that_the_teacher_cannot_answer_is_left_out() -> None:
    answers = logits(*range(NUM_CLASSES), *range(NUM_CLASSES))
    answers[5, 2] = np.nan
    found = choose_calibration(
        {"reservoir": image(*range(8))}, {"reservoir": answers}, num_images=1024, exclude=image()
    )
    assert sorted(pixels(found)) == [0, 1, 2, 3, 4, 6, 7]


def test_every_fourth_image_is_of_all_classes_and_sources() -> None:
    """What the INT8 exporter holds out must not be two classes of one source."""
    found = choose({"reservoir": wide(0, 96), "generator": wide(96, 64), "prior": wide(160, 64)}, num_images=128)
    assert set(found.classes[3::4].tolist()) == set(range(NUM_CLASSES))
    assert set(found.source[3::4].tolist()) == {0, 1, 2}


def test_the_file_holds_all_of_it_and_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    found = choose({"reservoir": wide(0, 30), "generator": wide(30, 30), "prior": wide(60, 30)}, num_images=32)
    for name in ("one.npz", "other.npz"):
        found.save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()
    assert (load_images(tmp_path / "one.npz", input_size=(1, 1, 1)) == found.images).all()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as stored:
        assert set(stored) == {"images", "source", "sources", "classes"}
        assert stored["sources"].tolist() == ["reservoir", "generator", "prior"]
        assert (stored["source"] == found.source).all()
        assert (stored["classes"] == found.classes).all()


def test_what_is_no_pool_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.npz"
    with pytest.raises(DfadcError, match="cannot read the calibration images"):
        load_images(path, input_size=(1, 1, 1))
    np.savez(path, labels=np.zeros(3))
    with pytest.raises(DfadcError, match="cannot read the calibration images"):
        load_images(path, input_size=(1, 1, 1))
    for stored, message in ((np.zeros((3, 1, 2, 2), np.uint8), r"\(1, 2, 2\)"), (np.zeros((3, 1, 1, 1)), "float64")):
        np.savez(path, images=stored)
        with pytest.raises(DfadcError, match=message):
            load_images(path, input_size=(1, 1, 1))
    with pytest.raises(StorageFailed):
        choose({"reservoir": wide(0, 9)}).save(path / "below-a-file.npz")
