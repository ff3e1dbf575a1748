"""Samples as pictures: pixels are shown as they are, anything else so that it can be seen."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from report_material import make_samples

from dfadc.reporting.pictures import (
    PER_CLASS,
    displayable,
    png_uri,
    samples_by_class,
)


def decoded(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_out_as_they_went_in(channels: int) -> None:
    images = make_samples(shape=(channels, 8, 6)).images
    shown = displayable(images)
    expected = images[:, 0] if channels == 1 else images.transpose(0, 2, 3, 1)
    assert (shown == expected).all()
    assert (decoded(png_uri(shown[3], 48)) == expected[3]).all()


def test_normalised_values_are_stretched_image_by_image() -> None:
    values = np.zeros((2, 1, 2, 2), np.float16)
    values[0] = [[-7.0, 0.0], [3.5, 7.0]]
    shown = displayable(values)
    assert shown[0].tolist() == [[0, 128], [191, 255]]
    assert shown[1].tolist() == [[0, 0], [0, 0]], "an image of one value is not divided by zero"


def test_of_other_channels_the_first_is_shown() -> None:
    images = make_samples(shape=(4, 8, 8)).images
    assert (displayable(images) == images[:, 0]).all()


def test_a_large_image_is_averaged_down() -> None:
    large = np.zeros((96, 48), np.uint8)
    large[:, 24:] = 200
    small = decoded(png_uri(large, 24))
    assert small.shape == (24, 12)
    assert small[0].tolist() == [0] * 6 + [200] * 6


def test_samples_of_a_class_are_the_teachers_and_of_the_source() -> None:
    samples = make_samples()
    teacher = samples.teacher_logits.argmax(axis=1)
    for index, chosen in samples_by_class(samples, "snapshots", range(6)).items():
        assert 0 < len(chosen) <= PER_CLASS
        assert len(set(chosen.tolist())) == len(chosen)
        assert (teacher[chosen] == index).all()
        assert (samples.source[chosen] == 1).all()
    everywhere = samples_by_class(samples, "all", [0])[0]
    assert len(set(samples.source[everywhere].tolist())) > 1


def test_a_class_without_samples_has_none() -> None:
    empty = make_samples(counts=(0, 0, 0, 0))
    assert [len(chosen) for chosen in samples_by_class(empty, "all", range(6)).values()] == [0] * 6
