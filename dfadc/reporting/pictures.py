"""Generated samples as pictures: PNG data for the page."""

from __future__ import annotations

import base64
import colorsys
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dfadc.verification.agreement import ALL_SOURCES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dfadc.verification.pixel_samples import DenseSampleSet
    from dfadc.verification.samples import SampleSet
    from dfadc.verification.stored_images import StoredImages

#: Samples shown of each class.
PER_CLASS = 8
#: Longest side, in pixels, of a sample in a grid and of one shown alone; larger ones are averaged down.
GRID_SIDE = 48
SINGLE_SIDE = 96

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
    """Up to ``PER_CLASS`` samples of each class or state of a label by the teacher, evenly over a source or all."""
    teacher = samples.teacher_classes
    if source != ALL_SOURCES:
        teacher[~samples.of_source(source)] = -1
    chosen = {}
    for index in classes:
        members = np.flatnonzero(teacher == index if teacher.ndim == 1 else teacher[:, index // 2] == index % 2)
        chosen[index] = members[np.linspace(0, len(members) - 1, min(PER_CLASS, len(members))).round().astype(int)]
    return chosen


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
    """One image (H, W) or (H, W, 3) as a ``data:`` address of a PNG, averaged down to ``side`` pixels if larger."""
    from PIL.Image import Resampling, fromarray  # noqa: PLC0415 - only a run's report draws

    image, stream = fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side), Resampling.BOX, reducing_gap=None)
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


@dataclass(frozen=True, slots=True)
class Scene:
    """One sample: share of its pixels on which teacher and student agree, and name -> ``data:`` address of pictures."""

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


def paint(samples: DenseSampleSet, indices: npt.NDArray[np.intp]) -> dict[str, Pixels]:
    """Pictures of some samples: image, teacher, student and difference; (n, H, W) or (n, H, W, 3) each."""
    teacher, student = samples.teacher.classes[indices], samples.student.classes[indices]
    colours = class_colours(samples.contract.num_classes)
    difference = np.where((teacher == student)[..., None], np.array(AGREES, np.uint8), np.array(DIFFERS, np.uint8))
    return {
        "image": displayable(samples.images[indices]),
        "teacher": colours[np.minimum(teacher, samples.contract.num_classes)],
        "student": colours[np.minimum(student, samples.contract.num_classes)],
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
