"""Procedural images of the classes that a teacher sees in them, as evenly as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dfadc.distillation.images.class_order import class_order
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
    surest: bool = False,
) -> Tensor:
    """Procedural images, of which those are kept that make the classes even; they are drawn several times over.

    Args:
        count: N.
        teacher: a classifier.
        rng: on the CPU.
        drawn_for_each: images drawn for each that is kept.
        surest: of each class those are kept where the teacher's largest logit leads the second by most, instead of the
            first ones.

    Returns:
        (N, C, H, W) in the contract's value range, on the CPU.
    """
    kept = torch.empty(0, *teacher.contract.input_size)
    logits = torch.empty(0, teacher.contract.num_classes)
    for _ in range(drawn_for_each if count else 0):
        drawn = draw_procedural(count, teacher.contract, rng)
        kept = torch.cat([kept, drawn])
        logits = torch.cat([logits, teacher.logits(drawn, in_fp32=True).float().cpu()])
        if surest:
            best = logits.topk(2, dim=1).values
            order = (best[:, 0] - best[:, 1]).argsort(descending=True, stable=True)
            kept, logits = kept[order], logits[order]
        chosen = class_order(logits.argmax(dim=1).tolist())[:count]
        kept, logits = kept[chosen], logits[chosen]
    return kept
