"""Cost of a run, measured on a few updates that are then undone, and the decision on compiling."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dfadc.distillation.loop import update_generator, update_student
from dfadc.distillation.step_plan import Kind
from dfadc.errors import DfadcError
from dfadc.training.memory import ActivationBytes, peak_bytes, resident_bytes, resident_tensors, untouched_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from dfadc.distillation.distillation import Distillation
    from dfadc.training.budget import Budget

#: After a first update this long, one more is measurement enough.
PATIENCE_SECONDS = 0.2
#: Eager seconds from which compiling is tried and measured. Two graphs take a minute or two to compile, so on a shorter
#: run the trial alone would cost more than it could tell.
WORTH_COMPILING_SECONDS = {"cpu": 14_400.0, "cuda": 300.0}


@dataclass(frozen=True)
class Estimate:
    """Cost of a step on this machine.

    Args:
        seconds_per_step: measured.
        memory_bytes: networks, optimizer state, replay and the activations that a backward pass keeps.
        compiled: the objectives are compiled.
        compile_reason: why, for the run's plan.
        peak_bytes: the most that the process, or on CUDA the device, will hold at once: measured on the trial steps,
            and the room that fills later; 0: unknown.
    """

    seconds_per_step: float
    memory_bytes: int
    compiled: bool
    compile_reason: str
    peak_bytes: int = 0


def estimate(run: Distillation, budget: Budget) -> Estimate:
    """Makes a few updates, undoes them, and compiles the objectives where that was asked for or measured to pay.

    Args:
        run: not yet started.
        budget: of the run.

    Raises:
        DfadcError: compiling was asked for and fails.
    """
    activations = ActivationBytes({tensor.untyped_storage().data_ptr() for tensor in resident_tensors(run)})
    hooks = torch.autograd.graph.saved_tensors_hooks(activations.pack, lambda kept: kept.tensor)
    seconds = time_steps(run, hooks)
    eager = Estimate(
        seconds,
        activations.peak + resident_bytes(run),
        compiled=False,
        compile_reason="as asked",
        peak_bytes=_expected_peak(run, run.recipe.steps if budget.minutes is None else None),
    )
    wanted = run.recipe.compute.compile
    if wanted == "off":
        return eager
    if wanted == "on":
        return _compile(run, eager, forced=True)
    device = run.policy.device
    total = budget.seconds(eager.seconds_per_step)
    worth = WORTH_COMPILING_SECONDS.get(device.type)
    if worth is None:
        return replace(eager, compile_reason=f"not known to work on {device.type}")
    if total < worth:
        reason = f"eager takes {total:.0f} s in all; compiling is tried from {worth:.0f} s"
        return replace(eager, compile_reason=reason)
    return _compile(run, eager, forced=False)


def _expected_peak(run: Distillation, steps: int | None) -> int:
    """Peak of the trial, and the room that fills later; 0 where the former is not known."""
    needed = peak_bytes(run.policy.device)
    return needed + untouched_bytes(run, steps) if needed else 0


def _compile(run: Distillation, eager: Estimate, *, forced: bool) -> Estimate:
    """Compiles and measures; goes back to eager, unless forced, where that fails or does not pay."""
    run.compile()
    started = time.perf_counter()
    try:
        time_steps(run)
        warm_up = time.perf_counter() - started
        seconds = time_steps(run)
    except RuntimeError as exc:
        # What the tracer and the backends raise (no C++ compiler, a graph break in the teacher, ...) are all of this.
        run.uncompile()
        reason = f"training cannot be compiled: {str(exc).splitlines()[0]}"
        if forced:
            raise DfadcError(reason, "pass --no-compile") from exc
        return replace(eager, compile_reason=reason)
    reason = f"measured {seconds:.3f} s a step compiled (warm-up {warm_up:.0f} s), {eager.seconds_per_step:.3f} s eager"
    if forced:
        return replace(eager, seconds_per_step=seconds, compiled=True, compile_reason=f"as asked; {reason}")
    if seconds >= eager.seconds_per_step:
        run.uncompile()
        return replace(eager, compile_reason=reason)
    return replace(eager, seconds_per_step=seconds, compiled=True, compile_reason=reason)


def time_steps(run: Distillation, hooks: AbstractContextManager[object] | None = None) -> float:
    """Seconds of an average step of the run, from a few updates of each kind that are then undone.

    A step may hold hundreds of updates, and the first steps may be a warm-up: updates are timed, not steps.

    Args:
        run: whose updates are timed.
        hooks: entered while each update is made for the first time, which is not timed.
    """
    before = copy.deepcopy(run.state.state_dict())
    try:
        return _time_updates(run, hooks)
    finally:
        run.state.load_state_dict(before)


def _time_updates(run: Distillation, hooks: AbstractContextManager[object] | None) -> float:
    """The generator first: the student may be trained on what its updates leave in the replay buffer."""
    run.generator.begin_updates()
    work: dict[Kind, Callable[[], object]] = {
        Kind.GENERATOR: lambda: update_generator(run),
        Kind.REPLAY: run.generator.fill_replay,
        Kind.STUDENT: lambda: update_student(run, run.student.draw_batch()),
        Kind.REPEATED: lambda: update_student(run, run.student.draw_repeated_batch()),
    }
    kinds = [updates.kind for updates in run.plan.updates]
    return run.plan.mean({kind: _time(run, work[kind], hooks) for kind in work if kind in kinds})


def _time(run: Distillation, work: Callable[[], object], hooks: AbstractContextManager[object] | None) -> float:
    """Seconds that work takes: the best of up to three times after a first, or of one where that is long.

    The first time fills caches and, with replay, the buffer; it is the one that the hooks see.
    """
    durations: list[float] = []
    while len(durations) < 2 or (len(durations) < 4 and durations[0] < PATIENCE_SECONDS):
        started = time.perf_counter()
        with nullcontext() if hooks is None or durations else hooks:
            work()
        if run.policy.device.type == "cuda":
            torch.cuda.synchronize(run.policy.device)
        durations.append(time.perf_counter() - started)
    return min(durations[1:])
