"""Images with masks as --data: what is read, what does not count, what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.evaluation.masks import load_masked_images
from dfadc.preprocessing import Preprocessing
from dfadc.verification.pixel_scores import PixelScores

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONTRACT = ImageContract((1, 6, 10), 3, mean=(0.5,), std=(0.5,), task="segmentation")


def images(n: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 1, 6, 10), dtype=np.uint8)


def masks(n: int = 4) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 3, (n, 6, 10), dtype=np.uint8)


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_accuracy_and_iou_of_known_answers(tmp_path: Path) -> None:
    truth = masks()
    data = load_masked_images(write(tmp_path / "d.npz", images=images(), masks=truth), CONTRACT)
    wrong = truth.copy()
    wrong[:, 0] = (wrong[:, 0] + 1) % 3
    logits = np.eye(3, dtype=np.float32)[wrong].transpose(0, 3, 1, 2)
    parts = (logits[start : start + len(batch)] for start, batch in zip((0, 3), data.batches(3), strict=True))
    scores = PixelScores.of(data.judge(parts))
    assert scores.accuracy == pytest.approx(5 / 6)
    assert scores.n == truth.size


def test_the_ignore_label_does_not_count(tmp_path: Path) -> None:
    truth = masks()
    truth[:, :2] = 255
    data = load_masked_images(write(tmp_path / "d.npz", images=images(), masks=truth), CONTRACT)
    logits = np.zeros((4, 3, 6, 10), np.float32)
    assert PixelScores.of(data.judge([logits])).n == 4 * 4 * 10
    assert "33.3% of the pixels have the ignore label 255" in " ".join(data.notes)
    truth[truth == 255] = 7
    named = write(tmp_path / "named.npz", images=images(), masks=truth, ignore_label=7)
    assert load_masked_images(named, CONTRACT).sha256 == data.sha256
    assert PixelScores.of(data.without_borders(1).judge([logits])).n < 4 * 4 * 10


def folder_of(tmp_path: Path, *, scale: int = 1) -> Path:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index, (image, mask) in enumerate(zip(images(), masks(), strict=True)):
        size = (10 * scale, 6 * scale)
        Image.fromarray(image[0]).resize(size, Image.Resampling.NEAREST).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(mask).resize(size, Image.Resampling.NEAREST).save(tmp_path / "masks" / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("scale", [1, 3])
def test_a_folder_is_resized_without_mixing_classes(tmp_path: Path, scale: int) -> None:
    data = load_masked_images(folder_of(tmp_path, scale=scale), CONTRACT)
    np.testing.assert_array_equal(data.masks, masks())


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "images" / "2.heic").write_bytes(b"?")
    Image.new("L", (10, 6)).save(folder / "images" / "2.bmp")  # The same name as 2.png.
    assert "2 files" in load_masked_images(folder, CONTRACT).notes[-1]


def test_images_and_masks_are_cropped_alike(tmp_path: Path) -> None:
    for name, shape in (("images", (40, 90)), ("masks", (40, 90))):
        (tmp_path / name).mkdir()
        pixels = np.zeros(shape, np.uint8)
        pixels[:, 45:] = 1
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    contract = replace(CONTRACT, preprocessing=Preprocessing(crop_share=0.5, interpolation="nearest"))
    data = load_masked_images(tmp_path, contract)
    np.testing.assert_array_equal(data.masks[0], data.images[0, 0])
    with pytest.raises(DfadcError, match="no class for the frame"):
        load_masked_images(tmp_path, replace(CONTRACT, preprocessing=Preprocessing(crop_share=1.1)))


def remove(path: Path) -> None:
    (path / "masks" / "2.png").unlink()


def colour(path: Path) -> None:
    Image.new("RGB", (10, 6)).save(path / "masks" / "1.png")


def other_size(path: Path) -> None:
    Image.new("L", (11, 6)).save(path / "masks" / "1.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(remove, "no pair of image and mask for 2"), (colour, "mode RGB"), (other_size, r"mask of \(11, 6\)")],
)
def test_a_folder_whose_masks_do_not_match_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = folder_of(tmp_path)
    damage(folder)
    with pytest.raises(DfadcError, match=message):
        load_masked_images(folder, CONTRACT)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": images()}, "has no `masks`"),
        ({"images": images(), "masks": masks(3)}, r"`masks` is \(3, 6, 10\) for images \(4, 1, 6, 10\)"),
        ({"images": images(), "masks": masks()[:, :5]}, "mask of its own height and width"),
        ({"images": images(), "masks": masks() + 1}, "run from 1 to 3, the teacher has classes 0 to 2"),
        ({"images": images(), "masks": masks().astype(float)}, "expected integers"),
        ({"images": images(), "masks": np.full((4, 6, 10), 255)}, "every pixel has the ignore label"),
        ({"images": images(), "masks": masks(), "ignore_label": [1, 2]}, "`ignore_label` is"),
        ({"images": images()[:, :, :5], "masks": masks()[:, :5]}, "images are 5×10, the teacher takes 6×10"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DfadcError) as caught:
        load_masked_images(write(tmp_path / "d.npz", **arrays), CONTRACT)
    assert re.search(message, f"{caught.value.message} {caught.value.hint}")
