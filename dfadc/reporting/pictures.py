"""Generated samples as pictures: PNG data for a page, and a sheet of them by the teacher's class."""

from __future__ import annotations

import base64
import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.storage import atomic_write
from dfadc.verification.agreement import ALL_SOURCES, predict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from dfadc.verification.samples import SampleSet
    from dfadc.verification.stored_images import StoredImages

#: Samples shown of each class.
PER_CLASS = 8
#: Longest side, in pixels, of a sample in a grid and of one shown alone; larger ones are averaged down.
GRID_SIDE = 48
SINGLE_SIDE = 96
#: Inches that the images are wide and a row of them is high, that a letter of a name takes, and around a name.
_SHEET, _ROW, _LETTER, _GAP = 4.62, 0.55, 0.075, 0.08

Pixels = npt.NDArray[np.uint8]


def samples_by_class(samples: SampleSet, source: str, classes: Sequence[int]) -> dict[int, npt.NDArray[np.intp]]:
    """Up to ``PER_CLASS`` indices, evenly over the set, of samples that the teacher puts into each class.

    Args:
        samples: to choose from.
        source: to choose of, or ``"all"``.
        classes: to choose for.
    """
    teacher = predict(samples.teacher_logits)
    if source != ALL_SOURCES:
        teacher[samples.source != samples.sources.index(source)] = -1
    chosen = {}
    for index in classes:
        members = np.flatnonzero(teacher == index)
        chosen[index] = members[np.linspace(0, len(members) - 1, min(PER_CLASS, len(members))).round().astype(int)]
    return chosen


def displayable(images: StoredImages) -> Pixels:
    """Stored images (N, C, H, W) as what a screen shows: (N, H, W, 3), or (N, H, W) where C is not 3.

    Pixels are shown as they are. Normalised values, whose mean and std nobody knows, are stretched from each image's
    lowest to its highest. Of channels that are neither grey nor colour the first is shown.
    """
    shown: npt.NDArray[Any] = images
    if images.dtype != np.uint8:
        values = images.astype(np.float32)
        low = values.min(axis=(1, 2, 3), keepdims=True)
        span = np.ptp(values, axis=(1, 2, 3), keepdims=True)
        shown = np.rint(255 * (values - low) / np.where(span > 0, span, 1)).astype(np.uint8)
    return np.ascontiguousarray(shown.transpose(0, 2, 3, 1) if shown.shape[1] == 3 else shown[:, 0])


def png_uri(pixels: Pixels, side: int) -> str:
    """One image (H, W) or (H, W, 3) as a ``data:`` address of a PNG no larger than ``side`` pixels."""
    stream = io.BytesIO()
    _shrunk(pixels, side).save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def write_sample_sheet(path: Path, rows: Mapping[str, Pixels]) -> None:
    """Writes a PNG with one row of images for each class; the same images give the same bytes.

    Args:
        path: of the PNG.
        rows: at least one label -> images (N, H, W) or (N, H, W, 3), N at most ``PER_CLASS`` and perhaps 0.

    Raises:
        StorageFailed: the file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - only a run's report draws

    names = [_short(label) for label in rows]
    beside = 2 * _GAP + _LETTER * max(map(len, names))
    width = beside + _SHEET
    edge = beside / width
    figure = Figure(figsize=(width, _ROW * len(rows)))
    axes = figure.add_axes((edge, 0.0, 1 - edge, 1.0))
    axes.axis("off")
    axes.imshow(_sheet(list(rows.values())), interpolation="nearest", aspect="auto")
    for number, name in enumerate(names):
        height = 1 - (number + 0.5) / len(rows)
        # Names are the user's text: `$` must not start a formula.
        figure.text(edge - _GAP / width, height, name, ha="right", va="center", fontsize=9, parse_math=False)
    with warnings.catch_warnings(), atomic_write(path) as temporary:
        # A name in a script that the font lacks is drawn as boxes; its index stands beside it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def _sheet(rows: Sequence[Pixels]) -> Pixels:
    """Images as one (H, W, 3): a row of ``PER_CLASS`` cells for each class, white where there is no image."""
    side, gap = GRID_SIDE, 2
    sheet = np.full((len(rows) * (side + gap), PER_CLASS * (side + gap), 3), 255, np.uint8)
    for i, images in enumerate(rows):
        for j, image in enumerate(images):
            cell = np.asarray(_fitted(image, side).convert("RGB"))
            top, left = i * (side + gap), j * (side + gap)
            sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return sheet


def _shrunk(pixels: Pixels, side: int) -> Image:
    """An image (H, W) or (H, W, 3), averaged down to ``side`` where it is larger."""
    return _fitted(pixels, side) if max(pixels.shape[:2]) > side else _image(pixels)


def _fitted(pixels: Pixels, side: int) -> Image:
    """The same with a longest side of ``side``: averaged down, or its pixels repeated."""
    from PIL.Image import Resampling  # noqa: PLC0415 - as above

    image = _image(pixels)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Resampling.BOX if scale < 1 else Resampling.NEAREST)


def _image(pixels: Pixels) -> Image:
    from PIL.Image import fromarray  # noqa: PLC0415 - as above

    return fromarray(pixels)


def _short(label: str, limit: int = 32) -> str:
    return label if len(label) <= limit else f"{label[: limit - 1]}…"
