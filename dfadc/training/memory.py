"""What a game holds in memory: counted from its tensors, and read from the process or the device."""

from __future__ import annotations

import importlib
import math
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfadc.distillation.images.replay import ReplayRing
from dfadc.distillation.state import RESERVOIR_OFFER

if TYPE_CHECKING:
    from dfadc.distillation.objectives import Game


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use at once: on the CPU by this process, on CUDA by its tensors; 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return 0
    resource = importlib.import_module("resource")
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes, but for macOS.
    return peak if sys.platform == "darwin" else 1024 * peak


def untouched_bytes(game: Game, steps: int | None = None) -> int:
    """Room that is set aside and fills in the course of a run, which a process does not hold before it is written.

    Args:
        game: before its first step.
        steps: of the run; None: as many as it takes to fill everything.
    """
    if game.policy.device.type != "cpu":
        return 0
    players, recipe = game.players, game.recipe
    updates = math.inf if steps is None else steps * (recipe.student.steps + recipe.generator.steps)
    offered = (
        (players.ring, recipe.batch_size),
        (players.echo, recipe.batch_size),
        (players.reservoir, RESERVOIR_OFFER),
    )
    total = 0
    for store, images in offered:
        capacity = len(store.images)
        filled = min(capacity, updates * images) / max(1, capacity)
        answers = store.answers.nbytes if isinstance(store, ReplayRing) else 0
        total += round(filled * (store.images.nbytes + answers))
    return total


class ActivationBytes:
    """Counts the bytes that autograd keeps for a backward pass, each storage once, and their peak.

    Args:
        resident: addresses of storages that stay anyway.
    """

    def __init__(self, resident: set[int]) -> None:
        self.peak = 0
        self._resident = resident
        self._now = 0
        self._uses: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> _Kept:
        """What autograd keeps instead of a tensor."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._resident:
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] == 1:
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
        # Detached: the result of a node would keep the node, which keeps the result.
        return _Kept(tensor.detach(), self)

    def release(self, tensor: Tensor) -> None:
        """Called when autograd lets go of a tensor."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._resident:
            self._uses[key] -= 1
            if self._uses[key] == 0:
                self._now -= storage.nbytes()
                del self._uses[key]


class _Kept:
    """A tensor that autograd keeps; dies with the graph."""

    __slots__ = ("counter", "tensor")

    def __init__(self, tensor: Tensor, counter: ActivationBytes) -> None:
        self.tensor = tensor
        self.counter = counter

    def __del__(self) -> None:
        self.counter.release(self.tensor)


def resident_tensors(game: Game) -> list[Tensor]:
    """Parameters and buffers of all networks in the game, averages included, each once."""
    players = game.players
    modules = [game.teacher, *(m for p in (players.student, players.generator) for m in (p.module, p.average))]
    unique = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return list(unique.values())


def resident_bytes(game: Game) -> int:
    """Bytes that stay for the whole run: networks, gradients, momenta and the replay ring."""
    players = game.players
    moved = [parameter for player in (players.student, players.generator) for parameter in player.parameters]
    # A gradient and, for momentum or Adam's first moment, one more copy of every moving parameter.
    moving = 2 * sum(parameter.nbytes for parameter in moved)
    ring = sum(store.images.nbytes + store.answers.nbytes for store in (players.ring, players.echo))
    return sum(tensor.nbytes for tensor in resident_tensors(game)) + moving + ring
