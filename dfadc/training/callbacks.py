"""Watching a game: a reading at every log interval, samples set aside, checkpoints, a stop when a signal asks."""

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
from dfadc.errors import Interrupted, ending_signals
from dfadc.training.sample_size import choose_num_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dfadc.contract import ImageContract
    from dfadc.distillation.loop import StepLosses
    from dfadc.distillation.objectives import Game
    from dfadc.recipe.schema import Recipe
    from dfadc.run_folder import RunFolder

#: Moments of a run at which samples of the averaged generator are set aside.
NUM_SNAPSHOTS = 8


@dataclass(frozen=True)
class Reading:
    """What a run shows at each log interval; one line of metrics.jsonl.

    Args:
        step: steps done, of ``steps``.
        student_loss: of the last student update; NaN before its first one.
        generator_loss: of the last generator update.
        terms: the generator loss's terms, unweighted.
        class_entropy: of the teacher on the probe, normalised to [0, 1].
        agreement: of student and teacher on the probe, in [0, 1].
        collapse: how many classes the generator draws, where they are so few that the agreement is worth nothing; or
            empty.
        student_rate: the student's learning rate.
        generator_rate: the generator's.
        images_per_second: images that a player was updated on, since the last reading.
        seconds_left: at that pace.
        note: what was done about trouble, or empty.
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


class Watch:
    """Called after every step: sets samples aside, reads, saves, stops.

    Args:
        game: about to start or to go on.
        folder: where metrics and checkpoints go.
        on_reading: told at every log interval.
    """

    def __init__(self, game: Game, folder: RunFolder, on_reading: Callable[[Reading], None]) -> None:
        self.game = game
        self.folder = folder
        self.on_reading = on_reading
        self.stop_requested = False
        self._monitor = Monitor(game)
        self._snapshot_steps = snapshot_steps(game.recipe)
        self._saved_at = self._read_at = time.monotonic()
        self._read_step = game.players.step

    def on_step(self, losses: StepLosses) -> None:
        """What the loop calls.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was written.
        """
        recipe = self.game.recipe
        if losses.step in self._snapshot_steps:
            set_samples_aside(self.game, snapshot_size(recipe, self.game.contract))
        if losses.step % recipe.log.interval == 0 or losses.step == recipe.steps:
            self._read(losses)
        if self.stop_requested:
            self.save()
            raise Interrupted(
                f"interrupted at step {losses.step} of {recipe.steps}; the state is saved",
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
        save_checkpoint(self.folder.checkpoints, self.game.players.state_dict())
        self._saved_at = time.monotonic()

    def _read(self, losses: StepLosses) -> None:
        recipe, players = self.game.recipe, self.game.players
        probe, note = self._monitor.look(float(losses.student_loss))
        now = time.monotonic()
        pace = (now - self._read_at) / max(1, losses.step - self._read_step)
        self._read_at, self._read_step = now, losses.step
        reading = Reading(
            step=losses.step,
            steps=recipe.steps,
            student_loss=float(losses.student_loss),
            generator_loss=float(losses.generator_loss),
            terms={name: float(term) for name, term in losses.terms.items()},
            class_entropy=probe.class_entropy,
            agreement=probe.agreement,
            collapse=probe.collapse,
            student_rate=players.student.optimizer.param_groups[0]["lr"],
            generator_rate=players.generator.optimizer.param_groups[0]["lr"],
            images_per_second=recipe.batch_size * (recipe.student_updates + recipe.generator.steps) / max(pace, 1e-9),
            seconds_left=pace * (recipe.steps - losses.step),
            note=note,
        )
        self.folder.append_metrics(asdict(reading))
        self.on_reading(reading)


def snapshot_steps(recipe: Recipe) -> frozenset[int]:
    """The steps after which samples are set aside: evenly over the run, the end excluded."""
    return frozenset(max(1, round(recipe.steps * (i + 1) / (NUM_SNAPSHOTS + 1))) for i in range(NUM_SNAPSHOTS))


def snapshot_size(recipe: Recipe, contract: ImageContract) -> int:
    """Images set aside at each of those steps, at least one, so that together they are as many as their source has."""
    settings = recipe.verify
    return max(1, -(-settings.count_of("snapshots", choose_num_samples(settings, contract)) // NUM_SNAPSHOTS))


@torch.no_grad()
def set_samples_aside(game: Game, count: int) -> None:
    """Draws images from the averaged generator on latents that training never sees, and keeps them with the players."""
    players = game.players
    generator = players.generator.average
    generator.eval()
    images = generator(players.draw_unseen_latents(count))
    players.set_aside = torch.cat([players.set_aside, images.to("cpu", STORED_DTYPE)])
