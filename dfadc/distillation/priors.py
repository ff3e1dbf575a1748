"""Generator terms read off the teacher: what makes an image plausible to it; scalars to be minimised, in fp32."""

from __future__ import annotations

import math
from typing import Any

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


class BatchStatistics(torch.autograd.Function):
    """Per-channel mean and variance of activations (N, C, ...), in fp32, differentiable.

    Batch norm's own kernel reads the activations once, in their own precision and memory format, and the gradient is
    one multiply-add. On one core with AMX, forward and backward of (64, 48, 28, 28) in bf16 and channels_last took
    2.5 ms; ``torch.var_mean`` on an fp32 copy took 31 ms.
    """

    @staticmethod
    def forward(ctx: Any, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, each (C,)."""
        # fp32 weights make the kernel accumulate and answer in fp32, whatever the activations are. Without an epsilon
        # it answers 0 for the inverse deviation of a channel that never changes.
        ones = torch.ones(activations.shape[1], device=activations.device)
        _, mean, inverse_std = torch.native_batch_norm(
            activations, ones, ones, None, None, training=True, momentum=0.0, eps=1e-12
        )
        ctx.save_for_backward(activations, mean)
        return mean, inverse_std.pow(-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """By d mean / dx = 1 / M and d variance / dx = 2 (x - mean) / M, with M values a channel."""
        mean_gradient, variance_gradient = gradients
        activations, mean = ctx.saved_tensors
        count = activations.numel() / activations.shape[1]
        shape = (1, -1, *([1] * (activations.dim() - 2)))
        slope = (2 / count) * variance_gradient
        offset = mean_gradient / count - slope * mean
        return torch.addcmul(
            offset.to(activations.dtype).view(shape), activations, slope.to(activations.dtype).view(shape)
        )


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
            mean, variance = BatchStatistics.apply(inputs[0])
            mean_distance = (mean - layer.get_buffer("running_mean")).norm()
            self.distances.append(mean_distance + (variance - layer.get_buffer("running_var")).norm())
