"""Recognising an architecture by the names and shapes of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torchvision
from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.construct import torchvision_classifiers
from dfadc.networks.names import (
    build_architecture,
    resolve_architecture,
    training_only_prefixes,
)
from dfadc.networks.stems import Stem, first_convolution
from dfadc.networks.zoo import NETWORKS, SEGMENTERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_COUNTER = "num_batches_tracked"
#: How far a network's parameters may lie from the documented number before its exact shapes are compared:
#: another stem and other channels move them by less.
_TOLERANCE = 0.03
_TOLERANCE_PARAMETERS = 25_000


@dataclass(frozen=True, slots=True)
class Match:
    """An architecture whose weights have exactly these names and shapes.

    Args:
        architecture: canonical name.
        stem: ``small`` only where the default stem does not fit.
        channels: C, read off the first convolution.
        num_classes: K, read off the last layer.
    """

    architecture: str
    stem: Stem
    channels: int
    num_classes: int


def match_architecture(
    state_dict: Mapping[str, Tensor], *, input_size: tuple[int, int, int] | None = None
) -> list[Match]:
    """Every torchvision classifier and network of ours that these weights fit, for any channels and classes.

    Args:
        state_dict: weights by name, without wrapper prefixes.
        input_size: (C, H, W) where it is known; only vision transformers need it.
    """
    names = [*_own_candidates(state_dict), *_torchvision_candidates(state_dict)]
    matches = (match_one(name, state_dict, input_size=input_size) for name in names)
    return [match for match in matches if match is not None]


def match_one(
    name: str,
    state_dict: Mapping[str, Tensor],
    *,
    stem: Stem | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Match | None:
    """Whether these weights fit one architecture, for any channels and classes; None where they do not.

    Args:
        name: the architecture.
        state_dict: weights by name.
        stem: the only stem to try; None tries the default one, then the small one.
        input_size: as for :func:`match_architecture`.
    """
    canonical = resolve_architecture(name).canonical
    weights = drop_auxiliary(canonical, state_dict)
    stems: tuple[Stem, ...] = ("default", "small") if stem is None else (stem,)
    for tried in stems:
        try:
            reference = reference_network(name, stem=tried, input_size=input_size)
        except DfadcError:
            continue
        channels, num_classes = read_shapes(reference, weights)
        if channels is not None and num_classes is not None and _fits(reference, weights):
            return Match(canonical, tried, channels, num_classes)
    return None


def drop_auxiliary(canonical: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without those of classifiers that torchvision uses in training only."""
    prefixes = training_only_prefixes(canonical)
    return {key: tensor for key, tensor in state_dict.items() if not (prefixes and key.startswith(prefixes))}


def reference_network(name: str, *, stem: Stem, input_size: tuple[int, int, int] | None) -> nn.Module:
    """The architecture for 3 channels and 1000 classes, on the meta device."""
    side = 32 if resolve_architecture(name).library == "own" else 224
    _, height, width = input_size or (3, side, side)
    return build_architecture(name, ImageContract((3, height, width), 1000), stem=stem, device="meta").module


def read_shapes(reference: nn.Module, state_dict: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Channels and classes of the weights, read where the reference has its first convolution and its last layer."""
    channels = num_classes = None
    first = first_convolution(reference)
    if first is not None and (weight := state_dict.get(f"{first[0]}.weight")) is not None and weight.ndim == 4:
        channels = int(weight.shape[1]) * first[1].groups
    head = _head_name(reference)
    if head is not None and (weight := state_dict.get(f"{head}.weight")) is not None and weight.ndim >= 2:
        num_classes = int(weight.shape[0])
    return channels, num_classes


def _fits(reference: nn.Module, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether names are equal and shapes differ at most in the first layer's channels and the last one's classes."""
    expected = {key: tensor for key, tensor in reference.state_dict().items() if not key.endswith(_COUNTER)}
    given = {key: tensor for key, tensor in state_dict.items() if not key.endswith(_COUNTER)}
    if expected.keys() != given.keys():
        return False
    first, head = first_convolution(reference), _head_name(reference)
    for key, tensor in expected.items():
        wanted, found = list(tensor.shape), list(given[key].shape)
        if len(wanted) != len(found):
            return False
        if first is not None and key == f"{first[0]}.weight":
            wanted[1] = found[1]
        if key in (f"{head}.weight", f"{head}.bias"):
            wanted[0] = found[0]
        if wanted != found:
            return False
    return True


def _head_name(module: nn.Module) -> str | None:
    """The last linear layer, or the last convolution of a network that has none."""
    for kind in (nn.Linear, nn.Conv2d):
        names: list[str] = [name for name, layer in module.named_modules() if isinstance(layer, kind)]
        if names:
            return names[-1]
    return None


def _own_candidates(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
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


def _torchvision_candidates(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    """Classifiers whose documented number of parameters is near, whichever layer the classes sit in."""
    learned = {
        key: tensor
        for key, tensor in state_dict.items()
        if tensor.is_floating_point() and not key.endswith(("running_mean", "running_var"))
    }
    total = sum(tensor.numel() for tensor in learned.values())
    totals = {total}
    for key, tensor in learned.items():
        is_head = tensor.ndim == 2 or (tensor.ndim == 4 and tensor.shape[2:] == (1, 1))
        if is_head and (bias := learned.get(key.removesuffix("weight") + "bias")) is not None:
            rows = math.prod(tensor.shape[1:]) + 1
            totals.add(total + (1000 - bias.numel()) * rows)
    for name in torchvision_classifiers():
        weights = torchvision.models.get_model_weights(name)
        documented = int(next(iter(weights)).meta["num_params"])
        margin = _TOLERANCE * documented + _TOLERANCE_PARAMETERS
        # The documented number counts Inception's training-only classifier, GoogLeNet's not; compare these two always.
        if name in ("googlenet", "inception_v3") or any(abs(documented - corrected) <= margin for corrected in totals):
            yield f"torchvision:{name}"
