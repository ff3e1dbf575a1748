"""Weights inherited from the teacher, for a student that is the teacher made narrower or shallower."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dfadc.student.build import Student
    from dfadc.teacher.load import Teacher

#: How many channels a teacher and its student have where they correspond.
Widths = tuple[int, int]


def inherit(student: Student, teacher: Teacher, wish: Literal["auto", "on"]) -> Student:
    """A student that starts from its teacher's weights where its architecture allows it.

    Args:
        student: freshly built.
        teacher: whose weights it gets.
        wish: ``auto`` leaves random weights to a student that is no smaller copy, ``on`` refuses it.

    Raises:
        DfadcError: the student is no smaller copy of the teacher, and ``wish`` is ``on``.
    """
    if inherit_weights_(student.module, teacher.module):
        note = (
            f"starts as {teacher.architecture} made smaller, from the teacher's weights (student.inherit); --set "
            "student.inherit=off starts from random ones"
        )
        return replace(student, notes=(*student.notes, note), is_inherited=True)
    if wish == "on":
        raise DfadcError(
            f"student.inherit = on, and {student.architecture} is not the teacher {teacher.architecture} made narrower "
            "or shallower",
            "--set student.inherit=auto, or a student of the teacher's own family",
        )
    return student


def inherit_weights_(student: nn.Module, teacher: nn.Module) -> bool:
    """Gives a student the teacher's weights of the same names, of each layer the channels that weigh most.

    Nothing is known of how layers are connected: channels are chosen once for each pair of widths, so that layers whose
    channels are added up, or feed each other, keep the same ones. Source: weight selection (Xu et al. 2024, arXiv
    2311.18823). Deviation: the channels with most of the weights' energy instead of evenly spaced ones.

    Args:
        student: its parameters and statistics are overwritten, or left as they are.
        teacher: is left as it is.

    Returns:
        Whether the student is a smaller copy of the teacher: each of its tensors has one of the same name in the
        teacher, as large or larger and with the same kernel; both end in the same layer, move in the same strides, and
        something is smaller.
    """
    if not _is_smaller_copy(student, teacher):
        return False
    own, given = student.state_dict(), teacher.state_dict()
    kept = _choose_channels(dict(student.named_parameters()), given)
    for name, tensor in own.items():
        selected = given[name]
        for axis, widths in enumerate(zip(selected.shape, tensor.shape, strict=True)):
            if widths[0] != widths[1]:
                # A buffer as long as no weight is wide: its beginning.
                chosen = kept.get(widths, torch.arange(widths[1]))
                selected = selected.index_select(axis, chosen.to(selected.device))
        tensor.copy_(selected)
    return True


class Correspondence(NamedTuple):
    """Layer of a student and the teacher's layer that it is a part of.

    Args:
        student: the layer.
        teacher: the teacher's layer of the same name.
        channels: (C,), those of the teacher's that the student's C stand for.
        axis: where both have their channels.
    """

    student: nn.Module
    teacher: nn.Module
    channels: Tensor
    axis: int


def corresponding_layers(student: nn.Module, teacher: nn.Module) -> list[Correspondence]:
    """The layers of a student that is its teacher made narrower, as :func:`inherit_weights_` chooses their channels.

    They are the batch norms, whose outputs have the same scale in both; without any, convolutions and linear layers
    but for those that are not narrower, as the last one. A student with fewer layers has none that correspond: what
    follows a layer is not the same then.

    Returns:
        Nothing for any other student, and for a teacher whose layers take no hooks.
    """
    own, given = student.state_dict(), teacher.state_dict()
    if own.keys() != given.keys() or not _is_smaller_copy(student, teacher):
        return []
    kept = _choose_channels(dict(student.named_parameters()), given)
    named = dict(teacher.named_modules())
    pairs = [(layer, named[name]) for name, layer in student.named_modules() if name in named]
    pairs = [(layer, original) for layer, original in pairs if type(layer) is type(original)]
    norms = [pair for pair in pairs if isinstance(pair[0], nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001
    others = [pair for pair in pairs if isinstance(pair[0], nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    layers = []
    for layer, original in norms or others:
        statistics = "running_mean" if norms else "weight"
        narrow, wide = (getattr(each, statistics, None) for each in (layer, original))
        if narrow is None or wide is None or (len(narrow) == len(wide) and not norms):
            continue
        everything = torch.arange(len(wide))
        channels = everything if len(narrow) == len(wide) else kept.get((len(wide), len(narrow)))
        if channels is not None:
            axis = -1 if isinstance(layer, nn.Linear) else 1
            layers.append(Correspondence(layer, original, channels.to(wide.device), axis))
    return layers


def _is_smaller_copy(student: nn.Module, teacher: nn.Module) -> bool:
    own, given = student.state_dict(), teacher.state_dict()
    if list(own)[-1:] != list(given)[-1:] or not all(name in given for name in own):
        return False
    pairs = [(given[name].shape, tensor.shape) for name, tensor in own.items()]
    if len(own) == len(given) and all(larger == smaller for larger, smaller in pairs):
        return False
    return all(_is_narrower(smaller, larger) for larger, smaller in pairs) and _have_same_strides(student, teacher)


def _have_same_strides(student: nn.Module, teacher: nn.Module) -> bool:
    """True where layers of one name give maps of one size: a small stem takes strides away, and pooling."""
    layers = dict(teacher.named_modules())
    pairs = [(layer, layers[name]) for name, layer in student.named_modules() if name in layers]
    return all(_stride(layer) == _stride(other) for layer, other in pairs)


def _stride(layer: nn.Module) -> object:
    stride = getattr(layer, "stride", 1)
    return (stride, stride) if isinstance(stride, int) else stride


def _is_narrower(smaller: torch.Size, larger: torch.Size) -> bool:
    """A tensor has outputs, inputs and a kernel; the kernel is the same."""
    if len(smaller) != len(larger) or smaller[2:] != larger[2:]:
        return False
    return all(own <= given for own, given in zip(smaller, larger, strict=True))


@torch.no_grad()
def _choose_channels(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[Widths, Tensor]:
    """For each pair of widths the indices of the channels to keep, in order; on the CPU, for MPS has no doubles."""
    scores: dict[Widths, Tensor] = {}
    flattened: dict[Widths, tuple[Widths, int]] = {}
    outputs = (0, 0)
    for name, tensor in own.items():
        energy = given[name].cpu().double().square()
        energy /= energy.sum().clamp_min(1e-30)
        for axis, widths in enumerate(zip(energy.shape[:2], tensor.shape[:2], strict=True)):
            score, channels = energy.movedim(axis, 0).reshape(widths[0], -1).sum(1), widths
            if axis == 1 and widths not in scores and (size := _pixels(widths, outputs)):
                flattened[widths] = outputs, size
                score, channels = score.view(-1, size).sum(1), outputs
            scores[channels] = scores.get(channels, torch.zeros(())) + score
        if tensor.ndim > 1:
            outputs = (len(energy), len(tensor))
    kept = {widths: score.topk(widths[1]).indices.sort().values for widths, score in scores.items()}
    for widths, (channels, size) in flattened.items():
        kept[widths] = (size * kept[channels][:, None] + torch.arange(size)).flatten()
    return kept


def _pixels(widths: Widths, channels: Widths) -> int:
    """Features of a flattened map that a layer takes for each channel; 0 where its input is no flattened map."""
    sizes = [divmod(width, max(channel, 1)) for width, channel in zip(widths, channels, strict=True)]
    (size, rest), other = sizes
    return size if (size, rest) == other and rest == 0 and size > 1 else 0
