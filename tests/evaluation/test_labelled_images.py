"""Labelled images for evaluation: what fits is read exactly, what does not is refused with the way out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.evaluation.image_files import read_image
from dfadc.evaluation.image_folder import match_classes
from dfadc.evaluation.labelled_images import EvaluationData, load_evaluation_data

if TYPE_CHECKING:
    from pathlib import Path

GREY = ImageContract((1, 8, 8), 3, mean=(0.25,), std=(0.5,))
COLOUR = ImageContract(
    (3, 8, 8), 3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), class_names=("cat", "dog", "T-shirt/top")
)


def pixels(*shape: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def save_npz(folder: Path, images: npt.NDArray[Any], labels: object = (0, 1, 2, 0)) -> Path:
    path = folder / "test.npz"
    np.savez(path, images=images, labels=np.asarray(labels))
    return path


def save_images(folder: Path, classes: tuple[str, ...], mode: str = "RGB") -> None:
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new(mode, (8, 8), 40 * index if mode == "L" else (40 * index, 1, 2)).save(
                folder / name / f"{number}.png"
            )


def all_images(data: EvaluationData) -> npt.NDArray[np.float32]:
    return np.concatenate(list(data.batches(3)))


def test_uint8_npz_is_normalised(tmp_path: Path) -> None:
    images = pixels(4, 3, 8, 8)
    data = load_evaluation_data(save_npz(tmp_path, images), COLOUR)
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (COLOUR.mean, COLOUR.std))
    assert all_images(data).dtype == np.float32
    np.testing.assert_allclose(all_images(data), (images / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    assert (list(data.labels), len(data)) == ([0, 1, 2, 0], 4)
    assert [len(batch) for batch in data.batches(3)] == [3, 1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_npz_is_the_same_as_its_pixels(dtype: type[np.floating[Any]], tmp_path: Path) -> None:
    images = pixels(4, 8, 8)
    expected = all_images(load_evaluation_data(save_npz(tmp_path, images), GREY))
    data = load_evaluation_data(save_npz(tmp_path, (images / 255).astype(dtype)), GREY)
    np.testing.assert_allclose(all_images(data), expected, atol=2e-3 if dtype is np.float16 else 1e-5)


def test_grey_images_need_no_channel_axis(tmp_path: Path) -> None:
    images = pixels(4, 8, 8)
    flat = all_images(load_evaluation_data(save_npz(tmp_path, images), GREY))
    np.testing.assert_array_equal(flat, all_images(load_evaluation_data(save_npz(tmp_path, images[:, None]), GREY)))


@pytest.mark.parametrize(
    ("images", "message", "hint"),
    [
        (pixels(4, 8, 8, 3), "looks like N×H×W×C", "transpose"),
        (pixels(4, 1, 8, 8), "1 channel.*takes 3", "convert"),
        (pixels(4, 8, 8), "1 channel.*takes 3", "convert"),
        (pixels(4, 3, 9, 7), "9×7, the teacher takes 8×8", "resize"),
        (pixels(4, 8), "expected N×C×H×W", "holds"),
        (pixels(0, 3, 8, 8), "`images` is empty", "holds"),
        (np.uint8(3), "`images` is empty", "holds"),
        (pixels(4, 3, 8, 8).astype(np.int64), "dtype int64", "uint8"),
        (pixels(4, 3, 8, 8).astype(np.float32), "float images run from 0 to 255", "divide"),
        (np.full((4, 3, 8, 8), -0.5), "run from -0.5", "undo a normalisation"),
        (np.full((4, 3, 8, 8), np.nan), "run from nan", "divide"),
        (np.array([object()]), "cannot be read", "holds"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Any, message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match=message) as caught:
        load_evaluation_data(save_npz(tmp_path, images), COLOUR)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, 1, 2), "`labels` is"),
        (((0,), (1,), (2,), (0,)), "`labels` is"),
        ((0.0, 1.0, 2.0, 0.0), "expected integers"),
        ((0, 1, 2, 3), "labels run from 0 to 3, the teacher has classes 0 to 2"),
        ((-1, 1, 2, 0), "labels run from -1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match=message):
        load_evaluation_data(save_npz(tmp_path, pixels(4, 3, 8, 8), labels), COLOUR)


def test_missing_arrays_and_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=pixels(4, 3, 8, 8), targets=np.zeros(4, int))
    with pytest.raises(DfadcError, match=r"no `labels` \(found: images, targets\)"):
        load_evaluation_data(tmp_path / "x.npz", COLOUR)
    with pytest.raises(DfadcError, match="does not exist"):
        load_evaluation_data(tmp_path / "absent", COLOUR)
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(DfadcError, match=r"neither a folder nor an \.npz"):
        load_evaluation_data(tmp_path / "text.npz", COLOUR)
    whole = save_npz(tmp_path, pixels(4, 3, 8, 8)).read_bytes()
    (tmp_path / "damaged.npz").write_bytes(whole[:100] + b"\0" * 64 + whole[164:])
    with pytest.raises(DfadcError, match="cannot be read"):
        load_evaluation_data(tmp_path / "damaged.npz", COLOUR)


def test_unknown_mean_and_std_name_the_flags(tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match="mean and std") as caught:
        load_evaluation_data(tmp_path, replace(GREY, mean=None, std=None))
    assert "--mean and --std" in caught.value.hint


def test_segmentation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match="segmentation"):
        load_evaluation_data(tmp_path, replace(GREY, task="segmentation"))


def test_folders_are_matched_by_class_name_without_case(tmp_path: Path) -> None:
    save_images(tmp_path, ("T-Shirt_Top", "CAT"))
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.txt").write_text("not a class")
    data = load_evaluation_data(tmp_path, COLOUR)
    assert sorted(data.labels) == [0, 0, 2, 2]
    assert {int(label): int(image[0, 0, 0]) for image, label in zip(data.images, data.labels, strict=True)} == {
        2: 0,
        0: 40,
    }
    assert data.notes[:2] == ("2 folders matched to classes by name", "1 classes have no folder: dog")


def test_folders_without_class_names_are_taken_in_sorted_order(tmp_path: Path) -> None:
    save_images(tmp_path, ("b", "c", "a"), mode="L")
    data = load_evaluation_data(tmp_path, GREY)
    assert {int(label): int(image[0, 0, 0]) for image, label in zip(data.images, data.labels, strict=True)} == {
        0: 80,
        1: 0,
        2: 40,
    }
    assert "0 = a, 1 = b, 2 = c" in data.notes[0]


def test_folders_that_fit_no_class_are_named() -> None:
    with pytest.raises(DfadcError, match=r"1 folder\(s\) fit no class of the teacher: horse"):
        match_classes(["cat", "horse"], COLOUR)
    with pytest.raises(DfadcError, match="do not name one class each: Cat, cat"):
        match_classes(["Cat", "cat"], COLOUR)
    with pytest.raises(DfadcError, match="do not name one class each: crane"):
        match_classes(["crane"], replace(COLOUR, class_names=("crane", "crane", "x")))
    with pytest.raises(DfadcError, match="2 class folders, the teacher 3 classes"):
        match_classes(["a", "b"], GREY)


def test_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DfadcError, match="holds no folders"):
        load_evaluation_data(tmp_path, COLOUR)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DfadcError, match="holds no images"):
        load_evaluation_data(tmp_path, COLOUR)


def test_unreadable_images_are_skipped_counted_and_named(tmp_path: Path) -> None:
    save_images(tmp_path, ("cat", "dog"))
    (tmp_path / "cat" / "broken.png").write_bytes(b"not an image")
    whole = (tmp_path / "dog" / "0.png").read_bytes()
    (tmp_path / "dog" / "cut.png").write_bytes(whole[:40])
    (tmp_path / "dog" / "empty.jpg").write_bytes(b"")
    data = load_evaluation_data(tmp_path, COLOUR)
    assert sorted(data.labels) == [0, 0, 1, 1]
    assert "3 of 7 images" in data.notes[-1]
    assert all(name in data.notes[-1] for name in ("broken.png", "cut.png", "empty.jpg"))


def test_nothing_but_unreadable_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for number in range(7):
        (tmp_path / "cat" / f"{number}.png").write_bytes(b"junk")
    with pytest.raises(DfadcError, match=r"7 of 7 images .* cannot be read: .*and 2 more"):
        load_evaluation_data(tmp_path, COLOUR)


def test_two_channels_have_no_image_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(DfadcError, match="the teacher takes 2") as caught:
        load_evaluation_data(tmp_path, ImageContract((2, 8, 8), 2, mean=(0.5, 0.5), std=(1.0, 1.0)))
    assert ".npz" in caught.value.hint


def test_images_are_resized_to_cover_and_cropped_at_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200  # Only the centre 16×16 is left after the crop.
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", COLOUR) == 200).mean() > 0.7
    tall = ImageContract((3, 12, 6), 3, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert read_image(tmp_path / "wide.png", tall).shape == (3, 12, 6)


def test_an_image_of_the_right_size_is_untouched(tmp_path: Path) -> None:
    image = pixels(8, 8, 3)
    Image.fromarray(image).save(tmp_path / "exact.png")
    np.testing.assert_array_equal(read_image(tmp_path / "exact.png", COLOUR), image.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("contract", [GREY, COLOUR])
def test_channels_are_converted(mode: str, contract: ImageContract, tmp_path: Path) -> None:
    path = tmp_path / "image.tiff"
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).convert(mode).save(path)
    assert (read_image(path, contract) == 255).all()


def test_a_palette_with_transparency_is_read(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(8, 8)).convert("P")
    image.save(tmp_path / "image.png", transparency=bytes(range(256)))
    assert read_image(tmp_path / "image.png", COLOUR).shape == (3, 8, 8)


def test_sixteen_bit_images_are_not_clipped_in_silence(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        read_image(tmp_path / "deep.png", GREY)
