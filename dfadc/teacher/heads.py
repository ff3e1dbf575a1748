"""Replaced classifiers, as ``fc = Sequential(Dropout, Linear)``, rebuilt from the weights' names."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Mapping

Activation = Literal["relu", "gelu", "silu", "hardswish", "tanh", "sigmoid", "leaky_relu", "elu", "none"]

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
        layers: index in the Sequential -> shapes of its tensors by name; index None is a single linear layer.
        activation: between two linear layers; None where it is unknown.
    """

    path: str
    layers: Mapping[int | None, Mapping[str, tuple[int, ...]]]
    activation: Activation | None = None

    @property
    def num_classes(self) -> int:
        """Outputs of the last layer."""
        last = next(reversed(list(self.layers.values())))
        return last["weight"][0]

    @property
    def in_features(self) -> int:
        """Features that the first linear layer takes."""
        return next(shapes["weight"][-1] for shapes in self.layers.values() if len(shapes["weight"]) == 2)

    @property
    def needs_activation(self) -> bool:
        """True where a layer without weights, and so of unknown kind, may stand between two linear ones."""
        linear = [index for index, shapes in self.layers.items() if len(shapes["weight"]) == 2 and index is not None]
        return any(self._gap_after(index) is not None for index in linear[:-1])

    def build(self) -> nn.Module:
        """The classifier with random weights."""
        if None in self.layers:
            return _layer(self.layers[None])
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, shapes in self.layers.items():
            assert index is not None, "checked above"  # noqa: S101
            layers[str(index)] = _layer(shapes)
            gap = self._gap_after(index) if len(shapes["weight"]) == 2 else None
            if gap is not None:
                layers[str(gap)] = _ACTIVATIONS[self.activation or "none"]()
        ordered = OrderedDict(sorted(layers.items(), key=lambda entry: int(entry[0])))
        return nn.Sequential(ordered)

    def _gap_after(self, index: int) -> int | None:
        """The first index without weights after a linear layer and before the next one."""
        later = [each for each in self.layers if each is not None and each > index]
        following = [each for each in later if len(self.layers[each]["weight"]) == 2]
        if not following:
            return None
        return next((each for each in range(index + 1, following[0]) if each not in self.layers), None)


def parse_activation(value: object) -> Activation:
    """The activation that ``--arch-arg activation=NAME`` names.

    Raises:
        DfadcError: it names none.
    """
    if isinstance(value, str) and value in _ACTIVATIONS:
        return value  # type: ignore[return-value]
    raise DfadcError(f"unknown activation {value!r}", f"it is one of {', '.join(_ACTIVATIONS)}")


def read_head(tensors: Mapping[str, Tensor], path: str) -> ReplacedHead | None:
    """The classifier under a path: one linear layer, or a Sequential of linear and normalisation layers."""
    inner = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items() if name.startswith(f"{path}.")}
    if inner.keys() in ({"weight", "bias"}, {"weight"}) and inner["weight"].ndim == 2:
        return ReplacedHead(path, {None: {name: tuple(tensor.shape) for name, tensor in inner.items()}})
    layers: dict[int | None, dict[str, tuple[int, ...]]] = {}
    for name, tensor in inner.items():
        match = _LAYER.match(name)
        if match is None:
            return None
        layers.setdefault(int(match["index"]), {})[match["part"]] = tuple(tensor.shape)
    ordered = dict(sorted(layers.items(), key=lambda entry: entry[0] or 0))
    if not ordered or any("weight" not in shapes for shapes in ordered.values()):
        return None
    if any(len(shapes["weight"]) not in (1, 2) for shapes in ordered.values()):
        return None
    last = next(reversed(list(ordered.values())))
    is_chained = _is_chained([shapes["weight"] for shapes in ordered.values()])
    return ReplacedHead(path, ordered) if len(last["weight"]) == 2 and is_chained else None


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


def _is_chained(shapes: list[tuple[int, ...]]) -> bool:
    """True where each layer takes what the one before gives."""
    width: int | None = None
    for shape in shapes:
        if width is not None and shape[-1] != width:
            return False
        width = shape[0]
    return True


def _layer(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    weight = shapes["weight"]
    if len(weight) == 2:
        return nn.Linear(weight[1], weight[0], bias="bias" in shapes)
    return nn.BatchNorm1d(weight[0]) if "running_mean" in shapes else nn.LayerNorm(weight[0])
