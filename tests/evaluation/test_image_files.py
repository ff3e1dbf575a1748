"""Image files as the teacher's images were made: torchvision's pixels, upright, of the formats that are meant."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import models
from torchvision.transforms import InterpolationMode, functional

from dfadc.contract import ImageContract
from dfadc.evaluation import image_files
from dfadc.evaluation.image_files import open_image, read_image
from dfadc.evaluation.labelled_images import load_evaluation_data
from dfadc.networks.names import documented_contract
from dfadc.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TWO = ImageContract((3, 8, 8), 2, mean=(0.0,) * 3, std=(1.0,) * 3, class_names=("cat", "dog"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Scikit-learn's two, and parts of them of other proportions, as files without loss."""
    china, flower = load_sample_images().images
    folder = tmp_path_factory.mktemp("photographs")
    paths = []
    for index, pixels in enumerate((china, flower, china[:, :301], flower[7:188, ::-1], china[:67, :43])):
        paths.append(folder / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def by_torchvision(path: Path, resize: int | Sequence[int], crop: Sequence[int], interpolation: str) -> np.ndarray:
    with Image.open(path) as image:
        size = [resize] if isinstance(resize, int) else list(resize)
        resized = functional.resize(image.convert("RGB"), size, InterpolationMode(interpolation))
        return np.asarray(functional.center_crop(resized, list(crop))).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("resize", "crop", "interpolation"),
    [
        (256, 224, "bilinear"),
        (232, 224, "bilinear"),
        (246, 224, "bicubic"),
        (342, 299, "bilinear"),
        (518, 518, "bicubic"),
        (33, 32, "lanczos"),
        (32, 32, "box"),
        (45, 40, "nearest"),
        (194, 224, "bicubic"),  # A frame of black, as of timm's crop_pct 1.15.
        ((256, 256), 224, "bicubic"),
    ],
)
def test_pixels_are_torchvisions(
    resize: int | tuple[int, int], crop: int, interpolation: str, photographs: list[Path]
) -> None:
    squash = not isinstance(resize, int)
    share = crop / (resize if isinstance(resize, int) else resize[0])
    preprocessing = Preprocessing.from_dict(
        {"resize": "squash" if squash else "cover", "crop_share": share, "interpolation": interpolation}
    )
    contract = ImageContract((3, crop, crop), 2, preprocessing=preprocessing)
    for path in photographs:
        expected = by_torchvision(path, resize, (crop, crop), interpolation)
        np.testing.assert_array_equal(read_image(path, contract), expected, err_msg=path.name)


def test_an_oblong_size_is_squashed_as_by_torchvision(photographs: list[Path]) -> None:
    contract = ImageContract((3, 48, 80), 2, preprocessing=Preprocessing("squash", 1.0, "bicubic"))
    for path in photographs:
        np.testing.assert_array_equal(read_image(path, contract), by_torchvision(path, (48, 80), (48, 80), "bicubic"))


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b1", "inception_v3", "swin_t", "vit_h_14"])
def test_documented_weights_are_asked_as_torchvision_asks_them(name: str, photographs: list[Path]) -> None:
    documented = documented_contract(f"torchvision:{name}")
    contract = replace(documented, task="classification").complete()
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    for path in photographs[:2]:
        crop = (transforms.crop_size[0],) * 2
        expected = by_torchvision(path, transforms.resize_size[0], crop, transforms.interpolation.value)
        np.testing.assert_array_equal(read_image(path, contract), expected)


def test_nothing_known_is_bilinear_over_the_whole_size(photographs: list[Path]) -> None:
    contract = ImageContract((3, 64, 64), 2)
    np.testing.assert_array_equal(
        read_image(photographs[0], contract), by_torchvision(photographs[0], 64, (64, 64), "bilinear")
    )
    tall = ImageContract((3, 96, 32), 2)
    assert read_image(photographs[0], tall).shape == (3, 96, 32)


def test_bgr_is_the_same_image_with_its_channels_turned(photographs: list[Path]) -> None:
    contract = ImageContract((3, 64, 64), 2)
    turned = replace(contract, preprocessing=Preprocessing(channel_order="BGR"))
    np.testing.assert_array_equal(read_image(photographs[1], turned), read_image(photographs[1], contract)[::-1])


