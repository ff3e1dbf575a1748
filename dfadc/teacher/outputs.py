"""Choice of the logits among a teacher's outputs: the one that is named, else the only one that can be meant."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from dfadc.errors import DfadcError
from dfadc.networks.logits import list_outputs, unwrap_logits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dfadc.contract import ContractFields

#: Of the outputs that an error lists.
_SHOWN = 8
_SAME = 1e-4


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
