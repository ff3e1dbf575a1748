"""Generator terms read off the teacher: what makes an image plausible to it; scalars to be minimised, in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def one_hot(teacher_logits: Tensor) -> Tensor:
    """Cross-entropy of the teacher to its own argmax: low where it is sure (DAFL, 1904.01186, eq. 3).

    Args:
        teacher_logits: (N, K) or (N, K, H, W).
    """
    return functional.cross_entropy(teacher_logits.float(), teacher_logits.detach().argmax(dim=1))


def class_balance(teacher_logits: Tensor) -> Tensor:
    """Σ p̄ log p̄ with p̄ the batch's mean prediction: lowest, -log K, for a uniform batch (DAFL, eq. 5).

    Args:
        teacher_logits: (N, K) or (N, K, H, W).
    """
    logits = teacher_logits.float()
    over = [0, *range(2, logits.dim())]
    # In logarithms: p log p has no finite gradient where p underflows to 0, which is where this term is needed most.
    log_mean = logits.log_softmax(dim=1).logsumexp(dim=over) - math.log(logits.numel() // logits.shape[1])
    return (log_mean.exp() * log_mean).sum()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels (images: (N, C, H, W), normalised)."""
    images = images.float()
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


class BatchNormMatching:
    """Distance of a batch's activation statistics to those a batch-norm layer stored in training.

    Σ over layers of ‖μ - running mean‖₂ + ‖σ² - running variance‖₂, with μ and σ² taken over the layer's input
    (DeepInversion, 1912.08795, eq. 4). The hooks stay on the teacher until :meth:`close`; they compute nothing unless
    ``watching``.

    Args:
        layers: the teacher's batch-norm layers with running statistics.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self.watching = False
        self.distances: list[Tensor] = []
        self._handles = [layer.register_forward_pre_hook(self._observe) for layer in layers]

    def close(self) -> None:
        """Takes the hooks off the teacher."""
        for handle in self._handles:
            handle.remove()

    def take(self) -> Tensor:
        """Sum over the layers that the last watched forward pass went through; forgets them."""
        total = torch.stack(self.distances).sum()
        self.distances.clear()
        return total

    def _observe(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.watching:
            activations = inputs[0].float()
            over = [0, *range(2, activations.dim())]
            variance, mean = torch.var_mean(activations, dim=over, correction=0)
            mean_distance = (mean - layer.get_buffer("running_mean")).norm()
            self.distances.append(mean_distance + (variance - layer.get_buffer("running_var")).norm())
