"""Closed-form start: each layer of a smaller copy fitted to its teacher's by ridge regression."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dfadc.networks.flops import in_eval_mode
from dfadc.student.pairing import BATCH_NORM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dfadc.student.inherit import Correspondence

#: Positions of a map that are taken of each image.
_POSITIONS = 16
#: Weight of the distance to the weights before, in units of the inputs' mean square. Students of three teachers of
#: Fashion-MNIST hardly differ from .001 to .1.
RIDGE = 1e-2
#: Inputs of a layer, kernel included, that are fitted at most: the time grows with their cube.
_MOST_INPUTS = 4608
_BATCH_SIZE = 256
_LEAST_PENALTY = 1e-12


class _Targets(NamedTuple):
    """Outputs of a teacher's layer.

    Args:
        num_positions: of the flattened maps or tokens.
        positions: (P,), some of them.
        outputs: (N * P, C) there.
    """

    num_positions: int
    positions: Tensor
    outputs: Tensor


class _Reached(Exception):
    """A layer has its input."""


def can_fit(layer: nn.Module) -> bool:
    """True for linear layers and plain convolutions that are small enough."""
    if isinstance(layer, nn.Conv2d):
        is_plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return is_plain and layer.weight[0].numel() <= _MOST_INPUTS
    return isinstance(layer, nn.Linear) and layer.in_features <= _MOST_INPUTS


@torch.no_grad()
def fit_layers_(
    student: nn.Module, teacher: nn.Module, layers: Sequence[Correspondence], images: Tensor, ridge: float = RIDGE
) -> None:
    """Fits layers one after the other, in the order in which the student runs them.

    Each is fitted from the student's own inputs to the teacher's outputs for the channels that it stands for, so that
    it makes up for what the layers before it lack. Source: layer-wise regression (Horton et al. 2020, arXiv
    2004.04913). Deviations: with a penalty on leaving the weights before, and on procedural images.

    Args:
        student: weights and biases of the layers are overwritten; its mode stays.
        teacher: left as it is, in eval mode.
        layers: of both, for which :func:`can_fit` holds; one that no image reaches, or whose maps have another size
            than the teacher's, stays as it is.
        images: (N, C, H, W), normalised, on the device of both.
        ridge: weight of the distance to the weights before.
    """
    with in_eval_mode(student):
        targets = _collect_targets(teacher, layers, images)
        for index in _running_order(student, layers, images[:1]):
            if index in targets:
                _fit_layer_(student, layers[index].student, images, targets[index], ridge)


def _collect_targets(teacher: nn.Module, layers: Sequence[Correspondence], images: Tensor) -> dict[int, _Targets]:
    """By a layer's index what the teacher gives there, for the channels that the student stands for."""
    numbers: dict[int, int] = {}
    positions: dict[int, Tensor] = {}
    outputs: dict[int, list[Tensor]] = {}
    rng = torch.Generator().manual_seed(0)

    def keep(index: int, layer: nn.Module, _: object, output: Tensor) -> None:
        rows = _as_rows(layer, output)
        numbers[index] = rows.shape[1]
        if index not in positions:
            positions[index] = torch.randperm(rows.shape[1], generator=rng)[:_POSITIONS].to(rows.device)
        rows = rows[:, positions[index]][..., layers[index].channels]
        if layers[index].student.bias is None and isinstance(
            layer.bias, Tensor
        ):  # it is in a batch norm of the student
            rows = rows - layer.bias[layers[index].channels]
        outputs.setdefault(index, []).append(rows.flatten(0, 1).float())

    with ExitStack() as hooks:
        for index, pair in enumerate(layers):
            hooks.callback(pair.teacher.register_forward_hook(partial(keep, index)).remove)
        for batch in images.split(_BATCH_SIZE):
            teacher(batch)
    return {index: _Targets(numbers[index], positions[index], torch.cat(found)) for index, found in outputs.items()}


def _as_rows(layer: nn.Module, output: Tensor) -> Tensor:
    """Maps (N, C, H, W) of a convolution, tokens (N, ..., C) or vectors (N, C) of a linear layer as (N, P, C)."""
    if isinstance(layer, nn.Conv2d):
        return output.flatten(2).transpose(1, 2)
    return output.reshape(len(output), -1, output.shape[-1])


