"""Shares of an update's time: generator, teacher, student and the rest, each forward and backward."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

#: Losses, optimizers, averages, replay, augmentation.
REST = "rest"
PARTS = ("generator", "teacher", "student", REST)


class Spent(NamedTuple):
    """Seconds of some work, by part.

    Args:
        seconds: in tensor operations, CPU time of the thread that runs them.
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
    """Does ``work`` once and finds out what each network takes of it.

    On a GPU an operation's host time says how long launching it took, not computing.

    Args:
        work: computes in this thread, eagerly.
        networks: part -> what belongs to it.
    """
    clock = _Clock()
    with ExitStack() as hooks:
        for part, modules in networks.items():
            for module in dict.fromkeys(modules):
                enter = module.register_forward_pre_hook(lambda *_, part=part: clock.enter(part))
                leave = module.register_forward_hook(lambda _, __, output: clock.leave(output))
                hooks.callback(enter.remove)
                hooks.callback(leave.remove)
        with clock:
            work()
    return Spent(dict(clock.seconds), dict(clock.images))


class _Clock(TorchDispatchMode):
    """Times every tensor operation and books it on the network that it is computed for.

    autograd numbers the nodes of its graph in the order of the forward pass, so the numbers that were given out while a
    network ran tell in the backward pass, which no module sees, whose node is at work.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.images: defaultdict[str, float] = defaultdict(float)
        self._open: list[tuple[str, int]] = []
        self._nodes: list[tuple[range, str]] = []

    def enter(self, part: str) -> None:
        """A network's forward pass begins."""
        self._open.append((part, _next_node()))

    def leave(self, output: Tensor) -> None:
        """It ends, with ``output`` (N, ...)."""
        part, first = self._open.pop()
        self._nodes.append((range(first, _next_node()), part))
        self.images[part] += len(output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes an operation as it would have been."""
        started = time.thread_time()  # of this thread alone: a busy machine does not count
        result = func(*args, **(kwargs or {}))
        self.seconds[self._owner()] += time.thread_time() - started
        return result

    def _owner(self) -> str:
        node: Any = torch._C._current_autograd_node()  # noqa: SLF001 - as torch.utils.module_tracker does
        if node is None:
            return self._open[-1][0] if self._open else REST
        number = node._sequence_nr()  # noqa: SLF001
        return next((part for numbers, part in self._nodes if number in numbers), REST)


def _next_node() -> int:
    """The number that autograd gives to the next node."""
    number: int = torch._C._autograd._get_sequence_nr()  # noqa: SLF001 - as AOTAutograd does
    return number
