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


def num_images(flops: NetworkFlops, num_layers: int) -> int:
    """Images that there is time for.

    Args:
        flops: of both networks.
        num_layers: that are fitted on them: each runs half of the student in the mean.
    """
    teacher, student = flops.teacher or 0, flops.student or 0
    each = (_DRAWN_FOR_EACH + 1) * teacher + num_layers / 2 * student
    return int(min(MOST_IMAGES, max(LEAST_IMAGES, MOST_FLOPS / max(1, each))))
