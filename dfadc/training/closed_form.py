"""Closed-form start: the layers of a student that inherits, fitted to the teacher's before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfadc.networks.full_precision import full_fp32
from dfadc.student.inherit import paired_layers
from dfadc.student.regression import can_fit, fit_layers_, normalise_

if TYPE_CHECKING:
    from torch import Tensor

    from dfadc.student.build import Student
    from dfadc.student.inherit import Correspondence
    from dfadc.teacher.load import Teacher


def layers_to_fit(student: Student, teacher: Teacher) -> list[Correspondence]:
    """The student's layers that stand for a layer of the teacher; none where it is not its teacher made smaller."""
    if student.copy is None:
        return []
    return [pair for pair in paired_layers(student.module, teacher.module, student.copy) if can_fit(pair.student)]


def fit_student_(student: Student, teacher: Teacher, layers: list[Correspondence], images: Tensor) -> None:
    """Fits the student's layers on images, on the teacher's device.

    Args:
        student: that has the teacher's weights; its weights are overwritten.
        teacher: placed; left as it is.
        layers: of both.
        images: (N, C, H, W), normalised.
    """
    assert student.copy is not None, "a student that inherits is its teacher made smaller"  # noqa: S101
    device = teacher.placement.device
    student.module.to(device)
    with full_fp32(device):
        fit_layers_(student.module, teacher.module, layers, images.to(device))
        normalise_(student.module, student.copy.pairing.folded, images.to(device))


def fit_note(num_layers: int, num_images: int) -> str:
    """Note for the plan about :func:`fit_student_`."""
    images = f"{num_images:,} procedural images"
    return f"the student's {num_layers} layers are fitted to the teacher's on {images}, in closed form"
