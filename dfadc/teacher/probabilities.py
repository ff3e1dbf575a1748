"""Heads of probabilities: softmax, log-softmax and sigmoid, recognised and taken off.

One is recognised by the values, or by the last operation of the autograd graph. Where it is a layer of its own it is
left out; of a softmax that is called as a function log p is taken, whose gradient is that of a log-softmax; of a
sigmoid its input.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfadc.networks.adaptation import hook
from dfadc.networks.logits import Wrapper, unwrap_logits

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.autograd.graph import Node

Kind = Literal["logits", "softmax", "log-softmax", "sigmoid"]

#: How close to one a row of outputs must sum to be taken for probabilities.
_TOLERANCE = 1e-3
#: Smallest probability whose logarithm is taken, and the largest float32 below one.
_SMALLEST, _LARGEST = 1e-37, 1 - 2**-24
_LAYERS: dict[Kind, tuple[type[nn.Module], ...]] = {
    "softmax": (nn.Softmax, nn.Softmax2d),
    "log-softmax": (nn.LogSoftmax,),
    "sigmoid": (nn.Sigmoid,),
}
#: Nodes of the autograd graph that only reshape, copy or cast.
_RESHAPING = re.compile(r"View|Alias|Squeeze|Unsqueeze|Flatten|Clone|Copy|Permute|Transpose|Slice|^T$")


def outputs_of(module: nn.Module, images: Tensor) -> Tensor:
    """A network's output for images, in fp32, with its autograd graph back to them."""
    return unwrap_logits(module(images.clone().requires_grad_())).float()


def change_outputs(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A network whose outputs are changed."""
    return hook(module, after=lambda _, __, output: change(unwrap_logits(output)))


def kind_of(output: Tensor) -> Kind:
    """Probabilities, log-probabilities or logits, by their values and by the operation that made them."""
    if output.shape[1] > 1:
        if bool((output >= 0).all()) and _is_near(output.sum(dim=1), 1):
            return "softmax"
        if _is_near(torch.logsumexp(output, dim=1), 0):
            return "log-softmax"
    node = output.grad_fn
    while node is not None and _RESHAPING.search(_operation(node)):
        node = node.next_functions[0][0] if node.next_functions else None
    return "sigmoid" if node is not None and _operation(node) == "Sigmoid" else "logits"


def _operation(node: Node) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")


def _is_near(values: Tensor, value: float) -> bool:
    return bool(((values - value).abs() < _TOLERANCE).all())


def without_probabilities(module: nn.Module, images: Tensor, output: Tensor, kind: Kind) -> tuple[nn.Module, str]:
    """The network with logits instead of its probabilities, and a note."""
    if kind == "log-softmax":
        return module, "its outputs are log-probabilities, which are logits"
    layer = _last_layer(module, images, output, kind)
    if layer is not None:
        handle = layer.register_forward_hook(lambda _, inputs, __: inputs[0])
        logits = outputs_of(module, images)
        again = logits.softmax(1) if kind == "softmax" else logits.sigmoid()
        if torch.allclose(again, output, rtol=_TOLERANCE, atol=_TOLERANCE):
            return module, f"its last {kind} is left out: the outputs before it are the logits"
        handle.remove()
    if kind == "softmax":
        return change_outputs(module, lambda shares: shares.float().clamp(min=_SMALLEST).log()), (
            "its outputs are probabilities p: log p are the logits"
        )
    before = _BeforeSigmoid(module)
    inputs = before.try_on(images)
    if inputs is not None and torch.allclose(inputs.sigmoid(), output, rtol=_TOLERANCE, atol=_TOLERANCE):
        return before, "the input of its last sigmoid is taken for the logits"
    return _AfterSigmoid(module), (
        "its outputs are sigmoids p: log(p / (1 - p)) are the logits, 16 at most, for float32 knows no p nearer to 1"
    )


class _AfterSigmoid(Wrapper):
    """Wraps a network that gives sigmoids, whose logits are computed back; never cast, for bf16 knows few p near 1."""

    def forward(self, images: Tensor) -> Tensor:
        """Images -> logits."""
        with torch.autocast(images.device.type, enabled=False):
            return unwrap_logits(self.wrapped(images.float())).clamp(_SMALLEST, _LARGEST).logit()


class _Recorder(TorchFunctionMode):
    """Keeps the input of the last sigmoid that is computed."""

    last: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.sigmoid, Tensor.sigmoid, torch.special.expit):
            self.last = args[0]
        return func(*args, **(kwargs or {}))


class _BeforeSigmoid(Wrapper):
    """Wraps a network whose forward ends in a call of a sigmoid: log(p / (1 - p)) would be infinite where p is 1."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, images: Tensor) -> Tensor:
        """Images -> logits."""
        logits = self.try_on(images)
        assert logits is not None, "the dry run saw them"  # noqa: S101
        return logits

    def try_on(self, images: Tensor) -> Tensor | None:
        """Logits of images; None where no call of a sigmoid is seen, as within TorchScript."""
        with _Recorder() as recorder:
            shares = unwrap_logits(self.wrapped(images))
        if recorder.last is None or recorder.last.numel() < shares.numel():
            return None
        # A batch of one may have been sent through it twice.
        logits: Tensor = recorder.last[: len(shares)].reshape(shares.shape)
        return logits


def _last_layer(module: nn.Module, images: Tensor, output: Tensor, kind: Kind) -> nn.Module | None:
    """The layer whose result is the network's output, where it is called once; None where no layer is."""
    calls: list[tuple[nn.Module, Tensor]] = []
    with ExitStack() as hooks:
        for layer in module.modules():
            if isinstance(layer, _LAYERS[kind]) and not isinstance(layer, torch.jit.ScriptModule):
                hook = layer.register_forward_hook(lambda called, _, result: calls.append((called, result)))
                hooks.callback(hook.remove)
        outputs_of(module, images)
    if not calls:
        return None
    last, result = calls[-1]
    is_single = sum(called is last for called, _ in calls) == 1
    is_last = result.numel() == output.numel() and torch.allclose(result.flatten(), output.flatten())
    return last if is_single and is_last else None
