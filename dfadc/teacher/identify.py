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
from dfadc.teacher.heads import ReplacedHead, read_head

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_COUNTER = "num_batches_tracked"
#: How far a network's parameters may lie from the documented number before its exact shapes are compared:
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
#: Names of positional embeddings (1, cells, width) and of the convolutions that cut images into patches.
_POSITIONS = (
    ("encoder.pos_embedding", "conv_proj.weight"),
    ("pos_embed", "patch_embed.proj.weight"),
    ("embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight"),
)


@dataclass(frozen=True, slots=True)
class Match:
    """An architecture whose weights have exactly these names and shapes.

    Args:
        architecture: canonical name.
        stem: ``small`` only where the default stem does not fit.
        channels: C, read off the first convolution.
        num_classes: K, read off the last layer.
        head: the classifier, where it is another than the architecture's.
    """

    architecture: str
    stem: Stem
    channels: int
    num_classes: int
    head: ReplacedHead | None = None


def match_architecture(
    state_dict: Mapping[str, Tensor], *, input_size: tuple[int, int, int] | None = None
) -> list[Match]:
    """Matches of these weights among torchvision's classifiers and our networks, for any channels and classes.

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
    """The match of these weights with one architecture, for any channels and classes; None where they do not fit.

    Args:
        name: the architecture.
        state_dict: weights by name.
        stem: the only stem to try; None tries the default one, then the small one, whose shapes the pooled one shares.
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


