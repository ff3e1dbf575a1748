"""Parameters and floating-point operations of a network."""

from __future__ import annotations

import contextlib
import copy
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dfadc.networks.user_code import UserCodeFailed, running_user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


#: Functions of one tensor, which on the meta device only make another tensor of its shape.
_KEEP_SHAPE = frozenset(
    getattr(functional, name)
    for name in ("batch_norm", "gelu", "hardsigmoid", "hardswish", "hardtanh", "layer_norm", "relu", "relu6", "silu")
)


class ShapesOnly(TorchFunctionMode):
    """Skips norms and activations on the meta device, where they change nothing and cost more than all other layers.

    Measured over torchvision's classifiers on a 2-core x86-64 machine: three times faster without batch norms, and a
    sixth faster without the others.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _KEEP_SHAPE and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, trainable or not; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(module: nn.Module, input_size: tuple[int, ...]) -> int | None:
    """Floating-point operations for one input, 2 for each multiply-add of convolutions and matrix products.

    It runs on the meta device, without weights or arithmetic, wherever the module bears that; else on the module
    itself. A forward that makes tensors or reads numbers from them does not.

    Args:
        module: images (N, C, H, W), or a generator's latents (N, Z) -> its outputs; it stays as it is.
        input_size: (C, H, W), or (Z,).

    Returns:
        None where it cannot be counted.
    """
    if not isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        with contextlib.suppress(UserCodeFailed), running_user_code("it does not run on the meta device"):
            return _count(meta_copy(module).eval(), input_size)
    with contextlib.suppress(UserCodeFailed), running_user_code("it does not run"), in_eval_mode(module):
        return _count(module, input_size)
    return None


def _count(module: nn.Module, input_size: tuple[int, ...]) -> int:
    """Operations of two inputs, halved: some networks take no batch of one."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    with torch.no_grad(), ShapesOnly(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(2, *input_size, device=device))
    return int(counter.get_total_flops()) // 2


def in_eval_mode(module: nn.Module) -> AbstractContextManager[None]:
    """Has a module in eval mode, and each layer of it in its own mode again afterwards."""
    return in_mode(module, training=False)


def set_mode_(module: nn.Module, *, training: bool) -> None:
    """Puts a network into train or eval mode, in place; an exported program, whose mode is built in, stays as it is."""
    with contextlib.suppress(NotImplementedError):  # what such a program raises
        module.train(training)


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Has a module in train or eval mode, and each layer of it in its own mode again afterwards."""
    modes = [(layer, layer.training) for layer in module.modules()]
    set_mode_(module, training=training)
    try:
        yield
    finally:
        for layer, before in modes:
            layer.training = before


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy with the same layers whose tensors have shapes but no memory."""
    shapes: dict[int, Tensor] = {}
    for parameter in module.parameters():
        shapes[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        shapes[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, dict(shapes))
