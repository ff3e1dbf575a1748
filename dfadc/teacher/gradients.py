"""Gradients through a forward that computes its features without them, as transfer learning does with frozen parts."""

from __future__ import annotations

import torch
from torch import nn


class _GradMode:
    """Grad mode of the caller, put back before each layer; a ``no_grad`` in the forward ends as it would."""

    def __init__(self) -> None:
        self.is_enabled = True

    def remember(self, _: nn.Module, __: object) -> None:
        """Hook of the whole network."""
        self.is_enabled = torch.is_grad_enabled()

    def put_back(self, _: nn.Module, __: object) -> None:
        """Hook of a layer."""
        torch.set_grad_enabled(self.is_enabled)


def keep_gradients_(module: nn.Module) -> None:
    """Lets gradients flow through layers that are called under ``torch.no_grad``, in place; TorchScript stays."""
    mode = _GradMode()
    for layer in module.modules():
        if not isinstance(layer, torch.jit.ScriptModule):
            layer.register_forward_pre_hook(mode.remember if layer is module else mode.put_back)
