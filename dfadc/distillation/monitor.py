"""Is the game healthy? A probe on fixed latents, and the way back from numbers that are not finite or a collapse."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfadc.distillation.state import MONITOR
from dfadc.errors import TrainingDiverged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfadc.distillation.objectives import Game
    from dfadc.distillation.trainable import TrainableNetwork

#: Images of the probe; fixed, so that its readings are comparable over the run.
PROBE_SIZE = 256
#: Skipped updates in a row after which a player is taken back to its last healthy state at half the rate.
MAX_SKIPPED = 3
#: Times a run is taken back before it is given up.
MAX_ROLLBACKS = 3
#: Class entropy under which the generator draws few classes, and under which it has collapsed.
NARROW, COLLAPSED = 0.5, 0.1
#: A student loss under which few classes are a collapse too: both players agree because there is nothing to tell apart.
TINY_LOSS = 0.01
#: A state must last this many readings, and this share of the run, before anything is said or done. An untrained
#: generator draws one class, and its moving average follows slowly: recipe auto on digits read 0.08 after 20 steps,
#: 0.28 after 40 and 0.99 after 200.
PATIENCE_READINGS, PATIENCE_SHARE = 10, 0.05
#: Times a generator begins anew before the run is given up.
MAX_RESETS = 3
_WAYS_OUT = "--set prior.balance=... (higher), a lower --set generator.optimizer.learning_rate=..., or --recipe auto"


@dataclass(frozen=True)
class ProbeReading:
    """How the players do on fixed latents, or on the newest images where the student lives from the ring alone.

    Args:
        class_entropy: entropy of the teacher's predicted classes over log K, in [0, 1]; near 0 is a collapse.
        agreement: share of images on which student and teacher predict the same class, in [0, 1].
        num_classes: classes that the teacher predicts at all.
    """

    class_entropy: float
    agreement: float
    num_classes: int

    @property
    def collapse(self) -> str:
        """Text in the place of the agreement where it is worth nothing, as in a collapse; else empty."""
        if self.class_entropy >= COLLAPSED:
            return ""
        return f"collapsed: {self.num_classes} class{'es' if self.num_classes > 1 else ''}"


@dataclass
class _Streak:
    """Readings in a row that show the same trouble.

    Args:
        readings: how many.
        since: step of the first.
        is_told: whether anything was said or done.
    """

    readings: int = 0
    since: int = 0
    is_told: bool = False

    def take(self, *, trouble: bool, step: int, steps: int) -> bool:
        """Takes in a reading; True where the trouble has lasted and nobody was told."""
        if not trouble:
            self.readings, self.is_told = 0, False
            return False
        if self.readings == 0:
            self.since = step
        self.readings += 1
        has_lasted = self.readings >= PATIENCE_READINGS and step - self.since >= PATIENCE_SHARE * steps
        due = has_lasted and not self.is_told
        self.is_told = self.is_told or due
        return due


class Monitor:
    """Looks at a game at the log interval; between looks nothing waits for the device.

    What it remembers goes with the players, so that a run that is resumed after a rollback goes on bit by bit.

    Args:
        game: the game, not yet started or just resumed.
    """

    def __init__(self, game: Game) -> None:
        self.game = game
        rng = torch.Generator().manual_seed(game.recipe.seed + 3)
        self.latents = torch.randn(PROBE_SIZE, game.players.latent_dim, generator=rng).to(game.policy.device)
        self.rollbacks = 0
        self.resets = 0
        self._streaks = {"narrow": _Streak(), "collapsed": _Streak()}
        self._healthy = game.players.snapshot()
        game.players.carry(MONITOR, self)

    def look(self, student_loss: float) -> tuple[ProbeReading, str]:
        """Takes the players back where they are stuck, reads the probe, and acts on a collapse.

        Args:
            student_loss: of the last student update; NaN before the first.

        Returns:
            The reading, and what was found or done, or nothing.

        Raises:
            TrainingDiverged: neither helps any more.
        """
        taken_back = self.check_finite()
        probe = self.probe()
        collapse = self.check_collapse(probe, student_loss)
        return probe, "; ".join(note for note in (taken_back, collapse) if note)

    @torch.no_grad()
    def probe(self) -> ProbeReading:
        """Asks averaged student and teacher about the probe's images; moves nothing."""
        student, policy = self.game.players.student.average.eval(), self.game.policy
        answers = []
        with policy.autocast():
            for part in self._images():
                images = part.contiguous(memory_format=policy.memory_format)
                answers.append([network(images).argmax(dim=1) for network in (self.game.teacher, student)])
        teacher_classes, student_classes = (torch.cat(of_one) for of_one in zip(*answers, strict=True))
        num_classes = self.game.contract.num_classes
        shares = torch.bincount(teacher_classes.flatten(), minlength=num_classes) / teacher_classes.numel()
        return ProbeReading(
            class_entropy=abs(float(torch.xlogy(shares, shares).sum())) / math.log(num_classes),
            agreement=float((teacher_classes == student_classes).float().mean()),
            num_classes=int((shares > 0).sum()),
        )

    def _images(self) -> Iterator[Tensor]:
        """The probe's images in parts, for a look should not need more memory than an update."""
        players, size = self.game.players, self.game.images_at_once
        if self.game.recipe.replay.share == 1 and len(players.ring):
            yield from players.ring.newest(PROBE_SIZE).split(size)
        else:
            yield from map(players.generator.average.eval(), self.latents.split(size))

    def check_collapse(self, probe: ProbeReading, student_loss: float) -> str | None:
        """Says that the generator draws few classes, or lets it begin anew where it has collapsed.

        A student loss of nearly nothing on few classes is a collapse, whatever it looks like (DAFL on CIFAR-100: loss
        0.0003, accuracy 1%).

        Raises:
            TrainingDiverged: the generator collapsed again after it began anew several times.
        """
        step, steps = self.game.players.step, self.game.recipe.steps
        is_narrow = probe.class_entropy < NARROW
        is_collapsed = probe.class_entropy < COLLAPSED or (is_narrow and student_loss < TINY_LOSS)
        warns = self._streaks["narrow"].take(trouble=is_narrow, step=step, steps=steps)
        acts = self._streaks["collapsed"].take(trouble=is_collapsed, step=step, steps=steps)
        found = f"class entropy {probe.class_entropy:.2f}, student loss {student_loss:.3g}"
        if acts:
            return self._begin_anew(f"the generator has collapsed to few classes ({found})")
        if warns:
            return f"the generator draws few classes ({found}); if that stays: {_WAYS_OUT}"
        return None

    def _begin_anew(self, problem: str) -> str:
        if self.game.recipe.generator.on_collapse == "warn":
            return f"{problem}: what the student learns from it is worth little. Try {_WAYS_OUT}"
        self.resets += 1
        if self.resets > MAX_RESETS:
            raise TrainingDiverged(
                f"at step {self.game.players.step} {problem}, again after it began anew {MAX_RESETS} times", _WAYS_OUT
            )
        self.game.players.generator.reset(self.game.players.rng)
        self._streaks = {"narrow": _Streak(), "collapsed": _Streak()}
        return f"{problem}: it begins anew ({self.resets} of {MAX_RESETS})"

    def check_finite(self) -> str | None:
        """Takes both players back where one is stuck; says so.

        Updates with a gradient that is not finite moved nothing, but the next ones may be no better; and a huge but
        finite gradient may have moved the weights too far to come back. All that a checkpoint holds goes back with
        them, but for steps and dice.

        Raises:
            TrainingDiverged: the run has been taken back too often.
        """
        players = self.game.players
        both = {"student": players.student, "generator": players.generator}
        stuck = [name for name, player in both.items() if _is_stuck(player)]
        if not stuck:
            if all(float(player.skipped) == 0 for player in both.values()):
                self._healthy = players.snapshot()
            return None
        self.rollbacks += 1
        if self.rollbacks > MAX_ROLLBACKS:
            raise TrainingDiverged(
                f"training diverged at step {players.step}: the {stuck[0]} left the finite numbers again",
                f"try half the learning rate (--set {stuck[0]}.optimizer.learning_rate=...), "
                f"--set {stuck[0]}.optimizer.clip_norm=1 or --precision fp32",
            )
        scales = [player.rate_scale for player in both.values()]
        players.go_back(self._healthy)
        for player, scale in zip(both.values(), scales, strict=True):
            player.rate_scale = scale / 2
        return f"the {stuck[0]} left the finite numbers: both players taken back, learning rates halved"

    def state_dict(self) -> dict[str, Any]:
        """The state to go back to, and what was found and done so far."""
        streaks = {name: asdict(streak) for name, streak in self._streaks.items()}
        marks = [store.mark_state() for store in self.game.players.stores]
        counts = {"rollbacks": self.rollbacks, "resets": self.resets}
        return {"healthy": self._healthy, "marks": marks, **counts, "streaks": streaks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._healthy = copy.deepcopy(state["healthy"])
        for store, marks in zip(self.game.players.stores, state["marks"], strict=True):
            store.load_mark_state(marks)
        self.rollbacks, self.resets = state["rollbacks"], state["resets"]
        self._streaks = {name: _Streak(**streak) for name, streak in state["streaks"].items()}


def _is_stuck(player: TrainableNetwork) -> bool:
    """Too many updates skipped in a row, or weights or statistics that are not finite (or too large to add up)."""
    return float(player.skipped) >= MAX_SKIPPED or not bool(torch.nn.utils.get_total_norm(player.finite).isfinite())
