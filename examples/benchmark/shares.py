"""Who takes the time of an update: generator, teacher, student or the rest, each forward and backward."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch.autograd.profiler import profile, record_function

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.autograd.profiler_util import FunctionEvent

#: Losses, optimizers, averages, replay, augmentation.
REST = "rest"
PARTS = ("generator", "teacher", "student", REST)


class Spent(NamedTuple):
    """What some work took, by part.

    Args:
        seconds: of host time, the profiler's own cost included.
        images: that passed forward: drawn by the generator, seen by the others.
    """

    seconds: dict[str, float]
    images: dict[str, float]

    def shares(self) -> dict[str, float]:
        """Shares of the time, which add up to 1."""
        total = sum(self.seconds.values())
        return {part: round(self.seconds.get(part, 0.0) / total, 4) for part in PARTS}


def add_up(parts: Iterable[tuple[float, Spent]]) -> Spent:
    """The sum of works, each done so many times."""
    seconds: defaultdict[str, float] = defaultdict(float)
    images: defaultdict[str, float] = defaultdict(float)
    for count, spent in parts:
        for total, values in ((seconds, spent.seconds), (images, spent.images)):
            for part, value in values.items():
                total[part] += count * value
    return Spent(dict(seconds), dict(images))


def measure(work: Callable[[], object], networks: Mapping[str, Sequence[nn.Module]]) -> Spent:
    """Does ``work`` once and finds out what each network took of it.

    A backward operation belongs to the network whose forward operation made its node: autograd numbers both alike. On
    a GPU host time says how long launching took, not computing.

    Args:
        work: computes in this thread, eagerly.
        networks: part -> what belongs to it.
    """
    with _marked(networks) as marks, profile(use_kineto=False) as profiler:
        work()
    images: defaultdict[str, float] = defaultdict(float)
    for mark in marks:
        images[mark.part] += mark.images
    seconds: defaultdict[str, float] = defaultdict(float)
    owners: dict[int, str] = {}
    for event in sorted(profiler.function_events or (), key=lambda event: event.time_range.start):
        part = _part_of(event, networks, owners)
        seconds[part] += event.self_cpu_time_total / 1e6
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            # Of several operations with one number the last made the node; those of a backward pass keep its owner.
            owners[event.sequence_nr] = part
    return Spent(dict(seconds), dict(images))


def _part_of(event: FunctionEvent, networks: Mapping[str, object], owners: Mapping[int, str]) -> str:
    around: FunctionEvent | None = event
    while around is not None:
        if around.name in networks:
            return around.name
        if around.name.startswith("autograd::engine::evaluate_function") and around.sequence_nr in owners:
            return owners[around.sequence_nr]
        around = around.cpu_parent
    return REST


@contextmanager
def _marked(networks: Mapping[str, Sequence[nn.Module]]) -> Iterator[list[_Mark]]:
    marks = [_Mark(part, module) for part, modules in networks.items() for module in dict.fromkeys(modules)]
    try:
        yield marks
    finally:
        for mark in marks:
            mark.remove()


class _Mark:
    """Puts a range of the profiler around every forward pass of a module, and counts what comes out of it."""

    def __init__(self, part: str, module: nn.Module) -> None:
        self.part = part
        self.images = 0
        self._open: list[record_function] = []
        self._handles = [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, *_: object) -> None:
        self._open.append(record_function(self.part))
        self._open[-1].__enter__()

    def _leave(self, _: nn.Module, __: object, output: Tensor) -> None:
        self._open.pop().__exit__(None, None, None)
        self.images += len(output)
