"""Layers of a student and the teacher's layers that they are parts of, by their names or by their order."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from dfadc.networks.flops import in_eval_mode
from dfadc.networks.norm_layers import is_batch_norm_with_statistics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

#: Base class of batch norms of any dimension.
BATCH_NORM = nn.modules.batchnorm._BatchNorm  # noqa: SLF001
#: Layers ahead of the next one that may run before it.
_MOST_BRANCHES = 4
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Pairing(NamedTuple):
    """Tensors and layers of a student, and the teacher's.

    Args:
        tensors: name in the student's state dict -> name in the teacher's.
        layers: name of a module of the student -> of the teacher. A batch norm that the teacher's file folded into a
            convolution belongs to that convolution.
        folded: the student's batch norms of that kind.
    """

    tensors: Mapping[str, str]
    layers: Mapping[str, str]
    folded: tuple[str, ...] = ()

    def given(self, teacher: nn.Module) -> dict[str, Tensor]:
        """The teacher's tensors by the student's names."""
        state = teacher.state_dict()
        return {name: state[theirs] for name, theirs in self.tensors.items()}


def pair(student: nn.Module, teacher: nn.Module, images: Tensor) -> Pairing | str:
    """The pairs by name, where the student's names are the teacher's, else by the order in which images reach layers.

    Args:
        student: of the teacher's family.
        teacher: of any origin; an ONNX graph has names of its own, and batch norms folded into convolutions.
        images: (N, C, H, W), any.

    Returns:
        The pairs, or why there are none.
    """
    own, given = student.state_dict(), teacher.state_dict()
    last, theirs = (["", *state][-1].rpartition(".")[0] for state in (own, given))
    unknown = next((name for name in own if name not in given), "")
    if not unknown and last == theirs:
        return Pairing({name: name for name in own}, {name: name for name, _ in student.named_modules()})
    pairs = _pair_by_order(student, teacher, images)
    if pairs is not None:
        return pairs
    return f"its last layer is {last}, the teacher's {theirs}" if last != theirs else f"the teacher has no {unknown}"


def _pair_by_order(student: nn.Module, teacher: nn.Module, images: Tensor) -> Pairing | None:
    """None where the layers are not of the same kinds in the same order."""
    own, given = (_layers_in_order(network, images) for network in (student, teacher))
    if {name.rpartition(".")[0] for name in student.state_dict()} - own.keys():
        return None  # weights that are no layer's, as class tokens
    tensors: dict[str, str] = {}
    layers: dict[str, str] = {}
    folded: list[str] = []
    rest = dict(given)
    layer: nn.Module | None = None
    for name, module in own.items():
        # Branches of a block may run in another order there.
        ahead = [each for each in [*rest][:_MOST_BRANCHES] if rest[each].sizes == module.sizes]
        theirs = next((each for each in ahead if is_part(module.layer, rest[each].layer)), None)
        if theirs is not None:
            layer = rest.pop(theirs).layer
            keys = [
                key for key in module.layer.state_dict() if key != "num_batches_tracked" and key in layer.state_dict()
            ]
            tensors |= {tensor_name(name, key): tensor_name(theirs, key) for key in keys}
            layers[name] = theirs
        elif _can_hold_bias(module.layer) and isinstance(layer, _WEIGHTED) and layer.bias is not None:
            layers[name] = [*layers.values()][-1]
            tensors[tensor_name(name, "bias")] = tensor_name(layers[name], "bias")
            folded.append(name)
        else:
            return None
    return None if rest or not tensors else Pairing(tensors, layers, tuple(folded))


def _can_hold_bias(layer: nn.Module) -> bool:
    """True for a batch norm that a file may have folded away, whose bias is then the convolution's."""
    return isinstance(layer, BATCH_NORM) and layer.affine and layer.track_running_stats


def tensor_name(layer: str, tensor: str) -> str:
    """Name of a layer's tensor in the state dict; the network may be the layer itself."""
    return f"{layer}.{tensor}" if layer else tensor


def is_part(layer: nn.Module, original: nn.Module) -> bool:
    """True for a layer that is the original with fewer channels: of one kind, kernel and stride."""
    if kind_of(layer) is not kind_of(original):
        return False
    own, given = layer.state_dict(), original.state_dict()
    shapes = [(tensor.shape, given[key].shape) for key, tensor in own.items() if key in given and tensor.ndim]
    missing = set(own) - set(given) - {"num_batches_tracked", "bias"}  # a bias that is 0 may not be in a file
    return not missing and stride_of(layer) == stride_of(original) and all(is_narrower(*each) for each in shapes)


def stride_of(layer: nn.Module) -> object:
    """The strides along both axes, 1 for layers without any."""
    stride = getattr(layer, "stride", 1)
    return (stride, stride) if isinstance(stride, int) else stride


def is_narrower(smaller: torch.Size, larger: torch.Size) -> bool:
    """True where a tensor of outputs, inputs and a kernel has no more of the first two, and the same kernel.

    Class tokens and positions (1, N, D) have their channels last, and the same positions.
    """
    if len(smaller) != len(larger):
        return False
    if len(smaller) == 3 and smaller[:2] == larger[:2] and smaller[0] == 1:
        return smaller[2] <= larger[2]
    return smaller[2:] == larger[2:] and all(own <= given for own, given in zip(smaller, larger, strict=True))


def kind_of(layer: nn.Module) -> type | None:
    """Class of layers that this one belongs to; None for layers without weights, and for other ones."""
    if is_batch_norm_with_statistics(layer):  # those of exported graphs have a class of their own
        return BATCH_NORM
    return next((kind for kind in (*_WEIGHTED, BATCH_NORM) if isinstance(layer, kind)), None)


class _Reached(NamedTuple):
    """Layer, and height and width of the maps that it takes and gives; () of vectors."""

    layer: nn.Module
    sizes: tuple[torch.Size, torch.Size]


@torch.no_grad()
def _layers_in_order(network: nn.Module, images: Tensor) -> dict[str, _Reached]:
    """Layers with weights in the order in which images reach them."""
    layers = {name: module for name, module in network.named_modules() if kind_of(module) is not None}
    reached: dict[str, _Reached] = {}

    def note(name: str, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        reached.setdefault(name, _Reached(module, (given[0].shape[2:], output.shape[2:])))

    with in_eval_mode(network), ExitStack() as hooks:
        for name, module in layers.items():
            hooks.callback(module.register_forward_hook(partial(note, name)).remove)
        network(images)
    return reached
