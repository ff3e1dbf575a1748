"""Refinement of samples: pixels of generated images, optimised until the teacher is sure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dfadc.distillation.losses import priors
from dfadc.distillation.losses.batch_norm import BatchNormMatching
from dfadc.distillation.losses.discrepancy import AS_CLASSES

if TYPE_CHECKING:
    from dfadc.teacher.load import Teacher

_RATE, _BETAS = 0.2, (0.5, 0.999)
#: How close to the ends of their range pixels may begin: at the ends a sigmoid does not move.
_MARGIN = 1e-3


def refine(images: Tensor, teacher: Teacher, batch_norms: list[nn.Module], *, steps: int) -> Tensor:
    """Moves pixels towards the class or labels that the teacher sees there and the batch-norm statistics that it kept.

    A generator that is trained for minutes draws between the classes: the teacher's confidence on its Fashion-MNIST
    images was 0.56 in the mean, on real ones 0.95. There a student errs, above all one whose weights are damaged, that
    does not err on real images.

    Source: DeepInversion (1912.08795) with weight 1 for both terms, from a generator's images instead of noise, and
    with pixels that are bounded by a sigmoid.

    Args:
        images: (N, C, H, W), normalised.
        teacher: of the batch norms.
        batch_norms: its batch-norm layers with running statistics; at least one.
        steps: updates of the pixels, by Adam.

    Returns:
        Images of the same shape in the contract's value range, on the teacher's device.
    """
    placement, bounds, as_classes = teacher.placement, teacher.contract.value_range(), AS_CLASSES[teacher.contract.task]
    images = images.to(placement.device, memory_format=placement.memory_format)
    low, high = (torch.tensor(bound, device=images.device).view(-1, 1, 1) for bound in bounds)
    with torch.no_grad():
        classes = as_classes(teacher.logits(images, in_fp32=True)).argmax(dim=1)
        pixels = torch.logit((images - low) / (high - low), eps=_MARGIN)
    pixels.requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=_RATE, betas=_BETAS)
    with BatchNormMatching(batch_norms) as matching:
        for _ in range(steps):
            with matching.recording() as distances:
                logits = teacher.logits(low + (high - low) * pixels.sigmoid(), in_fp32=True)
            loss = torch.stack(distances).sum() + priors.one_hot(as_classes(logits), classes)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return (low + (high - low) * pixels.sigmoid()).detach()
