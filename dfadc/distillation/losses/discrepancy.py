"""How far the student is from the teacher: pure functions of two logit tensors, larger where they differ more.

Shapes: logits are (N, K), or (N, K, H, W) for dense outputs; the result is a scalar, computed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

Discrepancy = Callable[[Tensor, Tensor], Tensor]
#: A teacher whose logits lie closer together than this is constant, and refused before the game.
SMALLEST_SCALE = 1e-6


def l1(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean absolute difference of the logits (Fang et al. 2019, eq. 4)."""
    return functional.l1_loss(student_logits.float(), teacher_logits.float())


def log_l1(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """log(1 + L1), whose gradient fades as the players drift apart (Fang et al. 2019, for dense outputs)."""
    return torch.log1p(l1(student_logits, teacher_logits))


def scaled_l1(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """L1 in units of the teacher's logit scale: 1 is what a student that answers the mean of the classes gets.

    Our own, for teachers whose logits have no usual scale. The scale is :func:`logit_scale` of the same images and
    without gradient: else a generator would be paid for images that the teacher answers faintly.
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


def js(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T² · Jensen-Shannon divergence in nats, at most T² log 2: half of KL(p ‖ m) for each of the two, m their mean.

    Source: the competition term of adaptive DeepInversion (1912.08795), which has no T².
    """
    student = functional.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, dim=1)
    middle = torch.logaddexp(student, teacher) - math.log(2)
    to_middle = [functional.kl_div(middle, each, reduction="none", log_target=True) for each in (student, teacher)]
    return 0.5 * (to_middle[0] + to_middle[1]).sum(dim=1).mean() * temperature**2


def agree_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL where both predict the same class, 0 elsewhere, averaged over all: an adversary that stops at the border.

    Source: CMI (2105.08584) and FastDFKD (2112.06253). The mask carries no gradient.
    """
    agrees = student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)
    return (_kl_of_each(student_logits, teacher_logits, temperature) * agrees).mean() * temperature**2


def _kl_of_each(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of each image, or pixel: (N,) or (N, H, W)."""
    student = functional.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, dim=1)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


#: Those that a temperature softens.
TEMPERED: dict[str, Callable[..., Tensor]] = {"kl": kl, "js": js, "agree_kl": agree_kl}
#: Names that `generator.discrepancy` of a recipe can take.
DISCREPANCIES: dict[str, Discrepancy] = {"l1": l1, "log_l1": log_l1, "scaled_l1": scaled_l1, **TEMPERED}


def choose_discrepancy(name: str, temperature: float) -> Discrepancy:
    """The discrepancy of a name, at a temperature where it knows one."""
    return partial(TEMPERED[name], temperature=temperature) if name in TEMPERED else DISCREPANCIES[name]
