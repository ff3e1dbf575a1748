"""Normalisation layers of a network, and those of them that keep statistics of the training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class NormLayer:
    """One normalisation layer.

    Args:
        name: its place in the network, as ``named_modules`` gives it.
        kind: its class.
        num_channels: channels it normalises; 0 where the class does not say.
        has_statistics: whether it is a batch norm with running mean and variance.
    """

    name: str
    kind: str
    num_channels: int
    has_statistics: bool


def is_batch_norm_with_statistics(module: nn.Module) -> bool:
    """True for a layer that normalises with a running mean and variance over the batches of its training.

    BatchNorm1d to 3d, SyncBatchNorm, torchvision's FrozenBatchNorm2d, timm's fused
    norms and the restored layers of exported programs all carry these two buffers. Instance norms may carry them too,
    but they are means over single images. Layers of TorchScript do not count, for they take no hooks, nor do the
    containers of an exported program, for nothing calls them.
    """
    if isinstance(module, nn.modules.instancenorm._InstanceNorm | torch.jit.ScriptModule):  # noqa: SLF001
        return False
    if type(module) is nn.Module:
        return False
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    return isinstance(mean, Tensor) and isinstance(variance, Tensor) and mean.ndim == 1 and mean.shape == variance.shape


def find_norm_layers(module: nn.Module) -> tuple[NormLayer, ...]:
    """Every normalisation layer in the order of definition, those without statistics included."""
    return tuple(
        NormLayer(name, type(layer).__name__, _num_channels(layer), is_batch_norm_with_statistics(layer))
        for name, layer in module.named_modules()
        if is_batch_norm_with_statistics(layer) or ("Norm" in type(layer).__name__ and not list(layer.children()))
    )


def _num_channels(layer: nn.Module) -> int:
    for name in ("num_features", "num_channels", "weight", "running_mean"):
        value = getattr(layer, name, None)
        if isinstance(value, int):
            return value
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[-1]
    return 0
