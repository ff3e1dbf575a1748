"""Closed-form start: the layers of a student that inherits, fitted to the teacher's before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dfadc.distillation.images.balanced import draw_balanced
from dfadc.networks.full_precision import full_fp32
from dfadc.student.inherit import paired_layers
from dfadc.student.regression import can_fit, fit_layers_, normalise_

if TYPE_CHECKING:
    from dfadc.student.build import Student
    from dfadc.student.inherit import Correspondence
    from dfadc.teacher.load import Teacher
    from dfadc.training.plan import NetworkFlops

#: Procedural images that layers are fitted on, and floating-point operations for it: ten seconds of a core.
MOST_IMAGES, LEAST_IMAGES, MOST_FLOPS = 4000, 64, 4e11
#: Images drawn for each that is fitted on: the teacher sees them all.
_DRAWN_FOR_EACH = 4


def fit_student_(student: Student, teacher: Teacher, flops: NetworkFlops, seed: int) -> None:
    """Fits the student's layers on procedural images of balanced classes, on the teacher's device.

    Args:
        student: that has the teacher's weights; its weights are overwritten.
        teacher: placed; left as it is.
        flops: of both, for the number of images.
        seed: of the images.
    """
    assert student.copy is not None, "a student that inherits is its teacher made smaller"  # noqa: S101
    layers = _fitted_layers(student, teacher)
    rng = torch.Generator().manual_seed(seed)
    images = draw_balanced(num_images(flops, len(layers)), teacher, rng, drawn_for_each=_DRAWN_FOR_EACH)
    device = teacher.placement.device
    student.module.to(device)
    with full_fp32(device):
        fit_layers_(student.module, teacher.module, layers, images.to(device))
        normalise_(student.module, student.copy.pairing.folded, images.to(device))


def fit_note(student: Student, teacher: Teacher, flops: NetworkFlops) -> str:
    """Note for the plan about :func:`fit_student_`."""
    num_layers = len(_fitted_layers(student, teacher))
    images = f"{num_images(flops, num_layers):,} procedural images"
    return f"the student's {num_layers} layers are fitted to the teacher's on {images}, in closed form"


def num_images(flops: NetworkFlops, num_layers: int) -> int:
    """Images that the layers can be fitted on in the time: each runs half of the student in the mean."""
    teacher, student = flops.teacher or 0, flops.student or 0
    each = (_DRAWN_FOR_EACH + 1) * teacher + num_layers / 2 * student
    return int(min(MOST_IMAGES, max(LEAST_IMAGES, MOST_FLOPS / max(1, each))))


def _fitted_layers(student: Student, teacher: Teacher) -> list[Correspondence]:
    assert student.copy is not None, "a student that inherits is its teacher made smaller"  # noqa: S101
    return [pair for pair in paired_layers(student.module, teacher.module, student.copy) if can_fit(pair.student)]
