"""Generated samples as pictures: PNG data for a page, a sheet by the teacher's class, and segmentations."""

from __future__ import annotations

import base64
import colorsys
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.storage import atomic_write
from dfadc.verification.agreement import ALL_SOURCES, predict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from dfadc.verification.pixel_samples import DenseSampleSet
    from dfadc.verification.pixel_scores import Classes
    from dfadc.verification.samples import SampleSet
    from dfadc.verification.stored_images import StoredImages

#: Samples shown of each class.
PER_CLASS = 8
#: Longest side, in pixels, of a sample in a grid and of one shown alone; larger ones are averaged down.
GRID_SIDE = 48
SINGLE_SIDE = 96
#: Inches: width of the images, height of a row, width of a letter of a name, gap around a name.
_SHEET, _ROW, _LETTER, _GAP = 4.62, 0.55, 0.075, 0.08

#: Scenes that a report shows of each source: the worst ones.
WORST_PER_SOURCE = 6
#: Colours of a pixel on which teacher and student agree, and of one on which they differ.
AGREES, DIFFERS = (225, 225, 225), (213, 94, 0)
#: Colours of the first class, nearly always the background, and of a pixel without a class.
_FIRST, _NO_CLASS = (40, 40, 48), (255, 255, 255)
#: Step in hue between neighbouring classes that keeps any number of them distinct.
_GOLDEN = 0.618034

Pixels = npt.NDArray[np.uint8]


def samples_by_class(samples: SampleSet, source: str, classes: Sequence[int]) -> dict[int, npt.NDArray[np.intp]]:
    """Up to ``PER_CLASS`` samples of each class by the teacher, evenly over the set.

    Args:
        samples: the sample set.
        source: whose samples are taken, or ``"all"``.
        classes: indices of the classes.
    """
    teacher = predict(samples.teacher_logits)
    if source != ALL_SOURCES:
        teacher[~samples.of_source(source)] = -1
    return {index: _spread(np.flatnonzero(teacher == index)) for index in classes}


def _spread(members: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """At most ``PER_CLASS`` of the members, evenly spaced."""
    positions = np.linspace(0, len(members) - 1, min(PER_CLASS, len(members))).round().astype(int)
    return np.asarray(members[positions])


def displayable(images: StoredImages) -> Pixels:
    """Displayable pixels of stored images (N, C, H, W): (N, H, W, 3), or (N, H, W) unless C is 3.

    uint8 pixels stay as they are. Normalised values of unknown mean and std are stretched from each image's lowest to
    its highest. Of channels that are neither grey nor colour the first is shown.
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


@dataclass(frozen=True, slots=True)
class Scene:
    """One sample as a row of pictures.

    Args:
        index: of the sample.
        agreement: share of its pixels on which teacher and student agree.
        pictures: name of each picture -> its ``data:`` address.
    """

    index: int
    agreement: float
    pictures: dict[str, str]


def worst_scenes(samples: DenseSampleSet) -> dict[str, list[Scene]]:
    """Each source's samples with the lowest agreement of student and teacher, the worst first."""
    agreement = (samples.teacher.classes == samples.student.classes).mean(axis=(1, 2))
    scenes = {}
    for name in samples.sources:
        members = np.flatnonzero(samples.of_source(name))
        order = members[np.argsort(agreement[members], kind="stable")][:WORST_PER_SOURCE]
        rows = paint(samples, order)
        scenes[name] = [
            Scene(
                int(index),
                float(agreement[index]),
                {title: png_uri(pictures[row], SINGLE_SIDE) for title, pictures in rows.items()},
            )
            for row, index in enumerate(order)
        ]
    return scenes


def scene_rows(samples: DenseSampleSet, source: str) -> dict[str, Pixels]:
    """Rows for :func:`write_sample_sheet`: a few scenes of a source, evenly over it."""
    mask = samples.of_source(source) if source in samples.sources else np.ones(len(samples), np.bool_)
    return paint(samples, _spread(np.flatnonzero(mask)))


def paint(samples: DenseSampleSet, indices: npt.NDArray[np.intp]) -> dict[str, Pixels]:
    """Pictures of some samples: image, teacher, student and difference; (n, H, W) or (n, H, W, 3) each."""
    teacher, student = samples.teacher.classes[indices], samples.student.classes[indices]
    num_classes = samples.contract.num_classes
    difference = np.where((teacher == student)[..., None], np.array(AGREES, np.uint8), np.array(DIFFERS, np.uint8))
    return {
        "image": displayable(samples.images[indices]),
        "teacher": _coloured(teacher, num_classes),
        "student": _coloured(student, num_classes),
        "difference": difference,
    }


def class_colours(num_classes: int) -> npt.NDArray[np.uint8]:
    """(K + 1, 3) colours of the classes, and of a pixel without a class."""
    hues = (index * _GOLDEN % 1 for index in range(num_classes - 1))
    # Lighter and darker in turn, so that neighbours in hue differ by more than it.
    levels = ((hue, 0.75, 0.95 if index % 2 else 0.7) for index, hue in enumerate(hues))
    colours = [_FIRST, *(tuple(255 * part for part in colorsys.hsv_to_rgb(*level)) for level in levels), _NO_CLASS]
    rounded: npt.NDArray[np.uint8] = np.rint(np.array(colours)).astype(np.uint8)
    return rounded


def legend(num_classes: int) -> list[str]:
    """CSS colours of the classes."""
    colours = class_colours(num_classes)[:num_classes].tolist()
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours]


def _coloured(classes: Classes, num_classes: int) -> Pixels:
    coloured: Pixels = class_colours(num_classes)[np.minimum(classes, num_classes)]
    return coloured


def _sheet(rows: Sequence[Pixels]) -> Pixels:
    """Images as one (H, W, 3): a row of ``PER_CLASS`` cells for each class; cells without an image are white."""
    side, gap = GRID_SIDE, 2
    sheet = np.full((len(rows) * (side + gap), PER_CLASS * (side + gap), 3), 255, np.uint8)
    for i, images in enumerate(rows):
        for j, image in enumerate(images):
            cell = np.asarray(_fitted(image, side).convert("RGB"))
            top, left = i * (side + gap), j * (side + gap)
            sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return sheet


def _shrunk(pixels: Pixels, side: int) -> Image:
    """An image (H, W) or (H, W, 3), averaged down to ``side`` if it is larger."""
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
