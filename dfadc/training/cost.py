"""What a run will cost, measured on a few steps that are then undone, and whether compiling pays."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dfadc.distillation.loop import update_generator, update_student
from dfadc.errors import DfadcError
from dfadc.training.memory import ActivationBytes, peak_bytes, resident_bytes, resident_tensors, untouched_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from dfadc.distillation.objectives import Game

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
        peak_bytes: the most that the process, or on CUDA the device, will hold at once: measured on the trial steps,
            and the room that fills later; 0: unknown.
    """

    seconds_per_step: float
    memory_bytes: int
    compiled: bool
    compile_reason: str
    peak_bytes: int = 0


def estimate(game: Game, wanted: str, minutes: float | None = None) -> Estimate:
    """Plays a few steps, undoes them, and compiles the game where that was asked for or measured to pay.

    Args:
        game: a game that has not started.
        wanted: ``compute.compile`` of the recipe: auto, on or off.
        minutes: what the run will last where a budget decides that, else None: the recipe's steps do.

    Raises:
        DfadcError: compiling was asked for and fails.
    """
    activations = ActivationBytes({tensor.untyped_storage().data_ptr() for tensor in resident_tensors(game)})
    hooks = torch.autograd.graph.saved_tensors_hooks(activations.pack, lambda kept: kept.tensor)
    seconds = time_steps(game, hooks)
    eager = Estimate(
        seconds,
        activations.peak + resident_bytes(game),
        compiled=False,
        compile_reason="as asked",
        peak_bytes=_expected_peak(game, game.recipe.steps if minutes is None else None),
    )
    if wanted == "off":
        return eager
    if wanted == "on":
        return _compile(game, eager, forced=True)
    device = game.policy.device
    total = eager.seconds_per_step * game.recipe.steps if minutes is None else 60 * minutes
    worth = WORTH_COMPILING_SECONDS.get(device.type)
    if worth is None:
        return replace(eager, compile_reason=f"not known to work on {device.type}")
    if total < worth:
        reason = f"eager takes {total:.0f} s in all; compiling is tried from {worth:.0f} s"
        return replace(eager, compile_reason=reason)
    return _compile(game, eager, forced=False)


def _expected_peak(game: Game, steps: int | None) -> int:
    """What the trial needed at most, and the room that fills later; 0 where the former is not known."""
    needed = peak_bytes(game.policy.device)
    return needed + untouched_bytes(game, steps) if needed else 0


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


def time_steps(game: Game, watch: AbstractContextManager[object] | None = None) -> float:
    """Seconds of an average step of the run, from a few updates of each player that are then undone.

    A step may hold hundreds of updates, and the first steps may be a warm-up: updates are timed, not steps.

    Args:
        game: of the run.
        watch: looks on while each update is made for the first time, which is not timed.
    """
    before = copy.deepcopy(game.players.state_dict())
    try:
        return _time_updates(game, watch)
    finally:
        game.players.load_state_dict(before)


def _time_updates(game: Game, watch: AbstractContextManager[object] | None) -> float:
    rules = game.recipe
    game.begin_turn()
    generator = _time(game, lambda: update_generator(game), watch)
    # Before the student, who may live from what a turn leaves in the ring.
    turn = _time(game, game.end_turn, watch)
    students = rules.student.steps * _time(game, lambda: update_student(game, game.draw_student_batch()), watch)
    if rules.replay.repeats:
        students += rules.replay.repeats * _time(game, lambda: update_student(game, game.draw_echo_batch()), watch)
    return rules.generator.steps * generator + turn + students * (1 - rules.student.start)


def _time(game: Game, work: Callable[[], object], watch: AbstractContextManager[object] | None) -> float:
    """Seconds that work takes: the best of up to three times after a first, or of one where that is long.

    The first time fills caches and, with replay, the ring; it is the one that is watched.
    """
    durations: list[float] = []
    while len(durations) < 2 or (len(durations) < 4 and durations[0] < PATIENCE_SECONDS):
        started = time.perf_counter()
        with nullcontext() if watch is None or durations else watch:
            work()
        if game.policy.device.type == "cuda":
            torch.cuda.synchronize(game.policy.device)
        durations.append(time.perf_counter() - started)
    return min(durations[1:])
