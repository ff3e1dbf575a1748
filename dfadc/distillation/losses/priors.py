"""Generator terms that are pure functions of images or of the teacher's logits; scalars to be minimised, in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def one_hot(teacher_logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """Cross-entropy of the teacher to the classes asked for, or to its own argmax: low where it is sure.

    Source: DAFL (1904.01186, eq. 3) for the argmax, DeepInversion (1912.08795) for given targets.

    Args:
        teacher_logits: (N, K) or (N, K, H, W).
        targets: (N,) classes; None: the teacher's own argmax.
    """
    if targets is None:
        targets = teacher_logits.detach().argmax(dim=1)
    return functional.cross_entropy(teacher_logits.float(), targets)


def class_balance(teacher_logits: Tensor) -> Tensor:
    """Σ p̄ log p̄ with p̄ the batch's mean prediction: lowest, -log K, for a uniform batch (DAFL, eq. 5).

    Args:
        teacher_logits: (N, K) or (N, K, H, W).
    """
    return _negative_entropy(_log_mean_prediction(teacher_logits))


class RunningBalance:
    """:func:`class_balance` of a mean prediction that remembers earlier turns, for batches that are small.

    p̄ = m · p̄ before + (1 - m) · p̄ of the batch, of which the latter alone has a gradient. It begins uniform.
    Our own; 1 - m scales the gradient, and a weight should make up for it.

    Args:
        num_classes: K.
        momentum: m, in (0, 1).
        device: of the logits.
    """

    def __init__(self, num_classes: int, momentum: float, device: torch.device) -> None:
        self.momentum = momentum
        self.log_mean = torch.full((num_classes,), -math.log(num_classes), device=device)
        # Apart from the memory: compiled, a tensor that is read and then written gives a wrong gradient (torch 2.14).
        self.latest = self.log_mean.clone()

    def __call__(self, teacher_logits: Tensor) -> Tensor:
        """The term for logits (N, K) or (N, K, H, W)."""
        of_batch = _log_mean_prediction(teacher_logits) + math.log(1 - self.momentum)
        log_mean = torch.logaddexp(self.log_mean + math.log(self.momentum), of_batch)
        self.latest.copy_(log_mean.detach())
        return _negative_entropy(log_mean)

    def end_turn(self) -> None:
        """Takes the last batch into the memory."""
        self.log_mean.copy_(self.latest)

    def state_dict(self) -> dict[str, Tensor]:
        """The memory."""
        return {"log_mean": self.log_mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.log_mean.copy_(state["log_mean"])
        self.latest.copy_(self.log_mean)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels (images: (N, C, H, W), normalised)."""
    images = images.float()
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


def l2(images: Tensor) -> Tensor:
    """Mean square of the pixels (images: (N, C, H, W), normalised): far from 0 is far from any image.

    Source: DeepInversion (1912.08795), where it is a sum; a mean weighs the same at every size.
    """
    return images.float().square().mean()


def _log_mean_prediction(teacher_logits: Tensor) -> Tensor:
    """Logarithm of the mean softmax over a batch, (K,).

    In logarithms: p log p has no finite gradient where p underflows to 0, which is where balance is needed most.
    """
    logits = teacher_logits.float()
    over = [0, *range(2, logits.dim())]
    return logits.log_softmax(dim=1).logsumexp(dim=over) - math.log(logits.numel() // logits.shape[1])


def _negative_entropy(log_mean: Tensor) -> Tensor:
    return (log_mean.exp() * log_mean).sum()
