"""Generator terms that are pure functions of images or of the teacher's logits; scalars to be minimised, in fp32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


def one_hot(teacher_logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """Cross-entropy of the teacher to the classes asked for, or to its own argmax: low where it is sure.

    Source: DAFL (1904.01186, eq. 3) for the argmax, DeepInversion (1912.08795) for given targets.

    Args:
        teacher_logits: (N, K), (N, K, H, W), or (N, 2, L) pairs of labels, each of which counts alike.
        targets: (N,) classes, or (N, L) states of labels; None: the teacher's own argmax.
    """
    if targets is None:
        targets = teacher_logits.detach().argmax(dim=1)
    return functional.cross_entropy(teacher_logits.float(), targets)


def class_balance(teacher_logits: Tensor) -> Tensor:
    """Σ p̄ log p̄ with p̄ the batch's mean prediction: lowest, -log K, for a uniform batch (DAFL, eq. 5).

    Args:
        teacher_logits: (N, K), (N, K, H, W), or (N, 2, L) pairs of labels, over which the term is averaged.
    """
    log_mean = _log_mean_prediction(teacher_logits)
    return (log_mean.exp() * log_mean).sum(dim=0).mean()


def _log_mean_prediction(teacher_logits: Tensor) -> Tensor:
    """Logarithm of the mean softmax over a batch and its pixels, (K,), or of each label over a batch, (2, L).

    In logarithms: p log p has no finite gradient where p underflows to 0, which is where balance is needed most.
    """
    logits = teacher_logits.float()
    over = [0, 2, 3] if logits.dim() == 4 else [0]
    summed = logits.log_softmax(dim=1).logsumexp(dim=over)
    return summed - math.log(logits.numel() // summed.numel())
