"""Plan of a run: recipe, cost and notes, shown before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfadc.distillation.step_plan import TRAINED_ON, Kind, StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfadc.recipe.schema import Recipe
    from dfadc.student.build import Student
    from dfadc.teacher.load import Teacher
    from dfadc.training.cost import Estimate


@dataclass(frozen=True)
class NetworkFlops:
    """Floating-point operations of each network for one image, forward; None where they could not be counted."""

    teacher: int | None
    student: int | None
    generator: int | None

    def per_step(self, recipe: Recipe) -> float | None:
        """Operations of an average step of the run.

        A backward pass takes twice the forward one for a network that is trained, and as much as the forward one where
        a gradient only passes through on its way to the images.
        """
        teacher, student, generator = self.teacher, self.student, self.generator
        if teacher is None or student is None or generator is None:
            return None
        per_image = {
            Kind.STUDENT: generator * (1 - recipe.replay.share) + teacher + 3 * student,
            Kind.REPEATED: 3 * student,
            Kind.GENERATOR: 3 * generator + 2 * (teacher + student),
            Kind.REPLAY: generator,
        }
        return recipe.batch_size * StepPlan.of(recipe).mean(per_image)


@dataclass(frozen=True)
class Plan:
    """A run's recipe and cost.

    Args:
        recipe: as resolved for this teacher, student and budget.
        device: of the training.
        precision: of matrix work, with the reason.
        estimate: measured seconds a step, memory, and the decision on compiling.
        notes: on adaptations, and on what is worth knowing.
        parameters: of teacher, student and generator.
        flops_per_step: arithmetic of an average step, 2 for each multiply-add; None where it could not be counted.
    """

    recipe: Recipe
    device: str
    precision: str
    estimate: Estimate
    notes: tuple[str, ...]
    parameters: dict[str, int]
    flops_per_step: float | None

    @property
    def images(self) -> int:
        """Images that student and generator will be updated on in all."""
        return round(self.recipe.batch_size * StepPlan.of(self.recipe).total(self.recipe.steps, TRAINED_ON))

    @property
    def seconds(self) -> float:
        """Estimated seconds of the whole training."""
        return self.recipe.steps * self.estimate.seconds_per_step


def size_notes(teacher: Teacher, student: Student, flops: NetworkFlops) -> Iterator[str]:
    """Notes on parameters and operations that a student does not save."""
    if student.num_parameters >= teacher.num_parameters:
        yield (
            f"the student {student.architecture} ({student.num_parameters:,} parameters) is not smaller than "
            f"the teacher ({teacher.num_parameters:,})"
        )
    if flops.student is None or flops.teacher is None:
        yield "FLOPs are unknown: teacher or student cannot be counted"
    elif flops.student >= flops.teacher:
        yield (
            f"the student {student.architecture} ({flops.student / 1e6:,.1f} MFLOPs an image) computes no "
            f"less than the teacher ({flops.teacher / 1e6:,.1f})"
        )
