"""Measurements of a run from outside it: real accuracy against time, and memory."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from dfadc.evaluation.labelled_images import EvaluationData

BATCH_SIZE = 250
#: Looks at the student over a run, and images of each but the last look.
NUM_LOOKS, LOOK_IMAGES = 15, 2000


class Score(NamedTuple):
    """Accuracy and agreement of a student on real images that training never saw.

    Args:
        accuracy: share answered with their label.
        agreement: share answered as the teacher does.
    """

    accuracy: float
    agreement: float


class Judge:
    """Asks networks about labelled images; moves nothing.

    Args:
        data: the images.
        teacher: in eval mode; asked once.
        device: where networks live.
    """

    def __init__(self, data: EvaluationData, teacher: nn.Module, device: torch.device) -> None:
        self.data = data
        self.device = device
        self.teacher_classes = self._classes(teacher, len(data))
        self.teacher_accuracy = float((self.teacher_classes == data.labels).mean())

    def __call__(self, student: nn.Module, count: int | None = None) -> Score:
        """The score on the first ``count`` images, or on all; leaves the student in the mode it was in."""
        was_training = student.training
        classes = self._classes(student.eval(), count or len(self.data))
        student.train(was_training)
        right, agreed = classes == self.data.labels[: len(classes)], classes == self.teacher_classes[: len(classes)]
        return Score(float(right.mean()), float(agreed.mean()))

    @torch.no_grad()
    def _classes(self, network: nn.Module, count: int) -> NDArray[np.int64]:
        answers: list[NDArray[np.int64]] = []
        for batch in self.data.batches(BATCH_SIZE):
            answers.append(network(torch.from_numpy(batch).to(self.device)).argmax(dim=1).cpu().numpy())
            if len(answers) * BATCH_SIZE >= count:
                break
        return np.concatenate(answers)[:count]


@dataclass(frozen=True)
class Budget:
    """Budget of a run: seconds, or images.

    Args:
        seconds: of the run, turned into steps once, at the rate that is measured then.
        images: that a player is updated on, the same on every machine; if given, it decides.
    """

    seconds: float = 90.0
    images: int | None = None

    def __str__(self) -> str:
        return f"{self.seconds:g} s" if self.images is None else f"{self.images:,} images"

    def steps(self, *, seconds_per_step: float, images_per_step: float) -> int:
        """Whole steps, at least one."""
        allowed = self.seconds / seconds_per_step if self.images is None else self.images / images_per_step
        return max(1, int(allowed))


@dataclass
class Track:
    """Accuracy against time. Looking takes no time off the run, and nothing in the run depends on what is seen.

    Args:
        judge: of the student.
        student: the network that a run would export if it ended now.
        steps: of the run.
        seconds: of the run so far, looks excluded.
        curve: (seconds, accuracy) of each look but the last.
    """

    judge: Judge
    student: nn.Module
    steps: int
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._moments = {round(self.steps * (look + 1) / NUM_LOOKS) for look in range(NUM_LOOKS - 1)}
        self._since = time.perf_counter()

    def on_step(self, step: int) -> None:
        """Called after every step, the first of which begins where this was made."""
        if step != self.steps and step not in self._moments:
            return
        synchronise(self.judge.device)
        self.seconds += time.perf_counter() - self._since
        if step != self.steps:
            self.curve.append((round(self.seconds, 2), self.judge(self.student, LOOK_IMAGES).accuracy))
        self._since = time.perf_counter()


def synchronise(device: torch.device) -> None:
    """Waits for what the device still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_mebibytes() -> float | None:
    """The most memory that this process ever held, or the most that its tensors did on a GPU; None where unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415 - not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
