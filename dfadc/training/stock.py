"""A stock of procedural images that student and teacher are shown before the first step and during training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dfadc.distillation.images.balanced import draw_balanced

if TYPE_CHECKING:
    from torch import Tensor

    from dfadc.teacher.load import Teacher
    from dfadc.training.plan import NetworkFlops

#: Images of a stock, and floating-point operations to draw it and fit layers on it: ten seconds of a core.
MOST_IMAGES, LEAST_IMAGES, MOST_FLOPS = 4000, 64, 4e11
#: Images drawn for each that is kept: the teacher sees them all.
_DRAWN_FOR_EACH = 4


def draw_stock(count: int, teacher: Teacher, seed: int) -> Tensor:
    """Procedural images of balanced classes, familiar to the teacher; the same for a run that goes on.

    Args:
        count: N.
        teacher: placed.
        seed: of the images.

    Returns:
        (N, C, H, W) in the contract's value range, on the CPU.
    """
    return draw_balanced(count, teacher, torch.Generator().manual_seed(seed), drawn_for_each=_DRAWN_FOR_EACH)


@torch.no_grad()
def class_notes(stock: Tensor, teacher: Teacher) -> tuple[str, ...]:
    """A note for the plan where the teacher sees few of its classes in a stock.

    Args:
        stock: as :func:`draw_stock` gives it: one image of each class that was found comes first.
        teacher: placed.
    """
    contract = teacher.contract
    if contract.task != "classification" or len(stock) < contract.num_classes:
        return ()
    seen = len(teacher.logits(stock[: contract.num_classes], in_fp32=True).argmax(dim=1).unique())
    if 2 * seen > contract.num_classes:
        return ()
    way = "more steps show more of them" if seen > 1 else "check mean, std and channel order"
    seen_of = f"the teacher sees {seen} of its {contract.num_classes} classes in {len(stock):,} procedural images"
    return (f"{seen_of}: the others reach the student through the generator alone; {way}",)


def num_images(flops: NetworkFlops, num_layers: int) -> int:
    """Images that there is time for.

    Args:
        flops: of both networks.
        num_layers: that are fitted on them: each runs half of the student in the mean.
    """
    teacher, student = flops.teacher or 0, flops.student or 0
    each = (_DRAWN_FOR_EACH + 1) * teacher + num_layers / 2 * student
    return int(min(MOST_IMAGES, max(LEAST_IMAGES, MOST_FLOPS / max(1, each))))
