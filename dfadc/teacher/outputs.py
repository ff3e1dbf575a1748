"""Logits from a teacher's outputs: choice of one, its axes, heads of probabilities, one logit for two classes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import torch

from dfadc.errors import DfadcError
from dfadc.networks.logits import list_outputs, unwrap_logits
from dfadc.teacher.probabilities import change_outputs, kind_of, outputs_of, without_probabilities

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from dfadc.contract import ContractFields

#: Of the outputs that an error lists.
_SHOWN = 8
_SAME = 1e-4
ONE_LOGIT = (
    "if it is the logit (or the sigmoid) of a yes-or-no question, pass --num-classes 2: the two classes then have the "
    "logits [0, z]; a regression has no classes to agree on"
)


def choose_output(output: object, images: Tensor, wanted: str | None, fields: ContractFields) -> str | None:
    """Path of the logits in a network's output; None where it is a tensor or names its logits.

    Args:
        output: of the network.
        images: (N, C, H, W) that it was given.
        wanted: ``--output``: a path, or the position of an output that has a name.
        fields: what is stated of the contract.

    Raises:
        DfadcError: none or several outputs can be logits, or the wanted one is not there.
    """
    outputs = list_outputs(output)
    if wanted is not None and wanted in outputs:
        return wanted
    if "" in outputs:
        if wanted is not None:
            raise DfadcError(f"the teacher has one output, and --output {wanted} asks for another", "leave it away")
        return None
    if wanted is not None:
        return _named(outputs, wanted)
    with contextlib.suppress(DfadcError):
        unwrap_logits(output)
        return None
    found = _fitting(outputs, images, fields)
    if len(found) > 1:
        found = _distinct(outputs, found)
    if len(found) == 1:
        return found[0]
    if not outputs:
        raise DfadcError(
            f"the teacher returns a {type(output).__name__} without tensors",
            "give it a forward that returns the logits",
        )
    if not found:
        raise DfadcError(
            f"none of the teacher's outputs ({_listed(outputs)}) holds logits (N, K) of N = {len(images)} images",
            "give it a forward that returns the logits",
        )
    choices = " | ".join(f"--output {path}" for path in found[:_SHOWN])
    raise DfadcError(
        f"the teacher has several outputs that may be logits: {_listed({path: outputs[path] for path in found})}",
        f"choose one: {choices}",
    )


def _named(outputs: Mapping[str, Tensor], wanted: str) -> str:
    """The path that ``--output`` names."""
    paths = list(outputs)
    has_names = not any(path.partition(".")[0].isdecimal() for path in paths)
    if has_names and wanted.isdecimal() and int(wanted) < len(paths):
        return paths[int(wanted)]
    raise DfadcError(f"the teacher has no output {wanted!r}; it has {_listed(outputs)}", f"pass --output {paths[0]}")


def _fitting(outputs: Mapping[str, Tensor], images: Tensor, fields: ContractFields) -> list[str]:
    """Outputs that can be logits of whole images, or of pixels; narrowed by the stated task and number of classes."""
    usable = {
        path: tensor
        for path, tensor in outputs.items()
        if tensor.is_floating_point() and tensor.ndim > 0 and len(tensor) == len(images)
    }
    vectors = [path for path, tensor in usable.items() if is_vector(tensor)]
    maps = [path for path, tensor in usable.items() if tensor.ndim == 4 and path not in vectors]
    full = [path for path in maps if usable[path].shape[2:] == images.shape[2:]]
    if fields.task == "segmentation":
        found = full or maps
    elif fields.task is not None:
        found = vectors
    else:
        found = [*vectors, *full] or maps
    stated = fields.num_classes or len(fields.class_names or ()) or None
    return [path for path in found if num_outputs(usable[path]) == stated] or found


def is_vector(tensor: Tensor) -> bool:
    """True for one value or one row of values an image: (N,), (N, K), (N, K, 1, 1), (N, 1, K)."""
    return sum(size > 1 for size in tensor.shape[1:]) <= 1


def num_outputs(tensor: Tensor) -> int:
    """Values an image of a vector, or channels of a map."""
    return tensor[0].numel() if is_vector(tensor) else int(tensor.shape[1])


def _distinct(outputs: Mapping[str, Tensor], paths: list[str]) -> list[str]:
    """The paths without those that hold the same values as an earlier one, or the softmax or sigmoid of another."""
    kept: list[str] = []
    for path in paths:
        tensor = outputs[path]
        others = [outputs[other] for other in paths if outputs[other].ndim > 1 and not _is_same(tensor, outputs[other])]
        forms = (form for each in others for form in (each.softmax(1), each.log_softmax(1), each.sigmoid()))
        is_known = any(_is_same(tensor, outputs[earlier]) for earlier in kept)
        if not is_known and not any(_is_same(tensor, form) for form in forms):
            kept.append(path)
    return kept or paths


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=_SAME, atol=_SAME)


def _listed(outputs: Mapping[str, Tensor]) -> str:
    shown = [f"{path} {tuple(tensor.shape)}" for path, tensor in list(outputs.items())[:_SHOWN]]
    return ", ".join(shown) + (", …" if len(outputs) > _SHOWN else "")


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
