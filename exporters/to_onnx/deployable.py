"""Copy of a student that is ready for tracing, with normalisation and softmax embedded on request."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dfadc.errors import DfadcError, ExportFailed
from exporters.to_onnx.file import first_line

if TYPE_CHECKING:
    from dfadc.contract import ImageContract


class _Deployed(nn.Module):
    """A network with normalisation and softmax inside the graph; mean and std are buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, contract: ImageContract, *, normalise: bool, softmax: bool) -> None:
        super().__init__()
        self.network = network
        self.normalise = normalise
        self.softmax = softmax
        if normalise:
            self.register_buffer("mean", torch.tensor(contract.mean).view(-1, 1, 1))
            self.register_buffer("std", torch.tensor(contract.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.normalise:
            images = (images - self.mean) / self.std
        output: Tensor = self.network(images)
        return torch.softmax(output, dim=1) if self.softmax else output


def deployable(
    module: nn.Module, contract: ImageContract, *, embed_normalisation: bool, embed_softmax: bool
) -> nn.Module:
    """A copy of ``module`` in fp32 and eval mode, on the CPU, contiguous and not compiled, with the embedded parts.

    Raises:
        DfadcError: normalisation is to be embedded and the contract has no mean and std, or a softmax and an image may
            have several labels.
        ExportFailed: the module cannot be copied.
    """
    if embed_normalisation and not contract.has_pixels:
        raise DfadcError(
            "the normalisation cannot be embedded: mean and std are unknown", "pass --mean and --std, or leave it out"
        )
    if embed_softmax and contract.task == "multilabel":
        raise DfadcError(
            "probabilities of several labels an image are sigmoids, which round to 1 where the logits still differ: "
            "such an artifact could not be verified",
            "leave --embed-softmax out; a label is on where its logit is above 0",
        )
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    try:
        network = copy.deepcopy(module).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)  # noqa: FBT003
    except (RuntimeError, TypeError) as exc:
        raise ExportFailed(f"{type(module).__name__} cannot be copied for the export: {first_line(exc)}") from exc
    _make_plain(network)
    if not (embed_normalisation or embed_softmax):
        return network
    return _Deployed(network, contract, normalise=embed_normalisation, softmax=embed_softmax).eval()


def _make_plain(network: nn.Module) -> None:
    """Removes compiled parts, memory formats and in-place activations from the copy; no value changes.

    torch decomposes every in-place activation during export: MobileNetV2 then takes half as long again.
    """
    for part in list(network.modules()):
        for name, child in part.named_children():
            if isinstance(inner := getattr(child, "_orig_mod", None), nn.Module):
                setattr(part, name, inner)
        if getattr(part, "inplace", None) is True:
            setattr(part, "inplace", False)  # noqa: B010 -- nn.Module types it as a tensor
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.contiguous()
