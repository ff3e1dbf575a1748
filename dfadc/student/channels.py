"""Channels of a teacher that a narrower copy of it keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dfadc.student.attention import find_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from dfadc.student.pairing import Pairing

#: Tensor of a state dict, and an axis of it.
Axis = tuple[str, int]
#: The teacher's channels, by index, that a student keeps along an axis.
Kept = Mapping[Axis, Tensor]
#: How many channels a teacher and its student have where they correspond.
Widths = tuple[int, int]
#: Layers that are tried as the one that alone reads another layer's channels.
_MOST_READERS = 3
#: Logits that differ by less than this share of their largest are the same.
_SAME = 1e-4


class Group(NamedTuple):
    """Axes along which the channels are the same ones.

    Args:
        axes: of them, with the features that each channel has there: more than one where a map was flattened.
        widths: channels of the teacher and of its student.
        is_own: one layer hands them to another alone, whose axis is the last.
        blocks: equal parts that the channels lie in, as groups of a norm, of the teacher and of its student.
    """

    axes: list[tuple[Axis, int]]
    widths: Widths
    is_own: bool = False
    blocks: Widths = (1, 1)


@torch.no_grad()
def choose_channels(student: nn.Module, teacher: nn.Module, pairing: Pairing, images: Tensor) -> Kept:
    """For each axis along which the student is narrower the teacher's channels that it keeps, in order, on the CPU.

    Args:
        student: a narrower copy of the teacher.
        teacher: left as it is.
        pairing: of both.
        images: (N, C, H, W), any, on the teacher's device.
    """
    given, own = pairing.given(teacher), student.state_dict()
    own = {name: own[name] for name in pairing.tensors}
    chosen = _choose_heads(student, teacher, own, given)
    for group in _groups(student, teacher, own, given, taken=set(chosen), is_same=_Permuted(teacher, pairing, images)):
        if all(given[name].ndim == 1 for (name, _), _ in group.axes):  # a buffer as long as no weight is wide
            chosen |= {axis: torch.arange(group.widths[1]) for axis, _ in group.axes}
            continue
        energies = [_energy(given[name], axis).view(-1, size).sum(1) for (name, axis), size in group.axes]
        # Of a layer's own channels the last energy is the reader's: what is written and not read counts nothing.
        stacked = torch.stack(energies)
        score = stacked[:-1].sum(0) * stacked[-1] if group.is_own else stacked.sum(0)
        kept = pick(score, group.widths[1], group.blocks)
        for axis, size in group.axes:
            chosen[axis] = (size * kept[:, None] + torch.arange(size)).flatten()
    return chosen


def pick(score: Tensor, count: int, blocks: Widths = (1, 1)) -> Tensor:
    """The ``count`` channels of the highest scores, in order.

    Args:
        score: (C,).
        count: of channels.
        blocks: equal parts of the teacher's C channels and of the ``count``: as many of each part where there are as
            many parts, whole parts where those are as large.
    """
    theirs, ours = blocks
    if theirs == ours > 1 and count % ours == 0:
        best = score.view(theirs, -1).topk(count // ours, dim=1).indices
        return (best + torch.arange(theirs)[:, None] * (len(score) // theirs)).flatten().sort().values
    if ours > 1 and len(score) * ours == count * theirs:
        size = len(score) // theirs
        best = score.view(theirs, -1).sum(1).topk(ours).indices
        return (best[:, None] * size + torch.arange(size)).flatten().sort().values
    return score.topk(count).indices.sort().values


def _energy(tensor: Tensor, axis: int) -> Tensor:
    """Share of each channel in a tensor's sum of squares; on the CPU, for MPS has no doubles."""
    energy = tensor.cpu().double().square()
    energy = energy.movedim(axis, 0).reshape(energy.shape[axis], -1).sum(1)
    return energy / energy.sum().clamp_min(1e-30)


