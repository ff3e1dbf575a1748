"""A distillation: the teacher, the training state and both objectives, as the loop takes them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from dfadc.distillation.compute.cpu_workarounds import Fp32Layers
from dfadc.distillation.forward_state import ForwardState
from dfadc.distillation.objectives import GeneratorObjective, StudentObjective
from dfadc.distillation.step_plan import StepPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from dfadc.distillation.compute.policy import ComputePolicy
    from dfadc.distillation.state import TrainingState
    from dfadc.recipe.schema import Recipe
    from dfadc.student.inherit import Correspondence
    from dfadc.teacher.load import Teacher


class Distillation:
    """Teacher, training state and both objectives; within its context hooks look into the networks.

    Args:
        teacher: placed on the policy's device.
        batch_norms: its batch-norm layers with running statistics that images pass through.
        state: student, generator, replay buffer and random streams.
        recipe: resolved.
        policy: how tensors are computed.
        adversarial: weight of the discrepancy in the generator's loss.
        hints: layers that the student's loss compares.
    """

    def __init__(
        self,
        teacher: Teacher,
        batch_norms: list[nn.Module],
        state: TrainingState,
        *,
        recipe: Recipe,
        policy: ComputePolicy,
        adversarial: float = 1.0,
        hints: Sequence[Correspondence] = (),
    ) -> None:
        self.teacher = teacher
        self.batch_norms = batch_norms
        self.state = state
        self.recipe = recipe
        self.policy = policy
        self.plan = StepPlan.of(recipe)
        self.student = StudentObjective(teacher, state, recipe=recipe, policy=policy, hints=hints)
        self.generator = GeneratorObjective(
            teacher, batch_norms, state, recipe=recipe, policy=policy, adversarial=adversarial
        )
        self.fp32_layers = Fp32Layers(teacher.module, state.student.module, policy=policy)
        buffers = (*state.student.module.buffers(), *state.generator.module.buffers())
        #: Tensors that the forward passes of an update write to.
        self.forward_state = ForwardState((*buffers, *self.generator.forward_state()))
        self._open = ExitStack()

    def compile(self, backend: str = "inductor") -> None:
        """Compiles both objectives."""
        self.student.compile(backend)
        self.generator.compile(backend)

    def uncompile(self) -> None:
        """Goes back to the eager objectives."""
        self.student.uncompile()
        self.generator.uncompile()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for hooks in (self.fp32_layers, self.student.hints, self.generator.matching):
                if hooks is not None:
                    stack.enter_context(hooks)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves teacher and student as they were, also after an error."""
        self._open.close()
