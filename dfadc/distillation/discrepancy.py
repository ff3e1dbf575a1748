"""How far the student is from the teacher: pure functions of two logit tensors, larger where they differ more.

Shapes: logits are (N, K), or (N, K, H, W) for dense outputs; the result is a scalar, computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Discrepancy = Callable[[Tensor, Tensor], Tensor]


def l1(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean absolute difference of the logits (Fang et al. 2019, eq. 4)."""
    return functional.l1_loss(student_logits.float(), teacher_logits.float())


def log_l1(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """log(1 + L1), whose gradient fades as the players drift apart (Fang et al. 2019, for dense outputs)."""
    return torch.log1p(l1(student_logits, teacher_logits))


def kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T² · KL(teacher ‖ student) of the softmax over classes, in nats, averaged over all other axes.

    Source: Hinton et al. 2015; the T² keeps the gradient's scale independent of T.
    """
    student = functional.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, dim=1)
    divergence = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    return divergence.mean() * temperature**2


#: Names that `generator.discrepancy` of a recipe can take.
DISCREPANCIES: dict[str, Discrepancy] = {"l1": l1, "log_l1": log_l1, "kl": kl}
