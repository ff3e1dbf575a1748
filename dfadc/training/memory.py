"""Memory of a run: counted from its tensors, and read from the process or the device."""

from __future__ import annotations

import importlib
import math
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfadc.distillation.images.replay import ReplayBuffer
from dfadc.distillation.state import RESERVOIR_OFFER
from dfadc.distillation.step_plan import Kind

if TYPE_CHECKING:
    from dfadc.distillation.distillation import Distillation


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


def untouched_bytes(run: Distillation, steps: int | None = None) -> int:
    """Room that is set aside and fills in the course of a run, which a process does not hold before it is written.

    Args:
        run: before its first step.
        steps: of the run; None: as many as it takes to fill everything.
    """
    if run.policy.device.type != "cpu":
        return 0
    state, batch_size = run.state, run.recipe.batch_size
    updates = math.inf if steps is None else run.plan.total(steps, {Kind.STUDENT: 1, Kind.GENERATOR: 1})
    offered = ((state.replay, batch_size), (state.repeats, batch_size), (state.reservoir, RESERVOIR_OFFER))
    total = 0
    for store, images in offered:
        capacity = len(store.images)
        filled = min(capacity, updates * images) / max(1, capacity)
        logits = store.logits.nbytes if isinstance(store, ReplayBuffer) else 0
        total += round(filled * (store.images.nbytes + logits))
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
        """Stands for a tensor that autograd keeps."""
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


def resident_tensors(run: Distillation) -> list[Tensor]:
    """Parameters and buffers of all networks of a run, averages included, each once."""
    state = run.state
    modules = [run.teacher.module, *(m for p in (state.student, state.generator) for m in (p.module, p.average))]
    unique = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return list(unique.values())


def resident_bytes(run: Distillation) -> int:
    """Bytes that stay for the whole run: networks, gradients, momenta and the replay buffer."""
    state = run.state
    trained = [parameter for network in (state.student, state.generator) for parameter in network.parameters]
    # A gradient and, for momentum or Adam's first moment, one more copy of every trained parameter.
    moving = 2 * sum(parameter.nbytes for parameter in trained)
    replay = sum(store.images.nbytes + store.logits.nbytes for store in (state.replay, state.repeats))
    return sum(tensor.nbytes for tensor in resident_tensors(run)) + moving + replay
