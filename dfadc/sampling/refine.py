"""Refinement of samples: pixels of generated images, optimised until the teacher is sure."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
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
#: Weight of total variation where there are no batch norms: of 3, 10 and 30 the one whose agreements lie nearest to
#: those on real images.
_SMOOTHNESS = 10.0


def refine(images: Tensor, teacher: Teacher, batch_norms: list[nn.Module], *, steps: int) -> Tensor:
    """Moves pixels towards the class or labels that the teacher sees there and the batch-norm statistics that it kept.

    A generator that is trained for minutes draws between the classes: the teacher's confidence on its Fashion-MNIST
    images was 0.56 in the mean, on real ones 0.95. There a student errs, above all one whose weights are damaged, that
    does not err on real images. Without batch norms neighbouring pixels are drawn together instead.

    Source: DeepInversion (1912.08795) with weight 1 for both terms, or with total variation alone, from a generator's
    or procedural images instead of noise, and with pixels that are bounded by a sigmoid.

    Args:
        images: (N, C, H, W), normalised.
        teacher: of the batch norms.
        batch_norms: its batch-norm layers with running statistics, if it has any.
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
    with ExitStack() as hooks:
        matching: BatchNormMatching | None = None
        if batch_norms:
            matching = hooks.enter_context(BatchNormMatching(batch_norms))
        for _ in range(steps):
            shares = pixels.sigmoid()
            recording: AbstractContextManager[list[Tensor]] = matching.recording() if matching else nullcontext([])
            with recording as distances:
                logits = teacher.logits(low + (high - low) * shares, in_fp32=True)
            prior = torch.stack(distances).sum() if distances else _SMOOTHNESS * total_variation(shares)
            loss = prior + priors.one_hot(as_classes(logits), classes)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return (low + (high - low) * pixels.sigmoid()).detach()


def total_variation(images: Tensor) -> Tensor:
    """Mean distance of neighbouring pixels along each axis, of images (N, C, H, W), as a scalar."""
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()
