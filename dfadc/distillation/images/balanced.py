"""Procedural images of the classes that a teacher sees in them, as evenly as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dfadc.distillation.images.class_order import class_order, classes_to_balance
from dfadc.distillation.images.procedural import draw_procedural

if TYPE_CHECKING:
    from torch import Tensor

    from dfadc.teacher.load import Teacher

#: Images that are drawn for each that is taken.
DRAWN_FOR_EACH = 8


@torch.no_grad()
def draw_balanced(
    count: int,
    teacher: Teacher,
    rng: torch.Generator,
    *,
    drawn_for_each: int = DRAWN_FOR_EACH,
) -> Tensor:
    """Procedural images, of which those are kept that make the classes even; they are drawn several times over.

    Args:
        count: N.
        teacher: where it answers every pixel, images have no class, and none are chosen.
        rng: on the CPU.
        drawn_for_each: images drawn for each that is kept.

    Returns:
        (N, C, H, W) in the contract's value range, on the CPU.
    """
    if teacher.contract.is_dense:
        return draw_procedural(count, teacher.contract, rng)
    kept = torch.empty(0, *teacher.contract.input_size)
    logits = torch.empty(0, teacher.contract.num_classes)
    for _ in range(drawn_for_each if count else 0):
        drawn = draw_procedural(count, teacher.contract, rng)
        kept = torch.cat([kept, drawn])
        logits = torch.cat([logits, teacher.logits(drawn, in_fp32=True).float().cpu()])
        chosen = class_order(classes_to_balance(logits.numpy(), teacher.contract.task))[:count]
        kept, logits = kept[chosen], logits[chosen]
    return kept
