"""Layers that stay in fp32 on a CPU although a step is in bf16: torch has no fast bf16 gradient for them."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfadc.distillation.compute.policy import ComputePolicy


class Fp32Layers:
    """Computes the depthwise convolutions of networks in fp32 where bf16 is slower, within its context.

    ``conv2d`` and both gradients of ``aten::convolution_backward``, timed alone, the best of four each, in ms: 64
    images of 96 channels at 28x28, NHWC, on two cores with AVX512-BF16 (torch 2.14.1).

    ==================  =====  =====
    depthwise kernel    fp32   bf16
    ==================  =====  =====
    3x3                   4.2    2.4
    3x3, stride 2         1.6   27.2
    3x3, dilation 2      14.6   25.0
    5x5                  15.2   25.3
    5x5, stride 2         5.5   57.0
    7x7                  24.3   27.8
    ==================  =====  =====

    Inputs and outputs of such a layer keep their type, and so do weights and state. Nothing is done on
    other devices, or where nothing is cast.

    Args:
        networks: their layers' ``forward`` is set meanwhile; copies made then keep it.
        policy: how tensors are computed.
    """

    def __init__(self, *networks: nn.Module, policy: ComputePolicy) -> None:
        self._layers: list[nn.Module] = []
        if policy.device.type == "cpu" and policy.autocast_dtype == torch.bfloat16:
            slow = (layer for network in networks for layer in slow_in_bf16(network))
            self._layers = list(slow)
        self._changed: list[nn.Module] = []

    @property
    def notes(self) -> tuple[str, ...]:
        """Note for the run's plan."""
        count = len(self._layers)
        return (f"{count} depthwise convolutions are in fp32: CPUs are slow at their bf16 gradient",) if count else ()

    def __enter__(self) -> Self:
        self._changed = [layer for layer in self._layers if "forward" not in vars(layer)]  # else one around this did it
        for layer in self._changed:
            layer.forward = MethodType(_forward_in_fp32, layer)  # a bound method: a copy's is bound to the copy
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the networks as they were."""
        for layer in self._changed:
            vars(layer).pop("forward", None)
        self._changed = []


def slow_in_bf16(network: nn.Module) -> Iterator[nn.Conv2d]:
    """Depthwise convolutions but for those that oneDNN has fast bf16 kernels for: 3x3, neither strided nor dilated."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
            is_plain = tuple(layer.kernel_size) == (3, 3) and max(*layer.stride, *layer.dilation) == 1
            if not (is_plain and layer.out_channels == layer.in_channels):
                yield layer


def _forward_in_fp32(layer: nn.Conv2d, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        answers: Tensor = type(layer).forward(layer, images.float())
    return answers.to(images.dtype)
