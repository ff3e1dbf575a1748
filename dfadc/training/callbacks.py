"""Callbacks of the training loop: readings at the log interval, snapshot samples, checkpoints, a stop on signals."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from dfadc.distillation.checkpoint import save_checkpoint
from dfadc.distillation.images.replay import STORED_DTYPE
from dfadc.distillation.monitor import Monitor
from dfadc.distillation.step_plan import TRAINED_ON
from dfadc.errors import Interrupted, ending_signals
from dfadc.training.sample_size import choose_num_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dfadc.contract import ImageContract
    from dfadc.distillation.distillation import Distillation
    from dfadc.distillation.loop import StepLosses
    from dfadc.recipe.schema import Recipe
    from dfadc.run_folder import RunFolder

#: Moments of a run at which samples of the averaged generator are drawn.
NUM_SNAPSHOTS = 8


@dataclass(frozen=True)
class Reading:
    """Measures of a run at a log interval; one line of metrics.jsonl.

    Args:
        step: steps done, of ``steps``.
        student_loss: of the last student update; NaN before its first one.
        generator_loss: of the last generator update.
        terms: the generator loss's terms, unweighted.
        class_entropy: of the teacher on the probe, normalised to [0, 1].
        agreement: of student and teacher on the probe, in [0, 1].
        collapse: number of classes that the generator draws, where they are so few that the agreement means nothing; or
            empty.
        student_rate: the student's learning rate.
        generator_rate: the generator's.
        images_per_second: images that student or generator was updated on, since the last reading.
        seconds_left: at that pace.
        note: on trouble, or empty.
    """

    step: int
    steps: int
    student_loss: float
    generator_loss: float
    terms: dict[str, float]
    class_entropy: float
    agreement: float
    collapse: str
    student_rate: float
    generator_rate: float
    images_per_second: float
    seconds_left: float
    note: str = ""


class Callbacks:
    """Called after every step: draws snapshot samples, logs, saves, stops.

    Args:
        run: about to start or to go on.
        folder: where metrics and checkpoints go.
        on_reading: called at every log interval.
    """

    def __init__(self, run: Distillation, folder: RunFolder, on_reading: Callable[[Reading], None]) -> None:
        self.run = run
        self.folder = folder
        self.on_reading = on_reading
        self.stop_requested = False
        self._monitor = Monitor(run)
        self._snapshot_steps = snapshot_steps(run.state.num_steps)
        self._saved_at = self._read_at = time.monotonic()
        self._read_step = run.state.step

    def on_step(self, losses: StepLosses) -> None:
        """Called by the loop after each step.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was written.
        """
        recipe, num_steps = self.run.recipe, self.run.state.num_steps
        if losses.step in self._snapshot_steps:
            draw_snapshot_samples(self.run, snapshot_size(recipe, self.run.teacher.contract))
        if losses.step % recipe.log.interval == 0 or losses.step == num_steps:
            self._read(losses)
        if self.stop_requested:
            self.save()
            raise Interrupted(
                f"interrupted at step {losses.step} of {num_steps}; the state is saved",
                f"dfadc distill --resume {self.folder.path}",
            )
        if time.monotonic() - self._saved_at >= recipe.log.checkpoint_minutes * 60:
            self.save()

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Lets Ctrl-C, SIGTERM and SIGHUP end the run after the step in progress; a second Ctrl-C ends it at once."""

        def request(signum: int, frame: Any) -> None:
            if self.stop_requested and signum == signal.SIGINT:
                signal.default_int_handler(signum, frame)
            self.stop_requested = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, request) for signum in (signal.SIGINT, *ending_signals())}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def save(self) -> None:
        """Writes a checkpoint."""
        save_checkpoint(self.folder.checkpoints, self.run.state.state_dict())
        self._saved_at = time.monotonic()

    def _read(self, losses: StepLosses) -> None:
        state, plan = self.run.state, self.run.plan
        probe, note = self._monitor.check(float(losses.student_loss))
        now = time.monotonic()
        pace = (now - self._read_at) / max(1, losses.step - self._read_step)
        self._read_at, self._read_step = now, losses.step
        images = sum(each.number * TRAINED_ON.get(each.kind, 0) for each in plan.due(losses.step - 1, state.num_steps))
        reading = Reading(
            step=losses.step,
            steps=state.num_steps,
            student_loss=float(losses.student_loss),
            generator_loss=float(losses.generator_loss),
            terms={name: float(term) for name, term in losses.terms.items()},
            class_entropy=probe.class_entropy,
            agreement=probe.agreement,
            collapse=probe.collapse,
            student_rate=state.student.optimizer.param_groups[0]["lr"],
            generator_rate=state.generator.optimizer.param_groups[0]["lr"],
            images_per_second=self.run.recipe.batch_size * images / max(pace, 1e-9),
            seconds_left=pace * (state.num_steps - losses.step),
            note=note,
        )
        self.folder.append_metrics(asdict(reading))
        self.on_reading(reading)


def snapshot_steps(num_steps: int) -> frozenset[int]:
    """The steps after which snapshot samples are drawn: evenly over the run, the end excluded."""
    return frozenset(max(1, round(num_steps * (i + 1) / (NUM_SNAPSHOTS + 1))) for i in range(NUM_SNAPSHOTS))


def snapshot_size(recipe: Recipe, contract: ImageContract) -> int:
    """Images drawn at each of those steps, at least one, so that together they are as many as their source has."""
    settings = recipe.verify
    return max(1, -(-settings.count_of("snapshots", choose_num_samples(settings, contract)) // NUM_SNAPSHOTS))


@torch.no_grad()
def draw_snapshot_samples(run: Distillation, count: int) -> None:
    """Adds images of the averaged generator, on latents that training never sees, to the training state."""
    state = run.state
    images = state.generator.average.eval()(state.draw_unseen_latents(count))
    state.snapshots = torch.cat([state.snapshots, images.to("cpu", STORED_DTYPE)])
