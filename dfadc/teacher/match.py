"""Matching of weights with architectures by names and shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.names import build_architecture, resolve_architecture, training_only_prefixes
from dfadc.networks.stems import Stem, first_convolution
from dfadc.teacher.candidates import own_candidates, torchvision_candidates
from dfadc.teacher.heads import ReplacedHead, last_layer, read_head

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_COUNTER = "num_batches_tracked"
#: Names of positional embeddings (1, cells, width) and of the convolutions that cut images into patches.
_POSITIONS = (
    ("encoder.pos_embedding", "conv_proj.weight"),
    ("pos_embed", "patch_embed.proj.weight"),
    ("embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight"),
)


@dataclass(slots=True)
class Identity:
    """The network of a teacher file; as a match an architecture whose weights have exactly these names and shapes.

    Args:
        architecture: canonical name, or the class of a whole module.
        stem: of the network to build; ``small`` only where the default stem does not fit.
        channels: C, read off the first convolution.
        num_classes: K, read off the last layer; the outputs have the last word.
        head: the classifier, where it is another than the architecture's.
        weights: what is loaded into the network; None where it is a whole module.
        module: the network, where it is there already.
        side: of the images, where a positional embedding tells it.
        notes: how it was found, for the user.
    """

    architecture: str
    stem: Stem = "default"
    channels: int | None = None
    num_classes: int | None = None
    head: ReplacedHead | None = None
    weights: Mapping[str, Tensor] | None = None
    module: nn.Module | None = None
    side: int | None = None
    notes: list[str] = field(default_factory=list)


def match_architecture(
    state_dict: Mapping[str, Tensor], *, input_size: tuple[int, int, int] | None = None
) -> list[Identity]:
    """Matches of these weights among torchvision's classifiers and our networks, for any channels and classes.

    Args:
        state_dict: weights by name, without wrapper prefixes.
        input_size: (C, H, W) where it is known; only vision transformers need it.
    """
    names = [*own_candidates(state_dict), *torchvision_candidates(state_dict)]
    return match_each(names, state_dict, input_size=input_size)


def match_each(
    names: Iterable[str],
    state_dict: Mapping[str, Tensor],
    *,
    stem: Stem | None = None,
    input_size: tuple[int, int, int] | None = None,
    has_other_head: bool = False,
) -> list[Identity]:
    """Matches of these weights among named architectures; the other arguments are those of :func:`match_one`."""
    matches = (
        match_one(name, state_dict, stem=stem, input_size=input_size, has_other_head=has_other_head) for name in names
    )
    return [match for match in matches if match is not None]


def match_one(
    name: str,
    state_dict: Mapping[str, Tensor],
    *,
    stem: Stem | None = None,
    input_size: tuple[int, int, int] | None = None,
    has_other_head: bool = False,
) -> Identity | None:
    """The match of these weights with one architecture, for any channels and classes; None where they do not fit.

    Args:
        name: the architecture.
        state_dict: weights by name.
        stem: the only stem to try; None tries the default one, then the small one, whose shapes the pooled one shares.
        input_size: as for :func:`match_architecture`; a positional embedding overrules it.
        has_other_head: whether the classifier is a linear layer, or a Sequential of linear and normalisation layers,
            that stands in another's place.
    """
    canonical = resolve_architecture(name).canonical
    weights = drop_auxiliary(canonical, state_dict)
    if (side := size_of_positions(state_dict)) is not None:
        input_size = (3, side, side)
    stems: tuple[Stem, ...] = ("default", "small") if stem is None else (stem,)
    for tried in stems:
        try:
            reference = reference_network(name, stem=tried, input_size=input_size)
        except DfadcError:
            continue
        channels, num_classes = read_shapes(reference, weights)
        if channels is None:
            continue
        if not has_other_head:
            if num_classes is not None and _fits(reference, weights):
                return Identity(canonical, tried, channels, num_classes)
            continue
        for path in _replaceable(reference):
            head = read_head(weights, path)
            linear = (layer for layer in reference.get_submodule(path).modules() if isinstance(layer, nn.Linear))
            if head is None or head.in_features != next(linear).in_features:
                continue
            if _fits(reference, weights, without=f"{path}."):
                return Identity(canonical, tried, channels, head.num_classes, head)
    return None


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
    head = last_layer(reference)
    if head is not None and (weight := state_dict.get(f"{head}.weight")) is not None and weight.ndim >= 2:
        num_classes = int(weight.shape[0])
    return channels, num_classes


def _replaceable(reference: nn.Module) -> list[str]:
    """Paths whose module may have been replaced: the last linear layer, and what holds no layers but such as it.

    A layer without weights that keeps the shape may stand there, too.
    """
    kept = (nn.Linear, nn.Sequential, nn.Dropout, nn.Identity)
    plain = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Tanh)
    head = last_layer(reference)
    if head is None or not isinstance(reference.get_submodule(head), nn.Linear):
        return []
    parts = head.split(".")
    paths = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return [
        path
        for path in paths
        if all(isinstance(layer, kept + plain) for layer in reference.get_submodule(path).modules())
    ]


def _fits(reference: nn.Module, state_dict: Mapping[str, Tensor], *, without: str | None = None) -> bool:
    """True where names are equal and shapes differ at most in the first layer's channels and the last one's classes."""
    expected = _compared(reference.state_dict(), without)
    given = _compared(state_dict, without)
    if expected.keys() != given.keys():
        return False
    first, head = first_convolution(reference), last_layer(reference)
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