UPRIGHT = np.zeros((6, 4, 3), np.uint8)
UPRIGHT[0, 0], UPRIGHT[0, 3], UPRIGHT[5, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
#: EXIF orientation -> pixels as a camera stores them, so that they are UPRIGHT when shown; by the standard's words for
#: the side of the picture at which the 0th row and the 0th column of the file lie.
STORED = {
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, top
    6: UPRIGHT[:, ::-1].transpose(1, 0, 2),  # right, top
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: UPRIGHT[::-1].transpose(1, 0, 2),  # left, bottom
}


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    stored.save(path, exif=exif, lossless=True)
    with open_image(path) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), UPRIGHT)


def test_damaged_exif_loses_no_image(tmp_path: Path) -> None:
    Image.fromarray(UPRIGHT).save(tmp_path / "image.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=95)
    with open_image(tmp_path / "image.jpg") as image:
        assert image.size == (4, 6)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\n%%EOF\n"


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
def test_no_program_is_started(name: str, tmp_path: Path) -> None:
    """A Ghostscript that leaves a trace: Pillow would start it for PostScript, whatever the file is named."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    (tmp_path / name).write_bytes(POSTSCRIPT)
    program = f"""
from pathlib import Path
from dfadc.contract import ImageContract
from dfadc.evaluation.image_files import READ_ERRORS, read_image
try:
    read_image(Path({str(tmp_path / name)!r}), ImageContract((3, 8, 8), 2))
except READ_ERRORS as exc:
    print(exc)
"""
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "cannot identify image file" in done.stdout
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("module", "name", "bound", "readable"),
    [
        (image_files, "MAX_PIXELS", 63, False),
        (image_files, "MAX_PIXELS", 64, True),
        (Image, "MAX_IMAGE_PIXELS", 40, True),  # Pillow warns from here on, and refuses from twice that on.
        (Image, "MAX_IMAGE_PIXELS", 31, False),
    ],
)
def test_large_images_are_bounded_before_they_are_decoded(
    module: object, name: str, bound: int, readable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, bound)
    path = tmp_path / "small.png"
    Image.new("L", (8, 8)).save(path)
    if readable:
        assert read_image(path, TWO).shape == (3, 8, 8)
        return
    path.write_bytes(path.read_bytes()[:60])  # What is refused by its size is refused before its pixels are missed.
    with pytest.raises((ValueError, Image.DecompressionBombError), match="pixels"):
        read_image(path, TWO)


def test_a_folder_says_what_it_did_and_what_it_passed_over(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8), (9, 1, 2)).save(tmp_path / "cat" / "0.png")
    (tmp_path / "cat" / "1.heic").write_bytes(b"?")
    (tmp_path / "cat" / "labels.csv").write_bytes(b"?")
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"?")
    Image.new("RGB", (8, 8)).save(tmp_path / "above.png")
    notes = "\n".join(load_evaluation_data(tmp_path, TWO).notes)
    assert "1 class folders hold no images: dog" in notes
    assert "3 files" in notes
    assert all(name in notes for name in ("1.heic", "labels.csv", "above.png"))
    assert "DS_Store" not in notes
    assert "the teacher's own preprocessing is unknown" in notes
    assert "shorter side to 8 px (bilinear), centre 8x8" in notes
    known = replace(TWO, preprocessing=Preprocessing(crop_share=0.8, interpolation="bicubic"))
    notes = "\n".join(load_evaluation_data(tmp_path, known).notes)
    assert "are preprocessed as the teacher's own: shorter side to 10 px (bicubic), centre 8x8" in notes


@pytest.mark.parametrize(("highest", "noted"), [(1, True), (2, False)])
def test_images_of_zeros_and_ones_are_noted(highest: int, noted: bool, tmp_path: Path) -> None:
    images = np.zeros((4, 3, 8, 8), np.uint8)
    images[0, 0, 0, 0] = highest
    np.savez(tmp_path / "test.npz", images=images, labels=[0, 1, 0, 1])
    notes = load_evaluation_data(tmp_path / "test.npz", TWO).notes
    assert any("only 0 and 1 in uint8" in note for note in notes) == noted


def test_a_gif_of_another_name_is_read(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(UPRIGHT).save(stream, "GIF")
    (tmp_path / "image.png").write_bytes(stream.getvalue())
    assert read_image(tmp_path / "image.png", TWO).shape == (3, 8, 8)
