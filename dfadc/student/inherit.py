"""Weights inherited from the teacher, for a student that is the teacher made narrower or shallower."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dfadc.errors import DfadcError
from dfadc.networks.adaptation import random_images
from dfadc.student.attention import find_attention
from dfadc.student.channels import choose_channels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dfadc.student.build import Student
    from dfadc.student.channels import Kept
    from dfadc.teacher.load import Teacher


def inherit(student: Student, teacher: Teacher, wish: Literal["auto", "on", "off"]) -> Student:
    """A student that starts from its teacher's weights where its architecture allows it.

    Args:
        student: freshly built.
        teacher: whose weights it gets.
        wish: ``auto`` leaves random weights to a student that is no smaller copy, ``on`` refuses it, ``off`` leaves
            them in any case.

    Returns:
        The student; it knows the teacher's channels that it stands for where it is a smaller copy.

    Raises:
        DfadcError: the student is no smaller copy of the teacher, and ``wish`` is ``on``.
    """
    reason = why_no_copy(student.module, teacher.module)
    if reason and wish == "on":
        raise DfadcError(
            f"student.inherit = on, and {student.architecture} is not the teacher {teacher.architecture} made narrower "
            f"or shallower: {reason}",
            "--set student.inherit=auto, or a student of the teacher's own family",
        )
    if reason:
        note = f"starts from random weights, for it is not the teacher made smaller: {reason}"
        return student if wish == "off" else replace(student, notes=(*student.notes, note))
    kept = choose_channels(student.module, teacher.module, random_images(teacher.contract))
    if wish == "off":
        return replace(student, kept=kept)
    copy_weights_(student.module, teacher.module, kept)
    note = (
        f"starts as {teacher.architecture} made smaller, from the teacher's weights (student.inherit); --set "
        "student.inherit=off starts from random ones"
    )
    return replace(student, notes=(*student.notes, note), kept=kept, is_inherited=True)


def why_no_copy(student: nn.Module, teacher: nn.Module) -> str:
    """Why a student is not its teacher made smaller; empty where it is.

    It is where each of its tensors has one of the same name in the teacher, as large or larger and with the same
    kernel; both end in the same layer, move in the same strides, attention has heads to leave out, and something is
    smaller.
    """
    own, given = student.state_dict(), teacher.state_dict()
    if list(own)[-1:] != list(given)[-1:]:
        return f"its last layer is {_last_layer(own)}, the teacher's {_last_layer(given)}"
    if unknown := next((name for name in own if name not in given), None):
        return f"the teacher has no {unknown}"
    if len(own) == len(given) and all(tensor.shape == given[name].shape for name, tensor in own.items()):
        return "nothing is smaller"
    for name, tensor in own.items():
        if not _is_narrower(tensor.shape, given[name].shape):
            return f"{name} is {tuple(tensor.shape)}, the teacher's {tuple(given[name].shape)}"
    return _other_strides(student, teacher) or _other_heads(student, teacher)


def _last_layer(state: Mapping[str, Tensor]) -> str:
    return ["", *state][-1].rpartition(".")[0] or "one without a name"


@torch.no_grad()
def copy_weights_(student: nn.Module, teacher: nn.Module, kept: Kept) -> None:
    """Gives a student the teacher's weights of the same names, of each layer the channels that it keeps.

    Source: weight selection (Xu et al. 2024, arXiv 2311.18823). Deviation: the channels with most of the weights'
    energy instead of evenly spaced ones.

    Args:
        student: a smaller copy; its parameters and statistics are overwritten.
        teacher: is left as it is.
        kept: by :func:`dfadc.student.channels.choose_channels`.
    """
    given = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        selected = given[name]
        for axis in range(tensor.ndim):
            if (channels := kept.get((name, axis))) is not None:
                selected = selected.index_select(axis, channels.to(selected.device))
        tensor.copy_(selected)


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


def corresponding_layers(student: nn.Module, teacher: nn.Module, kept: Kept | None) -> list[Correspondence]:
    """The layers of a student that is its teacher made narrower.

    They are the batch norms, whose outputs have the same scale in both; without any, convolutions and linear layers
    but for those that are not narrower, as the last one. A student with fewer layers has none that correspond: what
    follows a layer is not the same then.

    Args:
        student: the student.
        teacher: the teacher.
        kept: the teacher's channels that the student stands for; None: it is no smaller copy.

    Returns:
        Nothing for any other student, and for a teacher whose layers take no hooks.
    """
    if kept is None or student.state_dict().keys() != teacher.state_dict().keys():
        return []
    pairs = paired_layers(student, teacher, kept)
    norms = [pair for pair in pairs if isinstance(pair.student, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001
    others = [
        pair
        for pair in pairs
        if isinstance(pair.student, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
        and len(pair.channels) < len(pair.teacher.get_parameter("weight"))
    ]
    return norms or others


def paired_layers(student: nn.Module, teacher: nn.Module, kept: Kept) -> list[Correspondence]:
    """Batch norms, convolutions and linear layers of a smaller copy with the teacher's of the same name."""
    named, pairs = dict(teacher.named_modules()), []
    for name, layer in student.named_modules():
        original = named.get(name)
        if original is None or type(layer) is not type(original) or not isinstance(layer, _LAYERS):
            continue
        tensor = next((key for key in ("weight", "running_mean") if getattr(layer, key, None) is not None), None)
        if tensor is None:
            continue
        wide = getattr(original, tensor)
        channels = kept.get((f"{name}.{tensor}", 0), torch.arange(len(wide)))
        axis = -1 if isinstance(layer, nn.Linear) else 1
        pairs.append(Correspondence(layer, original, channels.to(wide.device), axis))
    return pairs


#: Layers with channels that a student's can be compared with.
_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # noqa: SLF001


def _other_strides(student: nn.Module, teacher: nn.Module) -> str:
    """A layer that moves in other strides: a small stem takes strides away, and pooling."""
    layers = dict(teacher.named_modules())
    for name, layer in student.named_modules():
        if name in layers and _stride(layer) != _stride(layers[name]):
            return f"{name} moves in other strides, and its maps have another size (student.stem)"
    return ""


def _stride(layer: nn.Module) -> object:
    stride = getattr(layer, "stride", 1)
    return (stride, stride) if isinstance(stride, int) else stride


def _other_heads(student: nn.Module, teacher: nn.Module) -> str:
    """An attention block whose heads the teacher does not have."""
    own, given = student.state_dict(), teacher.state_dict()
    theirs = find_attention(teacher)
    for name, block in find_attention(student).items():
        original, part = theirs.get(name), block.parts[0]
        if original is None:
            continue
        sizes = [state[part.name].shape[part.axis] // part.copies for state in (own, given)]
        (size, rest), (wide, others) = (
            divmod(count, each.num_heads) for count, each in zip(sizes, (block, original), strict=True)
        )
        if rest or others or block.num_heads > original.num_heads or size > wide:
            return (
                f"{name} has {block.num_heads} heads of {sizes[0]} channels in all, the teacher's {original.num_heads} "
                f"of {sizes[1]}: neither heads nor channels of each can be left out"
            )
    return ""


def _is_narrower(smaller: torch.Size, larger: torch.Size) -> bool:
    """A tensor has outputs, inputs and a kernel; the kernel is the same.

    Class tokens and positions (1, N, D) have their channels last, and the same positions.
    """
    if len(smaller) != len(larger):
        return False
    if len(smaller) == 3 and smaller[:2] == larger[:2] and smaller[0] == 1:
        return smaller[2] <= larger[2]
    return smaller[2:] == larger[2:] and all(own <= given for own, given in zip(smaller, larger, strict=True))
