"""Logits from a teacher's output: axes, heads of probabilities, one logit for two classes, several labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from dfadc.errors import DfadcError
from dfadc.teacher.outputs import is_vector
from dfadc.teacher.probabilities import change_outputs, kind_of, outputs_of, without_probabilities

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dfadc.contract import ContractFields

ONE_LOGIT = (
    "if it is the logit (or the sigmoid) of a yes-or-no question, pass --num-classes 2: the two classes then have the "
    "logits [0, z]; a regression has no classes to agree on"
)


class Head(NamedTuple):
    """A teacher whose outputs are logits.

    Args:
        module: images (N, C, H, W) -> logits (N, K) or (N, K, h, w).
        logits: of the images that were tried.
        is_multilabel: each logit is that of one label's sigmoid.
        notes: what was done, for the user.
    """

    module: nn.Module
    logits: Tensor
    is_multilabel: bool
    notes: tuple[str, ...]


def as_logits(module: nn.Module, images: Tensor, output: Tensor, fields: ContractFields, *, cut: str = "") -> Head:
    """Makes logits of a network's outputs; hooks do it wherever the network is called.

    Args:
        module: images -> one tensor; frozen, in eval mode.
        images: (N, C, H, W), at least two.
        output: the network's output for them, with its autograd graph.
        fields: what is stated of the contract.
        cut: name of the last layer that the file's reader left out; empty where it left none out.

    Raises:
        DfadcError: nothing tells how the outputs are to be read; the hint names the flag.
    """
    notes: list[str] = []
    if output.ndim != 2 and is_vector(output) and fields.task != "segmentation" and len(output) == len(images):
        if output.ndim > 2:
            axes = ", ".join(["N", *("K" if size > 1 else "1" for size in output.shape[1:])])
            notes.append(f"the outputs ({axes}) are flattened to logits (N, K)")
        module = change_outputs(module, lambda logits: logits.reshape(len(logits), -1))
        output = outputs_of(module, images)
    if _is_channels_last(output, images):
        module = change_outputs(module, lambda maps: maps.permute(0, 3, 1, 2))
        output = outputs_of(module, images)
        notes.append("its outputs (N, H, W, K) are given as (N, K, H, W)")
    if output.ndim not in (2, 4) or len(output) != len(images) or not output.is_floating_point():
        return Head(module, output.detach(), is_multilabel=False, notes=tuple(notes))
    kind = kind_of(output)
    is_multilabel = _has_labels(output, cut or kind, fields)
    if is_multilabel and fields.task is None:
        notes.append(
            f"it has a sigmoid for each of its {output.shape[1]} outputs, so several of them may be right for an image "
            "(task multilabel); where one class is right, pass --task classification"
        )
    if kind != "logits":
        module, note = without_probabilities(module, images, output, kind)
        notes.append(note)
    if output.shape[1] == 1:
        if fields.num_classes != 2:
            raise DfadcError("the teacher gives one output for an image, and two classes need two logits", ONE_LOGIT)
        module = change_outputs(module, lambda logit: torch.cat([torch.zeros_like(logit), logit], dim=1))
        notes.append("its one output z becomes two logits [0, z]: class 1 is predicted where z > 0")
    logits = outputs_of(module, images) if notes else output
    return Head(module, logits.detach(), is_multilabel, tuple(notes))


def _has_labels(output: Tensor, last: str, fields: ContractFields) -> bool:
    """True where each output is that of one label, as is stated, or as a sigmoid says where no task is stated."""
    is_stated = fields.task == "multilabel"
    has_labels = is_stated or (fields.task is None and last.lower() == "sigmoid" and output.shape[1] > 1)
    if output.ndim == 4 and has_labels:
        raise DfadcError(
            f"the teacher gives every pixel {output.shape[1]} labels of its own, and only images may have several",
            "where one class is right for a pixel, pass --task segmentation: the largest output is the prediction",
        )
    if is_stated and "softmax" in last.lower().replace("_", ""):
        raise DfadcError(
            "the teacher ends in a softmax, so one class is right for an image", "leave --task multilabel away"
        )
    if is_stated and output.shape[1] == 1:
        raise DfadcError(
            "the teacher gives one output for an image, and one label is a yes-or-no question",
            "pass --num-classes 2 without --task multilabel: the two classes then have the logits [0, z]",
        )
    return has_labels


def _is_channels_last(output: Tensor, images: Tensor) -> bool:
    """True for maps whose second and third axes are proportioned as the images, and whose third and fourth are not."""
    if output.ndim != 4:
        return False
    height, width = images.shape[2:]
    first, second, third = output.shape[1:]
    return first * width == second * height and second * width != third * height
