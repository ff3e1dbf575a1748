"""Dense answers as pictures: the image, what teacher and student see in it, and where they differ."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dfadc.reporting.pictures import PER_CLASS, SINGLE_SIDE, Pixels, displayable, png_uri

if TYPE_CHECKING:
    from dfadc.verification.pixel_samples import DenseSampleSet
    from dfadc.verification.pixel_scores import Classes

#: Scenes that a report shows of each source: the worst ones.
WORST_PER_SOURCE = 6
#: A pixel on which both agree, and one on which they do not.
AGREES, DIFFERS = (225, 225, 225), (213, 94, 0)
#: The first class is nearly always the background.
_FIRST, _NO_CLASS = (40, 40, 48), (255, 255, 255)
#: The step in hue between neighbouring classes that keeps any number of them apart.
_GOLDEN = 0.618034


@dataclass(frozen=True, slots=True)
class Scene:
    """One sample as a row of pictures.

    Args:
        index: of the sample.
        agreement: share of its pixels on which teacher and student agree.
        pictures: what each shows -> its address.
    """

    index: int
    agreement: float
    pictures: dict[str, str]


def worst_scenes(samples: DenseSampleSet) -> dict[str, list[Scene]]:
    """Of each source the samples with the lowest agreement of student and teacher, the worst first."""
    agreement = (samples.teacher.classes == samples.student.classes).mean(axis=(1, 2))
    found = {}
    for position, name in enumerate(samples.sources):
        members = np.flatnonzero(samples.source == position)
        order = members[np.argsort(agreement[members], kind="stable")][:WORST_PER_SOURCE]
        rows = paint(samples, order)
        found[name] = [
            Scene(
                int(index),
                float(agreement[index]),
                {what: png_uri(pictures[row], SINGLE_SIDE) for what, pictures in rows.items()},
            )
            for row, index in enumerate(order)
        ]
    return found


def scene_rows(samples: DenseSampleSet, source: str) -> dict[str, Pixels]:
    """Rows for :func:`dfadc.reporting.pictures.write_sample_sheet`: a few scenes of a source, evenly over it."""
    members = np.arange(len(samples))
    if source in samples.sources:
        members = np.flatnonzero(samples.source == samples.sources.index(source))
    chosen = members[np.linspace(0, len(members) - 1, min(PER_CLASS, len(members))).round().astype(int)]
    return paint(samples, chosen)


def paint(samples: DenseSampleSet, indices: npt.NDArray[np.intp]) -> dict[str, Pixels]:
    """Image, teacher, student and difference of some samples: (n, H, W) or (n, H, W, 3) each."""
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
    """(K + 1, 3) colours of the classes, and of a pixel without one."""
    hues = (index * _GOLDEN % 1 for index in range(num_classes - 1))
    # Lighter and darker in turn: neighbours in hue are told apart by more than it.
    levels = ((hue, 0.75, 0.95 if index % 2 else 0.7) for index, hue in enumerate(hues))
    colours = [_FIRST, *(tuple(255 * part for part in colorsys.hsv_to_rgb(*level)) for level in levels), _NO_CLASS]
    rounded: npt.NDArray[np.uint8] = np.rint(np.array(colours)).astype(np.uint8)
    return rounded


def legend(num_classes: int) -> list[str]:
    """The classes' colours as CSS writes them."""
    colours = class_colours(num_classes)[:num_classes].tolist()
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours]


def _coloured(classes: Classes, num_classes: int) -> Pixels:
    coloured: Pixels = class_colours(num_classes)[np.minimum(classes, num_classes)]
    return coloured
