"""Procedural images of all classes that a teacher sees, as evenly as they come, the most familiar ones first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dfadc.distillation.images.class_order import class_order, classes_to_balance
from dfadc.distillation.images.procedural import draw_procedural
from dfadc.distillation.losses.batch_norm import watch_images

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

    Of a class those are kept first whose activations are nearest to the statistics that the teacher's batch norms kept
    of its training images, where it has any: strokes for a teacher of writing, leaves for one of things.

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
    distances = torch.empty(0)
    for _ in range(drawn_for_each if count else 0):
        drawn = draw_procedural(count, teacher.contract, rng)
        with watch_images(teacher.batch_norms) as by_layer:
            logits = torch.cat([logits, teacher.logits(drawn, in_fp32=True).float().cpu()])
        kept = torch.cat([kept, drawn])
        # A layer that images pass twice, or not at all, says nothing of each.
        passed = [torch.cat(parts) for parts in by_layer if sum(map(len, parts)) == count]
        distances = torch.cat([distances, torch.stack(passed).sum(dim=0).cpu() if passed else torch.zeros(count)])
        nearest = distances.argsort(stable=True)
        chosen = nearest[class_order(classes_to_balance(logits[nearest].numpy(), teacher.contract.task))[:count]]
        kept, logits, distances = kept[chosen], logits[chosen], distances[chosen]
    return kept
