"""Candidate architectures of weights: those of our networks and torchvision's with about as many parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torchvision

from dfadc.networks.construct import torchvision_classifiers
from dfadc.networks.zoo import NETWORKS, SEGMENTERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

#: Largest difference between a network's parameters and the documented number at which exact shapes are compared;
#: another stem and other channels move them by less.
_TOLERANCE = 0.03
_TOLERANCE_PARAMETERS = 25_000
#: Parameters that the documented heads of 1000 classes have, from SqueezeNet's to MobileNetV3's; VGG's and AlexNet's.
_HEADS = (200_000, 4_500_000)
_LARGE_HEADS = (50_000_000, 130_000_000)
#: Beginning of torchvision's names -> name of its first weights.
_FIRST_NAMES = {
    **dict.fromkeys(("resnet", "resnext", "wide_resnet"), "conv1.weight"),
    **dict.fromkeys(("mobilenet", "efficientnet", "convnext", "swin"), "features.0.0.weight"),
    **dict.fromkeys(("vgg", "alexnet", "squeezenet"), "features.0.weight"),
    "densenet": "features.conv0.weight",
    "googlenet": "conv1.conv.weight",
    "inception": "Conv2d_1a_3x3.conv.weight",
    "mnasnet": "layers.0.weight",
    "shufflenet": "conv1.0.weight",
    "regnet": "stem.0.weight",
    "vit": "conv_proj.weight",
    "maxvit": "stem.0.0.weight",
}
#: Architectures that are named where none fits.
_NEAREST = 3


def own_candidates(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    """Our own networks; the numbers in the names of the two families are read off the weights."""
    families = ("wrn_", "compact_resnet_", "compact_unet_")
    yield from (name for name in (*NETWORKS, *SEGMENTERS) if not name.startswith(families))
    stem = state_dict.get("stem.0.weight")
    if stem is not None and "stages.0.conv1.weight" in state_dict and 4 <= stem.shape[0] <= 256:
        yield f"compact_resnet_{stem.shape[0]}"
    if stem is not None and "up2.0.weight" in state_dict and 8 <= stem.shape[0] <= 128:
        yield f"compact_unet_{stem.shape[0]}"
    widened = state_dict.get("block1.layer.0.conv1.weight")
    if widened is not None and widened.ndim == 4 and widened.shape[0] >= 16:
        blocks = sum(key.startswith("block1.layer.") and key.endswith(".conv1.weight") for key in state_dict)
        yield f"wrn_{6 * blocks + 4}_{widened.shape[0] // 16}"


def torchvision_candidates(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    """Classifiers whose documented number of parameters is near."""
    totals = totals_of(state_dict)
    for name, documented in _families_of(state_dict):
        # The documented number counts Inception's training-only classifier, GoogLeNet's not; compare these two always.
        if name in ("googlenet", "inception_v3") or is_near(documented, totals):
            yield f"torchvision:{name}"


def candidates_of_other_head(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    """Classifiers whose documented number of parameters leaves room for their own head alone, beside these weights."""
    body = sum(
        tensor.numel()
        for key, tensor in learned_of(state_dict).items()
        if key.partition(".")[0] not in ("fc", "classifier", "head", "heads")
    )
    for name, documented in _families_of(state_dict):
        least, most = _LARGE_HEADS if name.startswith(("vgg", "alexnet")) else _HEADS
        if least <= documented - body <= most:
            yield f"torchvision:{name}"


def nearest_names(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Torchvision's classifiers whose weights begin alike, the nearest in their number of parameters first."""
    totals = totals_of(state_dict)
    distances = [
        (min(abs(documented - total) for total in totals), f"torchvision:{name}")
        for name, documented in _families_of(state_dict)
    ]
    return [name for _, name in sorted(distances)[:_NEAREST]]


def totals_of(state_dict: Mapping[str, Tensor]) -> set[int]:
    """Parameters that these weights would have with 1000 classes, whichever layer the classes sit in."""
    learned = learned_of(state_dict)
    total = sum(tensor.numel() for tensor in learned.values())
    totals = {total}
    for key, tensor in learned.items():
        is_head = tensor.ndim == 2 or (tensor.ndim == 4 and tensor.shape[2:] == (1, 1))
        if is_head and (bias := learned.get(key.removesuffix("weight") + "bias")) is not None:
            rows = math.prod(tensor.shape[1:]) + 1
            totals.add(total + (1000 - bias.numel()) * rows)
    return totals


def is_near(documented: int, totals: set[int]) -> bool:
    """True where one of the totals is about the documented number of parameters."""
    margin = _TOLERANCE * documented + _TOLERANCE_PARAMETERS
    return any(abs(documented - total) <= margin for total in totals)


def _families_of(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Torchvision's classifiers whose first weights have a name of these, and their documented parameters."""
    for name in torchvision_classifiers():
        first = next((key for family, key in _FIRST_NAMES.items() if name.startswith(family)), None)
        if first is None or first in state_dict:
            yield name, int(next(iter(torchvision.models.get_model_weights(name))).meta["num_params"])


def learned_of(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without running statistics and integers."""
    return {
        key: tensor
        for key, tensor in state_dict.items()
        if tensor.is_floating_point() and not key.endswith(("running_mean", "running_var"))
    }