def _running_order(student: nn.Module, layers: Sequence[Correspondence], images: Tensor) -> list[int]:
    """Indices of the layers that images reach, in the order in which they do."""
    reached: dict[int, None] = {}

    def note(index: int, *_: object) -> None:
        reached[index] = None

    with ExitStack() as hooks:
        for index, pair in enumerate(layers):
            hooks.callback(pair.student.register_forward_pre_hook(partial(note, index)).remove)
        student(images)
    return list(reached)


def _fit_layer_(student: nn.Module, layer: nn.Module, images: Tensor, targets: _Targets, ridge: float) -> None:
    """Solves min |X (W + D) - Y|² + ridge · E|X|² |D|² for the change D of a layer's weights and bias."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)  # noqa: S101
    size = layer.weight[0].numel()
    gram = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    cross = torch.zeros(size + 1, len(layer.weight), dtype=torch.float64)
    rows_done = 0
    for batch in images.split(_BATCH_SIZE):
        given = _input_of(student, layer, batch)
        computed = _as_rows(layer, layer(given).float())
        if computed.shape[1] != targets.num_positions:
            return  # its maps have another size than the teacher's
        rows = functional.pad(_patches(layer, given, targets.positions), (0, 1), value=1.0)
        error = targets.outputs[rows_done : rows_done + len(rows)] - computed[:, targets.positions].flatten(0, 1)
        rows_done += len(rows)
        gram += (rows.T @ rows).cpu().double()
        cross += (rows.T @ error).cpu().double()
    if layer.bias is None:
        gram, cross = gram[:size, :size], cross[:size]
    penalty = (ridge * gram.diagonal().mean()).clamp_min(_LEAST_PENALTY)  # inputs may all be 0
    change = torch.linalg.solve(gram + penalty * torch.eye(len(gram)), cross)
    if not bool(change.isfinite().all()):
        return
    change = change.T.to(layer.weight)
    layer.weight += change[:, :size].reshape(layer.weight.shape)
    if layer.bias is not None:
        layer.bias += change[:, size]


def _input_of(student: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """The first input that a layer gets; what follows it is not computed."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs.append(given[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(keep)
    try:
        with suppress(_Reached):
            student(images)
    finally:
        handle.remove()
    return inputs[0]


def _patches(layer: nn.Conv2d | nn.Linear, given: Tensor, positions: Tensor) -> Tensor:
    """(N * P, inputs), what the layer multiplies its weights with at some of its positions."""
    if isinstance(layer, nn.Linear):
        return _as_rows(layer, given)[:, positions].flatten(0, 1).float()
    assert not isinstance(layer.padding, str)  # noqa: S101
    unfolded = functional.unfold(
        given.float(), layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    )
    return unfolded[:, :, positions].transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def normalise_(student: nn.Module, names: Sequence[str], images: Tensor) -> None:
    """Gives batch norms that scale nothing the statistics of their inputs, and scales and shifts that undo them.

    The student computes what it did, and goes on doing so where training normalises.

    Args:
        student: in which they are.
        names: of batch norms with mean 0, variance 1 and weight 1.
        images: (N, C, H, W), normalised, on the student's device.
    """
    norms = {name: layer for name, layer in student.named_modules() if name in names and isinstance(layer, BATCH_NORM)}
    sums: dict[str, Tensor] = {}

    def add(name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        maps = given[0].float()
        axes = [axis for axis in range(maps.ndim) if axis != 1]
        found = torch.stack([maps.mean(axes), maps.square().mean(axes)]) * len(maps) / len(images)
        sums[name] = sums[name] + found if name in sums else found

    with in_eval_mode(student), ExitStack() as hooks:
        for name, norm in norms.items():
            hooks.callback(norm.register_forward_pre_hook(partial(add, name)).remove)
        for batch in images.split(_BATCH_SIZE) if names else ():
            student(batch)
    for name, (mean, square) in sums.items():
        norm, variance = norms[name], (square - mean.square()).clamp_min(0)
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(variance)
        norm.get_parameter("weight").copy_((variance + norm.eps).sqrt())
        norm.get_parameter("bias").add_(mean)
