"""Logits in a network's output, and the one place where the size of dense logits changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.segmentation.deeplabv3 import DeepLabV3
from torchvision.models.segmentation.fcn import FCN
from torchvision.models.segmentation.lraspp import LRASPP

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from dfadc.contract import ImageContract, Task

Size = tuple[int, int]
#: Levels of tuples and mappings that are looked into.
_DEPTH = 4


def list_outputs(output: object) -> dict[str, Tensor]:
    """The tensors in a network's output by their paths.

    Args:
        output: tensors in tuples, lists, mappings, named tuples, data classes and plain objects, at any level. A path
            is made of indices and keys, as in ``1`` or ``heads.colour``; that of a single tensor is empty.
    """
    return dict(_walk(output, (), _DEPTH))


def _walk(output: object, path: tuple[str, ...], depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield ".".join(path), output
    elif depth:
        for key, value in _parts(output):
            yield from _walk(value, (*path, key), depth - 1)


def _parts(output: object) -> Iterator[tuple[str, object]]:
    if isinstance(output, Mapping):
        yield from ((str(key), value) for key, value in output.items())
    elif isinstance(output, tuple | list):
        names = getattr(output, "_fields", range(len(output)))
        yield from ((str(name), value) for name, value in zip(names, output, strict=True))
    elif is_dataclass(output) or hasattr(output, "__dict__"):
        yield from vars(output).items()


def unwrap_logits(output: object) -> Tensor:
    """The logits tensor in a network's output.

    Args:
        output: a tensor, a mapping with ``out`` (torchvision segmentation; its ``aux`` is for training) or ``logits``,
            or an object with ``.logits``.

    Raises:
        DfadcError: it is something else, a tuple for instance.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("out", "logits"):
            if isinstance(output.get(key), Tensor):
                found: Tensor = output[key]
                return found
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    described = type(output).__name__
    if isinstance(output, tuple | list):
        described += f" of {len(output)}"
    elif isinstance(output, Mapping):
        described += f" with the keys {', '.join(map(str, list(output)[:5]))}"
    raise DfadcError(
        f"the network returns a {described}, not a tensor of logits",
        "wrap it in a module whose forward returns the logits alone, or a dict with 'logits'",
    )


class Wrapper(nn.Module):
    """Network around another one, in the mode of that.

    Args:
        wrapped: the other network.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.training = wrapped.training


class LogitsOf(Wrapper):
    """Wraps a network whose logits sit in a dict or an object.

    torchvision's segmentation networks enlarge their logits as the last thing they do; here they do not: the losses are
    taken before that (Fang et al. 2019), on a sixty-fourth of the values.

    Args:
        wrapped: images (N, C, H, W) -> whatever :func:`unwrap_logits` takes.
        output: path of the logits among :func:`list_outputs`; None: where :func:`unwrap_logits` finds them.
    """

    def __init__(self, wrapped: nn.Module, *, output: str | None = None) -> None:
        super().__init__(wrapped)
        self.output = output

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalised -> logits (N, K) or (N, K, h, w)."""
        network = self.wrapped
        if self.output is not None:
            return list_outputs(network(images))[self.output]
        if isinstance(network, DeepLabV3 | FCN):
            return unwrap_logits(network.classifier(network.backbone(images)["out"]))
        if isinstance(network, LRASPP):
            return unwrap_logits(network.classifier(network.backbone(images)))
        return unwrap_logits(network(images))


class ResizedLogits(Wrapper):
    """Wraps a segmentation network whose logits are to have another size: bilinear, as torchvision enlarges them.

    Args:
        wrapped: images (N, C, H, W) -> logits (N, K, h, w).
        size: (H', W') of the logits; None: that of the images.
    """

    def __init__(self, wrapped: nn.Module, size: Size | None = None) -> None:
        super().__init__(wrapped)
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalised -> logits (N, K, H', W')."""
        logits: Tensor = self.wrapped(images)
        size = images.shape[2:] if self.size is None else self.size
        return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def predict(logits: Tensor, task: Task) -> Tensor:
    """Classes (N,) or (N, H, W) of logits; for the task multilabel (N, K), True where a label is on."""
    return logits > 0 if task == "multilabel" else logits.argmax(dim=1)


def same_predictions(logits: Tensor, others: Tensor, task: Task) -> Tensor:
    """(N,) or (N, H, W), True where two networks predict the same: the class, or every label."""
    same = predict(logits, task) == predict(others, task)
    return same.all(dim=1) if task == "multilabel" else same


def with_logits(module: nn.Module, contract: ImageContract) -> nn.Module:
    """A network as it is trained on: one tensor of logits, dense ones before they are enlarged."""
    if not contract.is_dense or isinstance(module, LogitsOf | ResizedLogits):
        return module
    return LogitsOf(module)


def answering_pixels(module: nn.Module, contract: ImageContract) -> nn.Module:
    """A network as it is verified and deployed: one answer for every pixel of an image, where the task is dense."""
    if not contract.is_dense:
        return module
    # From the network's own logits: a student that was brought to its teacher's size is not resized twice.
    while isinstance(module, ResizedLogits):
        module = module.wrapped
    return ResizedLogits(with_logits(module, contract))


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside the wrappers of this module."""
    while isinstance(module, LogitsOf | ResizedLogits):
        module = module.wrapped
    return module
