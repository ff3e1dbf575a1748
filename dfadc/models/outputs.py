"""From what a network returns to its logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dfadc.errors import DfadcError


def unwrap_logits(output: object) -> Tensor:
    """The logits tensor in a network's output.

    Args:
        output: a tensor, a mapping with ``out`` (torchvision segmentation) or ``logits``, or an object with
            ``.logits``.

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


class LogitsOf(nn.Module):
    """Wraps a network whose logits sit in a dict or an object.

    Args:
        wrapped: images (N, C, H, W) -> whatever :func:`unwrap_logits` takes.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalised -> logits (N, K) or (N, K, H, W)."""
        return unwrap_logits(self.wrapped(images))
