"""Health of a run: a probe on fixed latents, rollback from numbers that are not finite, reset after a collapse."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfadc.distillation.state import MONITOR
from dfadc.errors import TrainingDiverged
from dfadc.networks.logits import predict, same_predictions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfadc.distillation.distillation import Distillation
    from dfadc.distillation.trainable import TrainableNetwork

#: Images of the probe; fixed, so that its readings are comparable over the run.
PROBE_SIZE = 256
#: Skipped updates in a row after which a run is taken back to its last healthy state at half the rates.
MAX_SKIPPED = 3
#: Times a run is taken back before it is given up.
MAX_ROLLBACKS = 3
#: Class entropy under which the generator draws few classes, and under which it has collapsed.
NARROW, COLLAPSED = 0.5, 0.1
#: A student loss under which few classes are a collapse too: both networks agree, for there is nothing to tell apart.
TINY_LOSS = 0.01
#: A state must last this many readings, and this share of the run, before it is reported or acted on. An untrained
#: generator draws one class, and its moving average follows slowly: recipe auto on digits read 0.08 after 20 steps,
#: 0.28 after 40 and 0.99 after 200.
PATIENCE_READINGS, PATIENCE_SHARE = 10, 0.05
#: Times a generator begins anew before the run is given up.
MAX_RESETS = 3
_WAYS_OUT = "--set prior.balance=... (higher), a lower --set generator.optimizer.learning_rate=..., or --recipe auto"


@dataclass(frozen=True)
class ProbeReading:
    """State of a run on fixed latents, or on the newest images where the student is trained on replayed ones alone.

    Args:
        class_entropy: entropy of the teacher's predicted classes, or sets of labels, over the most that it can be, in
            [0, 1]; near 0 is a collapse.
        agreement: share of images on which student and teacher predict the same class or set of labels, in [0, 1].
        num_classes: classes, or sets of labels, that the teacher predicts at all.
    """

    class_entropy: float
    agreement: float
    num_classes: int

    @property
    def collapse(self) -> str:
        """Text in place of the agreement where it means nothing, as in a collapse; else empty."""
        if self.class_entropy >= COLLAPSED:
            return ""
        return f"collapsed: {self.num_classes} class{'es' if self.num_classes > 1 else ''}"


@dataclass
class _Streak:
    """Readings in a row that show the same trouble.

    Args:
        readings: how many.
        since: step of the first.
        is_reported: a note was made of it, or something done.
    """

    readings: int = 0
    since: int = 0
    is_reported: bool = False

    def update(self, *, trouble: bool, step: int, steps: int) -> bool:
        """Takes in a reading; True where the trouble has lasted and was not reported."""
        if not trouble:
            self.readings, self.is_reported = 0, False
            return False
        if self.readings == 0:
            self.since = step
        self.readings += 1
        has_lasted = self.readings >= PATIENCE_READINGS and step - self.since >= PATIENCE_SHARE * steps
        due = has_lasted and not self.is_reported
        self.is_reported = self.is_reported or due
        return due


class Monitor:
    """Checks a run at the log interval; between checks nothing waits for the device.

    Its state is part of the training state, so that a run that is resumed after a rollback goes on bit by bit.

    Args:
        run: not yet started or just resumed.
    """

    def __init__(self, run: Distillation) -> None:
        self.teacher = run.teacher
        self.state = run.state
        self.recipe = run.recipe
        self.policy = run.policy
        rng = torch.Generator().manual_seed(run.recipe.seed + 3)
        self.latents = torch.randn(PROBE_SIZE, run.state.latent_dim, generator=rng).to(run.policy.device)
        self.rollbacks = 0
        self.resets = 0
        self._streaks = {"narrow": _Streak(), "collapsed": _Streak()}
        self._healthy = run.state.snapshot()
        run.state.register_state(MONITOR, self)

    def check(self, student_loss: float) -> tuple[ProbeReading, str]:
        """Takes the run back where it is stuck, reads the probe, and acts on a collapse.

        Args:
            student_loss: of the last student update; NaN before the first.

        Returns:
            The reading, and a note on trouble, or nothing.

        Raises:
            TrainingDiverged: neither helps any more.
        """
        taken_back = self.check_finite()
        probe = self.probe()
        collapse = self.check_collapse(probe, student_loss)
        return probe, "; ".join(note for note in (taken_back, collapse) if note)

    @torch.no_grad()
    def probe(self) -> ProbeReading:
        """Compares averaged student and teacher on the probe's images; changes nothing."""
        student, policy = self.state.student.average.eval(), self.policy
        task, predictions, agreements = self.teacher.contract.task, [], []
        with policy.autocast():
            for part in self._images():
                images = part.contiguous(memory_format=policy.memory_format)
                teacher_logits, student_logits = self.teacher.logits(images), student(images)
                predictions.append(predict(teacher_logits, task))
                agreements.append(same_predictions(student_logits, teacher_logits, task))
        found, num_possible = torch.cat(predictions), self.teacher.contract.num_classes
        if task == "multilabel":  # sets of labels take the place of classes
            _, found = found.unique(dim=0, return_inverse=True)
            num_possible = min(2**num_possible, len(found))
        shares = found.flatten().bincount(minlength=num_possible) / found.numel()
        return ProbeReading(
            class_entropy=abs(float(torch.xlogy(shares, shares).sum())) / math.log(num_possible),
            agreement=float(torch.cat(agreements).float().mean()),
            num_classes=int((shares > 0).sum()),
        )

    def _images(self) -> Iterator[Tensor]:
        """The probe's images in parts, for a check should not need more memory than an update."""
        state, size = self.state, self.teacher.placement.images_at_once or PROBE_SIZE
        if self.recipe.replay.share == 1 and len(state.replay):
            yield from state.replay.newest(PROBE_SIZE).split(size)
        else:
            yield from map(state.generator.average.eval(), self.latents.split(size))

    def check_collapse(self, probe: ProbeReading, student_loss: float) -> str | None:
        """Notes that the generator draws few classes, or resets it where it has collapsed.

        A student loss of nearly nothing on few classes is a collapse, whatever it looks like (DAFL on CIFAR-100: loss
        0.0003, accuracy 1%).

        Raises:
            TrainingDiverged: the generator collapsed again after it began anew several times.
        """
        step, steps = self.state.step, self.state.num_steps
        is_narrow = probe.class_entropy < NARROW
        is_collapsed = probe.class_entropy < COLLAPSED or (is_narrow and student_loss < TINY_LOSS)
        warns = self._streaks["narrow"].update(trouble=is_narrow, step=step, steps=steps)
        acts = self._streaks["collapsed"].update(trouble=is_collapsed, step=step, steps=steps)
        found = f"class entropy {probe.class_entropy:.2f}, student loss {student_loss:.3g}"
        if acts:
            return self._begin_anew(f"the generator has collapsed to few classes ({found})")
        if warns:
            return f"the generator draws few classes ({found}); if that stays: {_WAYS_OUT}"
        return None

    def _begin_anew(self, problem: str) -> str:
        if self.recipe.generator.on_collapse == "warn":
            return f"{problem}: student updates on it teach little. Try {_WAYS_OUT}"
        self.resets += 1
        if self.resets > MAX_RESETS:
            raise TrainingDiverged(
                f"at step {self.state.step} {problem}, again after it began anew {MAX_RESETS} times", _WAYS_OUT
            )
        self.state.generator.reset(self.state.rng)
        self._streaks = {"narrow": _Streak(), "collapsed": _Streak()}
        return f"{problem}: it begins anew ({self.resets} of {MAX_RESETS})"

    def check_finite(self) -> str | None:
        """Takes the run back where student or generator is stuck; returns a note then.

        Updates with a gradient that is not finite changed nothing, but the next ones may be no better; and a huge but
        finite gradient may have moved the weights too far to come back. All that a checkpoint holds goes back with
        them, but for steps and random streams.

        Raises:
            TrainingDiverged: the run has been taken back too often.
        """
        state = self.state
        both = {"student": state.student, "generator": state.generator}
        stuck = [name for name, network in both.items() if _is_stuck(network)]
        if not stuck:
            if all(float(network.skipped) == 0 for network in both.values()):
                self._healthy = state.snapshot()
            return None
        self.rollbacks += 1
        if self.rollbacks > MAX_ROLLBACKS:
            raise TrainingDiverged(
                f"training diverged at step {state.step}: the {stuck[0]} left the finite numbers again",
                f"try half the learning rate (--set {stuck[0]}.optimizer.learning_rate=...), "
                f"--set {stuck[0]}.optimizer.clip_norm=1 or --precision fp32",
            )
        scales = [network.rate_scale for network in both.values()]
        state.go_back(self._healthy)
        for network, scale in zip(both.values(), scales, strict=True):
            network.rate_scale = scale / 2
        return f"the {stuck[0]} left the finite numbers: student and generator taken back, learning rates halved"

    def state_dict(self) -> dict[str, Any]:
        """The state to go back to, and counts of the trouble so far."""
        streaks = {name: asdict(streak) for name, streak in self._streaks.items()}
        marks = [store.mark_state() for store in self.state.stores]
        counts = {"rollbacks": self.rollbacks, "resets": self.resets}
        return {"healthy": self._healthy, "marks": marks, **counts, "streaks": streaks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._healthy = copy.deepcopy(state["healthy"])
        for store, marks in zip(self.state.stores, state["marks"], strict=True):
            store.load_mark_state(marks)
        self.rollbacks, self.resets = state["rollbacks"], state["resets"]
        self._streaks = {name: _Streak(**streak) for name, streak in state["streaks"].items()}


def _is_stuck(network: TrainableNetwork) -> bool:
    """Too many updates skipped in a row, or weights or statistics that are not finite (or too large to add up)."""
    return float(network.skipped) >= MAX_SKIPPED or not bool(torch.nn.utils.get_total_norm(network.finite).isfinite())
