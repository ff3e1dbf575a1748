"""Discrepancies of student and teacher: pure functions of two logit tensors, larger where they differ more.

Shapes: logits are (N, K), (N, K, H, W) for dense outputs, or (N, 2, L) of L labels (:func:`as_pairs`); the result is a
scalar, computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from dfadc.contract import Task

Discrepancy = Callable[[Tensor, Tensor], Tensor]
#: A teacher whose logits lie closer together than this is constant, and refused before training.
SMALLEST_SCALE = 1e-6


def as_pairs(logits: Tensor) -> Tensor:
    """(N, 2, L) logits [0, z] of L labels that are off or on, from those of their sigmoids (N, L).

    A softmax of two classes is a sigmoid, so every loss of ours that is a mean over pixels is then one over labels.
    """
    return torch.stack([torch.zeros_like(logits), logits], dim=1)


def l1(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean absolute difference of the logits (Fang et al. 2019, eq. 4)."""
    return functional.l1_loss(student_logits.float(), teacher_logits.float())


def log_l1(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """log(1 + L1), whose gradient fades as student and generator drift apart (Fang et al. 2019, for dense outputs)."""
    return torch.log1p(l1(student_logits, teacher_logits))


def scaled_l1(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """L1 in units of the teacher's logit scale: 1 is the value of a student that answers the mean of the classes.

    Our own, for teachers whose logits have no usual scale. The scale is :func:`logit_scale` of the same images and
    without gradient: else a generator would gain from images that the teacher answers faintly.
    """
    return l1(student_logits, teacher_logits) / logit_scale(teacher_logits.detach()).clamp_min(SMALLEST_SCALE)


def logit_scale(logits: Tensor) -> Tensor:
    """Mean absolute deviation of the logits from their mean over the classes; a scalar."""
    logits = logits.float()
    return (logits - logits.mean(dim=1, keepdim=True)).abs().mean()


def kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T² · KL(teacher ‖ student) of the softmax over classes, in nats, averaged over all other axes.

    Source: Hinton et al. 2015; the T² keeps the gradient's scale independent of T.
    """
    return _kl_of_each(student_logits, teacher_logits, temperature).mean() * temperature**2


def agree_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL where both predict the same class, 0 elsewhere, averaged over all: an adversary that stops at the border.

    Source: CMI (2105.08584) and FastDFKD (2112.06253). The mask carries no gradient.
    """
    agrees = student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)
    return (_kl_of_each(student_logits, teacher_logits, 1.0) * agrees).mean()


def _kl_of_each(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of each image, or pixel: (N,) or (N, H, W)."""
    student = functional.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, dim=1)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def _identity(logits: Tensor) -> Tensor:
    return logits


#: Forms of logits in which the axis 1 has the classes that a softmax is taken over.
AS_CLASSES: Mapping[Task, Callable[[Tensor], Tensor]] = {
    "classification": _identity,
    "multilabel": as_pairs,
    "segmentation": _identity,
}
#: Names that `generator.discrepancy` of a recipe can take.
DISCREPANCIES: dict[str, Discrepancy] = {"l1": l1, "log_l1": log_l1, "scaled_l1": scaled_l1, "agree_kl": agree_kl}
#: Those that compare logits one by one; the others compare the classes that a softmax makes of them.
_OF_LOGITS = frozenset({"l1", "log_l1"})


def compute_discrepancy(name: str, student_logits: Tensor, teacher_logits: Tensor, task: Task) -> Tensor:
    """The discrepancy that a recipe names."""
    as_classes = _identity if name in _OF_LOGITS else AS_CLASSES[task]
    return DISCREPANCIES[name](as_classes(student_logits), as_classes(teacher_logits))