def _choose_heads(
    student: nn.Module, teacher: nn.Module, own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> dict[Axis, Tensor]:
    """Channels of attention: of the heads that weigh most those that weigh most, the same in queries and keys."""
    chosen: dict[Axis, Tensor] = {}
    attention = find_attention(teacher)
    for name, block in find_attention(student).items():
        theirs = attention.get(name)
        if theirs is None or any(part.name not in own or part.name not in given for part in block.parts):
            continue
        parts = [part for part in block.parts if given[part.name].shape[part.axis] != own[part.name].shape[part.axis]]
        if not parts:
            continue
        first = parts[0]
        wide, narrow = (state[first.name].shape[first.axis] // first.copies for state in (given, own))
        energy = torch.zeros(wide, dtype=torch.float64)
        for part in parts:
            energy += _energy(given[part.name], part.axis).view(part.copies, -1).sum(0)
        by_head = energy.view(theirs.num_heads, -1)
        heads = by_head.sum(1).topk(block.num_heads).indices.sort().values
        size, kept_size = wide // theirs.num_heads, narrow // block.num_heads
        within = by_head[heads].topk(kept_size, dim=1).indices.sort(dim=1).values
        kept = (heads[:, None] * size + within).flatten()
        for part in parts:
            chosen[part.name, part.axis] = (torch.arange(part.copies)[:, None] * wide + kept).flatten()
        chosen |= {(table, 1): heads for table in block.tables}
    return chosen


def _groups(
    student: nn.Module,
    teacher: nn.Module,
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    *,
    taken: set[Axis],
    is_same: _Permuted,
) -> list[Group]:
    """Groups of axes: the channels that one layer hands to the next alone, then all others by their widths."""
    axes = [
        ((name, axis), (given[name].shape[axis], tensor.shape[axis]))
        for name, tensor in own.items()
        for axis in range(tensor.ndim)
        if given[name].shape[axis] != tensor.shape[axis] and (name, axis) not in taken
    ]
    groups: list[Group] = []
    for (name, axis), widths in axes:
        is_writer = axis == 0 and own[name].ndim > 1 and (name, 0) not in taken
        if is_writer and is_same.works and (found := _find_own(name, widths, axes, own, is_same)) is not None:
            groups.append(Group(found, widths, is_own=True))
            taken |= {each for each, _ in found}
    rest: dict[Widths, list[tuple[Axis, int]]] = defaultdict(list)
    outputs: Widths = (0, 0)
    for (name, axis), widths in axes:
        if (name, axis) not in taken:
            key, size = widths, 1
            if axis == 1 and widths not in rest and (pixels := _pixels(widths, outputs)):
                key, size = outputs, pixels
            rest[key].append(((name, axis), size))
        if axis == 0 and own[name].ndim > 1:
            outputs = widths
    groups += [Group(members, widths) for widths, members in rest.items()]
    norms = {
        f"{name}.weight": (module.num_groups, dict(student.named_modules())[name].num_groups)
        for name, module in teacher.named_modules()
        if isinstance(module, nn.GroupNorm) and name in dict(student.named_modules())
    }
    return [
        group._replace(blocks=next((norms[axis[0]] for axis, _ in group.axes if axis[0] in norms), (1, 1)))
        for group in groups
    ]


def _find_own(
    name: str,
    widths: Widths,
    axes: list[tuple[Axis, Widths]],
    own: Mapping[str, Tensor],
    is_same: Callable[[list[tuple[Axis, int]]], bool],
) -> list[tuple[Axis, int]] | None:
    """Axes of the channels that a layer hands to another one alone; None where they go elsewhere as well.

    The state dict lists a network's tensors in the order of its layers: the reader is one of the next that are as wide,
    what lies between has the same channels. Whether that is so is seen by moving them: the logits stay.
    """
    members: list[tuple[Axis, int]] = [((name, 0), 1)]
    start = next(place for place, (axis, _) in enumerate(axes) if axis == (name, 0)) + 1
    num_readers = 0
    for (later, axis), found in axes[start:]:
        size = _size(found, widths)
        if not size or (later, axis) == (name, 1):
            continue
        if axis == 1 and own[later].ndim > 1:
            reads = [*(each for each in members if each[0] != (later, 0)), ((later, 1), size)]
            if is_same(reads):
                return reads
            num_readers += 1
            if num_readers == _MOST_READERS or (later, 0) in [each for each, _ in members]:
                return None
        members.append(((later, axis), size))
    return None


def _size(found: Widths, widths: Widths) -> int:
    """Features for each channel of ``widths`` among those of ``found``; 0 where they are others."""
    size, rest = divmod(found[0], widths[0])
    return size if not rest and found[1] == size * widths[1] else 0


class _Permuted:
    """Tells whether a network computes the same with its channels in another order.

    Args:
        network: left as it is.
        pairing: of a student, whose names its tensors are called by here.
        images: (N, C, H, W).
    """

    def __init__(self, network: nn.Module, pairing: Pairing, images: Tensor) -> None:
        self._network, self._names, self._images = network, pairing.tensors, images
        self._state = pairing.given(network)
        self.works = True
        try:
            self._logits = self._compute({})
        except (RuntimeError, TypeError, ValueError):  # code of a file, which takes no other weights
            self.works = False

    def __call__(self, members: list[tuple[Axis, int]]) -> bool:
        """True if the logits stay, moved along all the axes, and change, moved along the first."""
        (name, axis), _ = members[0]
        order = torch.randperm(self._state[name].shape[axis], generator=torch.Generator().manual_seed(0))
        return self._differs(members[:1], order) > 10 * _SAME and self._differs(members, order) < _SAME

    def _differs(self, members: list[tuple[Axis, int]], order: Tensor) -> float:
        moved: dict[str, Tensor] = {}
        for (name, axis), size in members:
            tensor = moved.get(name, self._state[name])
            places = (size * order[:, None] + torch.arange(size)).flatten().to(tensor.device)
            moved[name] = tensor.index_select(axis, places)
        error = (self._compute(moved) - self._logits).abs().max() / self._logits.abs().max().clamp_min(1e-12)
        return float(error)

    def _compute(self, state: dict[str, Tensor]) -> Tensor:
        moved = {self._names[name]: tensor for name, tensor in state.items()}
        logits: Tensor = functional_call(self._network, moved, (self._images,))
        return logits.float()


def _pixels(widths: Widths, channels: Widths) -> int:
    """Features of a flattened map that a layer takes for each channel; 0 where its input is no flattened map."""
    size = _size(widths, channels) if all(channels) else 0
    return size if size > 1 else 0
