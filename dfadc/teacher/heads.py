"""Replaced classifiers, as ``fc = Sequential(Dropout, Linear)``, rebuilt from the weights' names."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Mapping

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "none": nn.Identity,
}
_LAYER = re.compile(r"^(?P<index>\d+)\.(?P<part>weight|bias|running_mean|running_var|num_batches_tracked)$")


@dataclass(frozen=True, slots=True)
class ReplacedHead:
    """A classifier that stands where a library's network has another.

    Args:
        path: of the replaced module.
        layers: index in the Sequential -> shapes of its tensors by name, in order; -1 is a linear layer by itself.
        activation: between two linear layers; None where it is unknown.
    """

    path: str
    layers: Mapping[int, Mapping[str, tuple[int, ...]]]
    activation: str | None = None

    @property
    def num_classes(self) -> int:
        """Outputs of the last layer."""
        return list(self.layers.values())[-1]["weight"][0]

    @property
    def in_features(self) -> int:
        """Features that the first linear layer takes."""
        return self.layers[self._linear[0]]["weight"][-1]

    @property
    def needs_activation(self) -> bool:
        """True where a layer without weights, and so of unknown kind, may stand between two linear ones."""
        return bool(self._gaps)

    def build(self) -> nn.Module:
        """The classifier with random weights."""
        layers = {index: _layer(shapes) for index, shapes in self.layers.items()}
        if -1 in layers:
            return layers[-1]
        layers |= {gap: _ACTIVATIONS[self.activation or "none"]() for gap in self._gaps}
        return nn.Sequential(OrderedDict((str(index), layer) for index, layer in sorted(layers.items())))

    @property
    def _linear(self) -> list[int]:
        return [index for index, shapes in self.layers.items() if len(shapes["weight"]) == 2]

    @property
    def _gaps(self) -> list[int]:
        """The first index without weights between each linear layer and the next."""
        free = [sorted({*range(*pair)} - self.layers.keys()) for pair in pairwise(self._linear)]
        return [between[0] for between in free if between]


def parse_activation(value: object) -> str:
    """The activation that ``--arch-arg activation=NAME`` names.

    Raises:
        DfadcError: it names none.
    """
    if isinstance(value, str) and value in _ACTIVATIONS:
        return value
    raise DfadcError(f"unknown activation {value!r}", f"it is one of {', '.join(_ACTIVATIONS)}")


def read_head(tensors: Mapping[str, Tensor], path: str) -> ReplacedHead | None:
    """The classifier under a path: one linear layer, or a Sequential of linear and normalisation layers."""
    inner = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items() if name.startswith(f"{path}.")}
    if inner.keys() in ({"weight", "bias"}, {"weight"}) and inner["weight"].ndim == 2:
        return ReplacedHead(path, {-1: {name: tuple(tensor.shape) for name, tensor in inner.items()}})
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tensor in inner.items():
        match = _LAYER.match(name)
        if match is None:
            return None
        layers.setdefault(int(match["index"]), {})[match["part"]] = tuple(tensor.shape)
    ordered = dict(sorted(layers.items()))
    weights = [shapes.get("weight", ()) for shapes in ordered.values()]
    if not weights or any(len(shape) not in (1, 2) for shape in weights) or len(weights[-1]) != 2:
        return None
    # Each layer takes what the one before gives.
    is_chained = all(shape[-1] == before[0] for before, shape in pairwise(weights))
    return ReplacedHead(path, ordered) if is_chained else None


def last_layer(module: nn.Module) -> str | None:
    """Path of the last linear layer, or of the last convolution of a network that has none."""
    for kind in (nn.Linear, nn.Conv2d):
        names: list[str] = [name for name, layer in module.named_modules() if isinstance(layer, kind)]
        if names:
            return names[-1]
    return None


def give_one_output_(module: nn.Module) -> None:
    """Replaces the last layer by one of a single output, with random weights, in place."""
    path = last_layer(module)
    assert path is not None, "its outputs were read off that layer"  # noqa: S101
    layer: Any = module.get_submodule(path)
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        module.set_submodule(path, nn.Linear(layer.in_features, 1, bias=has_bias))
    else:
        single = nn.Conv2d(layer.in_channels, 1, layer.kernel_size, layer.stride, layer.padding, bias=has_bias)
        module.set_submodule(path, single)


def _layer(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    weight = shapes["weight"]
    if len(weight) == 2:
        return nn.Linear(weight[1], weight[0], bias="bias" in shapes)
    return nn.BatchNorm1d(weight[0]) if "running_mean" in shapes else nn.LayerNorm(weight[0])
