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
from dfadc.student.pairing import BATCH_NORM, is_narrower, kind_of, pair, stride_of, tensor_name

if TYPE_CHECKING:
    from dfadc.student.build import Student
    from dfadc.student.channels import Kept
    from dfadc.student.pairing import Pairing
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
    found = find_copy(student.module, teacher.module, random_images(teacher.contract))
    if isinstance(found, str):
        if wish == "on":
            raise DfadcError(
                f"student.inherit = on, and {student.architecture} is not the teacher {teacher.architecture} made "
                f"narrower or shallower: {found}",
                "--set student.inherit=auto, or a student of the teacher's own family",
            )
        note = f"starts from random weights, for it is not the teacher made smaller: {found}"
        return student if wish == "off" else replace(student, notes=(*student.notes, note))
    if wish == "off":
        return replace(student, copy=found)
    copy_weights_(student.module, teacher.module, found)
    note = (
        f"starts as {teacher.architecture} made smaller, from the teacher's weights (student.inherit); --set "
        "student.inherit=off starts from random ones"
    )
    return replace(student, notes=(*student.notes, note), copy=found, is_inherited=True)


class SmallerCopy(NamedTuple):
    """Student that is its teacher made smaller.

    Args:
        pairing: its tensors and layers, and the teacher's.
        kept: the teacher's channels that it keeps.
    """

    pairing: Pairing
    kept: Kept


def find_copy(student: nn.Module, teacher: nn.Module, images: Tensor) -> SmallerCopy | str:
    """The part of its teacher that a student is, or why it is none.

    It is where each of its tensors has one in the teacher, as large or larger and with the same kernel; both end in the
    same layer, move in the same strides, attention has heads to leave out, and something is smaller.

    Args:
        student: the student.
        teacher: in eval mode.
        images: (N, C, H, W), any.
    """
    pairing = pair(student, teacher, images)
    if isinstance(pairing, str):
        return pairing
    own, given = student.state_dict(), pairing.given(teacher)
    same = all(own[name].shape == tensor.shape for name, tensor in given.items())
    if same and len(given) == len(teacher.state_dict()):
        return "nothing is smaller"
    for name, tensor in given.items():
        if not is_narrower(own[name].shape, tensor.shape):
            return f"{name} is {tuple(own[name].shape)}, the teacher's {tuple(tensor.shape)}"
    if reason := _other_strides(student, teacher, pairing) or _other_heads(student, teacher, pairing):
        return reason
    return SmallerCopy(pairing, choose_channels(student, teacher, pairing, images))


@torch.no_grad()
def copy_weights_(student: nn.Module, teacher: nn.Module, copy: SmallerCopy) -> None:
    """Gives a student the teacher's weights, of each layer the channels that it keeps.

    Source: weight selection (Xu et al. 2024, arXiv 2311.18823). Deviation: the channels with most of the weights'
    energy instead of evenly spaced ones.

    Args:
        student: a smaller copy; its parameters and statistics are overwritten.
        teacher: is left as it is.
        copy: what it is a part of.
    """
    own = student.state_dict()
    for name in copy.pairing.folded:  # whatever they are initialised with: some networks begin with weight 0
        own[tensor_name(name, "weight")].fill_(1)
        own[tensor_name(name, "running_mean")].fill_(0)
        own[tensor_name(name, "running_var")].fill_(1)
    for name in own.keys() - copy.pairing.tensors.keys():
        if name.endswith("bias"):  # the teacher has none
            own[name].fill_(0)
    for name, selected in copy.pairing.given(teacher).items():
        for axis in range(selected.ndim):
            if (channels := copy.kept.get((name, axis))) is not None:
                selected = selected.index_select(axis, channels.to(selected.device))  # noqa: PLW2901
        own[name].copy_(selected)


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


def corresponding_layers(student: nn.Module, teacher: nn.Module, copy: SmallerCopy | None) -> list[Correspondence]:
    """The layers of a student that is its teacher made narrower.

    They are the batch norms, whose outputs have the same scale in both; without any, convolutions and linear layers
    but for those that are not narrower, as the last one. A student with fewer layers has none that correspond: what
    follows a layer is not the same then.

    Args:
        student: the student.
        teacher: the teacher.
        copy: what the student is a part of; None: it is no smaller copy.

    Returns:
        Nothing for any other student, and for a teacher whose layers take no hooks.
    """
    if copy is None or set(copy.pairing.tensors.values()) != teacher.state_dict().keys():
        return []
    pairs = paired_layers(student, teacher, copy)
    norms = [pair for pair in pairs if isinstance(pair.student, BATCH_NORM)]
    others = [
        pair
        for pair in pairs
        if isinstance(pair.student, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
        and len(pair.channels) < len(pair.teacher.get_parameter("weight"))
    ]
    return norms or others


def paired_layers(student: nn.Module, teacher: nn.Module, copy: SmallerCopy) -> list[Correspondence]:
    """Batch norms, convolutions and linear layers of a smaller copy with the teacher's layers."""
    named, pairs = dict(teacher.named_modules()), []
    for name, layer in student.named_modules():
        original = named[copy.pairing.layers[name]] if copy.pairing.layers.get(name) in named else None
        if original is None or kind_of(layer) is None:
            continue
        if name not in copy.pairing.folded and kind_of(layer) is not kind_of(original):
            continue
        keys = [key for key in ("weight", "running_mean", "bias") if tensor_name(name, key) in copy.pairing.tensors]
        if not keys:
            continue
        wide = len(getattr(original, keys[0]))
        channels = copy.kept.get((tensor_name(name, keys[0]), 0), torch.arange(wide))
        axis = -1 if isinstance(layer, nn.Linear) else 1
        device = next(original.parameters(), torch.empty(0)).device
        pairs.append(Correspondence(layer, original, channels.to(device), axis))
    return pairs


def _other_strides(student: nn.Module, teacher: nn.Module, pairing: Pairing) -> str:
    """A layer that is of another kind or moves in other strides: a small stem takes strides away, and pooling."""
    layers = dict(teacher.named_modules())
    for name, layer in student.named_modules():
        original = layers.get(pairing.layers[name]) if name in pairing.layers else None
        if original is None or name in pairing.folded:
            continue
        if kind_of(layer) is not kind_of(original):
            return f"the teacher's {name} is a {type(original).__name__}, which does not say how it moves over an image"
        if stride_of(layer) != stride_of(original):
            return f"{name} moves in other strides, and its maps have another size (student.stem)"
    return ""


def _other_heads(student: nn.Module, teacher: nn.Module, pairing: Pairing) -> str:
    """An attention block whose heads the teacher does not have."""
    own, given = student.state_dict(), pairing.given(teacher)
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
