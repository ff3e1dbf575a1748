"""Image files as pixels: few formats, bounded size, upright, with the teacher's own preprocessing."""

from __future__ import annotations

import struct
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfadc.errors import some_of
from dfadc.preprocessing import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from dfadc.contract import ImageContract

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
#: Pillow's decoders for them. It chooses by a file's bytes, and others start programs: Ghostscript for PostScript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: Pixels of one file: 3 bytes each while it is decoded.
MAX_PIXELS = 2**27
#: Pillow reports a damaged file by any of these, depending on the format and on where the damage lies.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
MODES = {1: "L", 3: "RGB"}
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Decodes an image file and turns it upright by its EXIF orientation.

    Raises:
        OSError, SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError: it cannot be decoded, is of
            another format or too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # The bound is ours.
        warnings.simplefilter("ignore", UserWarning)  # Of damaged metadata, which the pixels do without.
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
            image.load()  # A TIFF is upright, and without the tag, from here on.
            turn = _UPRIGHT.get(_orientation(image))
            upright = image if turn is None else image.transpose(turn)
    with upright:
        yield upright


def read_image(path: Path, contract: ImageContract) -> npt.NDArray[np.uint8]:
    """One image file as (C, H, W) uint8, with the contract's preprocessing.

    Raises:
        OSError, SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError: as :func:`open_image`.
    """
    with open_image(path) as image:
        return as_network_takes(image, contract)


def as_network_takes(image: Image.Image, contract: ImageContract) -> npt.NDArray[np.uint8]:
    """A decoded image as (C, H, W) uint8, with the contract's preprocessing.

    Raises:
        ValueError: it has more than 8 bits a channel.
    """
    channels, height, width = contract.input_size
    preprocessing = contract.preprocessing or UNKNOWN
    if image.mode.startswith(("I", "F")):  # Pillow would clip these to 0..255 in silence.
        raise ValueError(f"pixel mode {image.mode}, more than 8 bits a channel")
    # A palette with transparency has no direct way to RGB in Pillow.
    pixels = image.convert("RGBA") if "transparency" in image.info else image
    pixels = pixels.convert(MODES[channels])
    resampling = Image.Resampling[preprocessing.interpolation.upper()]
    array = np.asarray(fit_to_size(pixels, contract, resampling), np.uint8).reshape(height, width, channels)
    return (array[..., ::-1] if preprocessing.channel_order == "BGR" else array).transpose(2, 0, 1)


def preprocessing_note(contract: ImageContract) -> str:
    """One sentence on the preprocessing of image files."""
    crop = contract.input_size[1:]
    if contract.preprocessing is not None:
        return f"images are preprocessed as the teacher's own: {contract.preprocessing.describe(crop)}"
    return (
        f"the teacher's own preprocessing is unknown, images are preprocessed so: {UNKNOWN.describe(crop)}; a "
        "teacher.toml beside it may hold [preprocessing]"
    )


def unread_notes(folder: Path, taken: Collection[Path]) -> tuple[str, ...]:
    """A note on the files below ``folder`` that are not among those ``taken``; hidden ones do not count."""
    left = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path not in taken)
    names = sorted(str(path) for path in left if not any(part.startswith(".") for part in path.parts))
    if not names:
        return ()
    return (f"{len(names)} files in {folder} are not read, for their suffix, name or place: {some_of(names)}",)


def fit_to_size(pixels: Image.Image, contract: ImageContract, resampling: Image.Resampling) -> Image.Image:
    """Resizes and centre-crops by the contract's preprocessing; equal to torchvision's transforms."""
    _, height, width = contract.input_size
    size = (contract.preprocessing or UNKNOWN).resized(*pixels.size, crop=(height, width))
    if size != pixels.size:
        pixels = pixels.resize(size, resampling)
    left, top = _offset(size[0], width), _offset(size[1], height)
    return pixels.crop((left, top, left + width, top + height))


def _offset(side: int, crop: int) -> int:
    """First pixel of torchvision's CenterCrop; below 0 if it frames a smaller image in black."""
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, if it is missing or damaged: the pixels are sound all the same."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (*READ_ERRORS, KeyError, TypeError):
        return 1
