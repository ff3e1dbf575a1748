"""What a run will cost, measured on a few steps that are then undone, and whether compiling pays."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfadc.distillation.loop import update_generator, update_student
from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dfadc.distillation.game import Game

#: After a first update this long, one more is measurement enough.
PATIENCE_SECONDS = 0.2
#: Eager seconds from which compiling is tried and measured. Two graphs take a minute or two to compile, so on a shorter
#: run the trial alone would cost more than it could tell.
WORTH_COMPILING_SECONDS = {"cpu": 14_400.0, "cuda": 300.0}


@dataclass(frozen=True)
class Estimate:
    """What one step costs on this machine.

    Args:
        seconds_per_step: measured.
        memory_bytes: players, optimizer state, replay and the activations that a backward pass keeps.
        compiled: whether the game's functions are compiled.
        compile_reason: why, for the run's plan.
    """

    seconds_per_step: float
    memory_bytes: int
    compiled: bool
    compile_reason: str


def estimate(game: Game, wanted: str, minutes: float | None = None) -> Estimate:
    """Plays a few steps, undoes them, and compiles the game where that was asked for or measured to pay.

    Args:
        game: a game that has not started.
        wanted: ``compute.compile`` of the recipe: auto, on or off.
        minutes: what the run will last where a budget decides that, else None: the recipe's steps do.

    Raises:
        DfadcError: compiling was asked for and fails.
    """
    activations = _ActivationBytes({tensor.untyped_storage().data_ptr() for tensor in _resident_tensors(game)})
    with torch.autograd.graph.saved_tensors_hooks(activations.pack, lambda kept: kept.tensor):
        seconds = time_steps(game)
    memory = activations.peak + _resident_bytes(game)
    eager = Estimate(seconds, memory, compiled=False, compile_reason="as asked")
    if wanted == "off":
        return eager
    if wanted == "on":
        return _compile(game, eager, forced=True)
    device = game.policy.device
    total = seconds * game.recipe.steps if minutes is None else 60 * minutes
    worth = WORTH_COMPILING_SECONDS.get(device.type)
    if worth is None:
        return replace(eager, compile_reason=f"not known to work on {device.type}")
    if total < worth:
        reason = f"eager takes {total:.0f} s in all; compiling is tried from {worth:.0f} s"
        return replace(eager, compile_reason=reason)
    return _compile(game, eager, forced=False)


def _compile(game: Game, eager: Estimate, *, forced: bool) -> Estimate:
    """Compiles the game and measures it; goes back to eager, unless forced, where that fails or does not pay."""
    game.compile()
    started = time.perf_counter()
    try:
        time_steps(game)
        warm_up = time.perf_counter() - started
        seconds = time_steps(game)
    except RuntimeError as exc:
        # What the tracer and the backends raise (no C++ compiler, a graph break in the teacher, ...) are all of this.
        game.uncompile()
        reason = f"the game cannot be compiled: {str(exc).splitlines()[0]}"
        if forced:
            raise DfadcError(reason, "pass --no-compile") from exc
        return replace(eager, compile_reason=reason)
    reason = f"measured {seconds:.3f} s a step compiled (warm-up {warm_up:.0f} s), {eager.seconds_per_step:.3f} s eager"
    if forced:
        return replace(eager, seconds_per_step=seconds, compiled=True, compile_reason=f"as asked; {reason}")
    if seconds >= eager.seconds_per_step:
        game.uncompile()
        return replace(eager, compile_reason=reason)
    return replace(eager, seconds_per_step=seconds, compiled=True, compile_reason=reason)


def steps_for_minutes(minutes: float, seconds_per_step: float) -> int:
    """The number of steps that fit a time budget at a measured rate, at least one."""
    return max(1, int(minutes * 60 / seconds_per_step))


def time_steps(game: Game) -> float:
    """Seconds of an average step of the run, from a few updates of each player that are then undone.

    A step may hold hundreds of updates, and the first steps may be a warm-up: updates are timed, not steps.
    """
    before = copy.deepcopy(game.players.state_dict())
    rules = game.recipe
    try:
        game.begin_step()
        game.begin_turn()
        generator = _time(game, lambda: update_generator(game))
        # Before the student, who may live from what a turn leaves in the ring.
        turn = _time(game, game.end_turn)
        student = _time(game, lambda: update_student(game, game.draw_student_batch()))
        echo = _time(game, lambda: update_student(game, game.draw_echo_batch())) if rules.replay.echoes else 0.0
    finally:
        game.players.load_state_dict(before)
    students = rules.student.steps * student + rules.replay.echoes * echo
    return rules.generator.steps * generator + turn + students * (1 - rules.student.start)


def _time(game: Game, work: Callable[[], object]) -> float:
    """Seconds that work takes: the best of up to three times after a first, or of one where that is long.

    The first time fills caches and, with replay, the ring.
    """
    durations: list[float] = []
    while len(durations) < 2 or (len(durations) < 4 and durations[0] < PATIENCE_SECONDS):
        started = time.perf_counter()
        work()
        if game.policy.device.type == "cuda":
            torch.cuda.synchronize(game.policy.device)
        durations.append(time.perf_counter() - started)
    return min(durations[1:])


class _ActivationBytes:
    """Counts the bytes that autograd keeps for a backward pass, each storage once, and their peak."""

    def __init__(self, resident: set[int]) -> None:
        self.peak = 0
        self._resident = resident
        self._now = 0
        self._uses: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._resident:
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] == 1:
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
        return _Kept(tensor, self)

    def release(self, tensor: Tensor) -> None:
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

    def __init__(self, tensor: Tensor, counter: _ActivationBytes) -> None:
        self.tensor = tensor
        self.counter = counter

    def __del__(self) -> None:
        self.counter.release(self.tensor)


def _resident_tensors(game: Game) -> list[Tensor]:
    players = game.players
    modules = [game.teacher, *(m for p in (players.student, players.generator) for m in (p.module, p.average))]
    unique = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return list(unique.values())


def _resident_bytes(game: Game) -> int:
    players = game.players
    moved = [parameter for player in (players.student, players.generator) for parameter in player.parameters]
    # A gradient and, for momentum or Adam's first moment, one more copy of every moving parameter.
    moving = 2 * sum(parameter.nbytes for parameter in moved)
    ring = sum(store.images.nbytes + store.answers.nbytes for store in (players.ring, players.echo))
    return sum(tensor.nbytes for tensor in _resident_tensors(game)) + moving + ring