def match_with_other_head(
    name: str,
    state_dict: Mapping[str, Tensor],
    *,
    stem: Stem | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Match | None:
    """The match of all weights but the classifier's, where that is a Sequential of linear and normalisation layers."""
    canonical = resolve_architecture(name).canonical
    weights = drop_auxiliary(canonical, state_dict)
    stems: tuple[Stem, ...] = ("default", "small") if stem is None else (stem,)
    for tried in stems:
        try:
            reference = reference_network(name, stem=tried, input_size=input_size)
        except DfadcError:
            continue
        channels, _ = read_shapes(reference, weights)
        for path in _replaceable(reference):
            head = read_head(weights, path)
            if head is None or channels is None or head.in_features != _in_features(reference, path):
                continue
            if _fits(reference, weights, without=f"{path}."):
                return Match(canonical, tried, channels, head.num_classes, head)
    return None


def match_any_head(state_dict: Mapping[str, Tensor], *, input_size: tuple[int, int, int] | None = None) -> list[Match]:
    """Matches among torchvision's classifiers of weights whose classifier is another than the architecture's."""
    matches = (match_with_other_head(name, state_dict, input_size=input_size) for name in _with_other_head(state_dict))
    return [match for match in matches if match is not None]


def size_of_positions(state_dict: Mapping[str, Tensor]) -> int | None:
    """Side of the images that a vision transformer's positional embedding is made for; None for other networks."""
    for positions_name, patches_name in _POSITIONS:
        positions, patches = state_dict.get(positions_name), state_dict.get(patches_name)
        if positions is None or patches is None or positions.ndim != 3 or patches.ndim != 4:
            continue
        for extra in (1, 0, 2):
            cells = math.isqrt(max(0, positions.shape[1] - extra))
            if cells and cells * cells + extra == positions.shape[1]:
                return cells * int(patches.shape[2])
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


def _replaceable(reference: nn.Module) -> list[str]:
    """Paths whose module may have been replaced: the last linear layer, and what holds linear layers and no others."""
    head = _head_name(reference)
    if head is None or not isinstance(reference.get_submodule(head), nn.Linear):
        return []
    parts = head.split(".")
    paths = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return [path for path in paths if all(map(_is_linear_or_plain, reference.get_submodule(path).modules()))]


def _is_linear_or_plain(layer: nn.Module) -> bool:
    """True for a linear layer, for a Sequential, and for a layer without weights that keeps the shape."""
    kept = (
        nn.Linear,
        nn.Sequential,
        nn.Dropout,
        nn.ReLU,
        nn.ReLU6,
        nn.Hardswish,
        nn.SiLU,
        nn.GELU,
        nn.Tanh,
        nn.Identity,
    )
    return isinstance(layer, kept)


def _in_features(reference: nn.Module, path: str) -> int:
    layers = reference.get_submodule(path).modules()
    return next(int(layer.in_features) for layer in layers if isinstance(layer, nn.Linear))


def _fits(reference: nn.Module, state_dict: Mapping[str, Tensor], *, without: str | None = None) -> bool:
    """True where names are equal and shapes differ at most in the first layer's channels and the last one's classes."""
    expected = _compared(reference.state_dict(), without)
    given = _compared(state_dict, without)
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


def _compared(state_dict: Mapping[str, Tensor], without: str | None) -> dict[str, Tensor]:
    return {
        key: tensor
        for key, tensor in state_dict.items()
        if not key.endswith(_COUNTER) and not (without and key.startswith(without))
    }


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


def _with_other_head(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    """Classifiers whose documented number of parameters leaves room for their own head alone, beside these weights."""
    body = sum(
        tensor.numel()
        for key, tensor in _learned(state_dict).items()
        if key.partition(".")[0] not in ("fc", "classifier", "head", "heads")
    )
    for name in _families_of(state_dict):
        documented = int(next(iter(torchvision.models.get_model_weights(name))).meta["num_params"])
        rooms = _LARGE_HEADS if name.startswith(("vgg", "alexnet")) else _HEADS
        if rooms[0] <= documented - body <= rooms[1]:
            yield f"torchvision:{name}"


def _families_of(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    """Torchvision's classifiers whose first weights have a name that these weights have, too."""
    for name in torchvision_classifiers():
        first = next((key for family, key in _FIRST_NAMES.items() if name.startswith(family)), None)
        if first is None or first in state_dict:
            yield name


def _learned(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: tensor
        for key, tensor in state_dict.items()
        if tensor.is_floating_point() and not key.endswith(("running_mean", "running_var"))
    }


def totals_of(state_dict: Mapping[str, Tensor]) -> set[int]:
    """Parameters that these weights would have with 1000 classes, whichever layer the classes sit in."""
    learned = _learned(state_dict)
    total = sum(tensor.numel() for tensor in learned.values())
    totals = {total}
    for key, tensor in learned.items():
        is_head = tensor.ndim == 2 or (tensor.ndim == 4 and tensor.shape[2:] == (1, 1))
        if is_head and (bias := learned.get(key.removesuffix("weight") + "bias")) is not None:
            rows = math.prod(tensor.shape[1:]) + 1
            totals.add(total + (1000 - bias.numel()) * rows)
    return totals


def nearest_names(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Torchvision's classifiers whose weights begin alike, the nearest in their number of parameters first."""
    totals = totals_of(state_dict)
    found = []
    for name in _families_of(state_dict):
        documented = int(next(iter(torchvision.models.get_model_weights(name))).meta["num_params"])
        found.append((min(abs(documented - total) for total in totals), f"torchvision:{name}"))
    return [name for _, name in sorted(found)[:_NEAREST]]


def is_near(documented: int, totals: set[int]) -> bool:
    """True where one of the totals is about the documented number of parameters."""
    margin = _TOLERANCE * documented + _TOLERANCE_PARAMETERS
    return any(abs(documented - total) <= margin for total in totals)


def _torchvision_candidates(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    """Classifiers whose documented number of parameters is near."""
    totals = totals_of(state_dict)
    for name in _families_of(state_dict):
        documented = int(next(iter(torchvision.models.get_model_weights(name))).meta["num_params"])
        # The documented number counts Inception's training-only classifier, GoogLeNet's not; compare these two always.
        if name in ("googlenet", "inception_v3") or is_near(documented, totals):
            yield f"torchvision:{name}"
