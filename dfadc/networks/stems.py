"""Adapting a library's network to other channels and to small images."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from dfadc.errors import DfadcError
from dfadc.networks.flops import ShapesOnly, in_eval_mode
from dfadc.networks.user_code import UserCodeFailed, running_user_code

Stem = Literal["default", "small", "pooled"]

#: Images up to this side are small: a network for them should have a small stem.
SMALL_SIDE = 64
#: Size that strides are measured at; large enough for every library network that takes any size.
_PROBE_SIDE = 224
#: Total stride of a network with a small stem: 32 px images end in 4x4 maps.
SMALL_TOTAL_STRIDE = 8


def parse_stem(value: object, source: object) -> Stem:
    """The stem that a text names.

    Raises:
        DfadcError: it names none; the message says that ``source`` did.
    """
    if value in get_args(Stem):
        return cast(Stem, value)
    raise DfadcError(f"{source}: unknown stem {value!r}", "it is 'default', 'small' or 'pooled'")


def first_convolution(module: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """The convolution that sees the images: the first one in the order of definition, with its name."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            return name, layer
    return None


def adapt_channels_(module: nn.Module, channels: int) -> bool:
    """Replaces the first convolution in place where it takes another number of channels; says whether it did."""
    found = first_convolution(module)
    if found is None or found[1].in_channels == channels:
        return False
    name, layer = found
    module.set_submodule(name, _convolution_like(layer, channels=channels))
    return True


def apply_small_stem_(module: nn.Module, channels: int) -> str | None:
    """Removes the earliest strides in place until the total stride is at most 8.

    A large first kernel becomes 3x3 and an early pooling layer is dropped, as the field does with ResNets on 32 px
    images; other convolutions keep their weights' shape and lose the stride only.

    Returns:
        What was done, for the user, or None where no small stem is known (transformers); then nothing was changed.
    """
    levels = _strided_levels(module, channels)
    total = math.prod(level.stride for level in levels)
    if total <= SMALL_TOTAL_STRIDE:
        return None
    removed: list[str] = []
    remaining = total
    for level in levels:
        if remaining <= SMALL_TOTAL_STRIDE:
            break
        for name in level.names:
            _remove_stride_(module, name, channels=channels)
        removed += level.names
        remaining //= level.stride
    return f"small stem: total stride {total} -> {remaining} (no stride in {', '.join(removed)})"


def apply_pooled_stem_(module: nn.Module, channels: int) -> str | None:
    """Makes the first kernel 3x3 without a stride, in place, and keeps the pooling after it.

    Its weights have the shapes of the small stem's, but it is another network.

    Returns:
        A note for the user, or None where the first kernel is no larger than 3x3; then nothing was changed.
    """
    found = first_convolution(module)
    if found is None or max(found[1].kernel_size) <= 3:
        return None
    name, layer = found
    module.set_submodule(name, _convolution_like(layer, channels=channels, kernel_size=3))
    return f"pooled stem: {name} is 3x3 without a stride, the pooling after it is kept"


@dataclass(slots=True)
class _Level:
    """Strided layers that see maps of the same height: parallel branches of one downsampling."""

    stride: int
    names: list[str]


def _strided_levels(module: nn.Module, channels: int) -> list[_Level]:
    """The downsamplings of a convolutional network in the order they run; empty where it is something else."""
    if any("Attention" in type(layer).__name__ for layer in module.modules()):
        return []
    seen: dict[int, _Level] = {}

    def record(name: str, stride: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(inputs[0].shape[-2], _Level(stride, [])).names.append(name)

    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    images = torch.zeros(1, channels, _PROBE_SIDE, _PROBE_SIDE, device=device)
    with ExitStack() as hooks:
        for name, layer in module.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
                continue
            stride = layer.stride if isinstance(layer.stride, int) else layer.stride[0]
            if stride > 1:
                hooks.enter_context(layer.register_forward_pre_hook(partial(record, name, stride)))
        try:
            with running_user_code("it takes no such images"), torch.no_grad(), ShapesOnly(), in_eval_mode(module):
                module(images)
        except UserCodeFailed:
            # A network with a fixed size of its own: its stem is not ours to change.
            return []
    return list(seen.values())


def _remove_stride_(module: nn.Module, name: str, *, channels: int) -> None:
    layer = module.get_submodule(name)
    if not isinstance(layer, nn.Conv2d):
        module.set_submodule(name, nn.Identity())
    elif layer.in_channels == channels and layer.groups == 1 and max(layer.kernel_size) > 3:
        module.set_submodule(name, _convolution_like(layer, channels=channels, kernel_size=3))
    else:
        layer.stride = (1, 1)


def _convolution_like(layer: nn.Conv2d, *, channels: int, kernel_size: int | None = None) -> nn.Conv2d:
    """The same convolution for other channels; with ``kernel_size`` also without stride and padded to keep the size."""
    settings: dict[str, Any] = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
    if kernel_size is not None:
        settings = {"kernel_size": kernel_size, "stride": 1, "padding": kernel_size // 2}
    replacement = nn.Conv2d(
        channels, layer.out_channels, **settings, bias=layer.bias is not None, device=layer.weight.device
    )
    nn.init.kaiming_normal_(replacement.weight, mode="fan_out", nonlinearity="relu")
    if replacement.bias is not None:
        nn.init.zeros_(replacement.bias)
    return replacement
