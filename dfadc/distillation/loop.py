"""The training loop of adversarial distillation (Fang et al. 2019, algorithm 1), and nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from dfadc.distillation.compute.micro_batches import split_generator_batch, split_student_batch
from dfadc.distillation.step_plan import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from dfadc.distillation.distillation import Distillation
    from dfadc.distillation.images.batches import StudentBatch
    from dfadc.distillation.objectives import GeneratorStep, StudentStep


class StepLosses(NamedTuple):
    """Losses of one training step. The tensors are on the device: reading one waits for it.

    Args:
        step: steps done, this one included.
        student_loss: scalar, of the last student update on new images; NaN before its first one.
        generator_loss: scalar, of the last generator update.
        terms: the generator loss's terms by name, unweighted.
    """

    step: int
    student_loss: Tensor
    generator_loss: Tensor
    terms: dict[str, Tensor]


def distill(run: Distillation, until: int, on_step: Callable[[StepLosses], None]) -> None:
    """Trains until ``until`` steps are done, going on from ``run.state.step``.

    ``on_step`` is called after each whole step; what it raises stops the loop with a state that can be saved.
    """
    state = run.state
    while state.step < until:
        state.set_learning_rates()
        student_loss = generator_loss = torch.tensor(math.nan)
        terms: dict[str, Tensor] = {}
        for kind, number, _ in run.plan.due(state.step, state.num_steps):
            if kind is Kind.STUDENT:
                for _ in range(number):
                    student_loss = update_student(run, run.student.draw_batch())
            elif kind is Kind.REPEATED:
                for _ in range(number):
                    update_student(run, run.student.draw_repeated_batch())
            elif kind is Kind.GENERATOR:
                run.generator.begin_updates()
                for _ in range(number):
                    generator_loss, terms = update_generator(run)
                run.generator.end_updates()
            else:
                run.generator.fill_replay()
        state.step += 1
        on_step(StepLosses(state.step, student_loss, generator_loss, terms))


def update_student(run: Distillation, batch: StudentBatch) -> Tensor:
    """One update of the student towards the teacher's logits; the generator stays as it is."""
    state = run.state
    state.student.module.train()
    state.generator.module.train()
    steps: list[StudentStep] = []

    def losses() -> Iterator[Tensor]:
        for share, part in split_student_batch(batch, run.recipe.compute.micro_batch):
            step = run.student.loss(part)
            steps.append(step._replace(loss=share * step.loss.detach()))
            yield share * step.loss

    state.student.update(losses(), run.forward_state)
    state.store(torch.cat([each.fresh for each in steps]), torch.cat([each.fresh_logits for each in steps]))
    for step in steps:
        if len(step.fresh):  # else the batch is a repeated one itself
            state.repeats.push(step.images, step.teacher_logits)
    return torch.stack([step.loss for step in steps]).sum()


def update_generator(run: Distillation) -> tuple[Tensor, dict[str, Tensor]]:
    """One update of the generator; the student stays as it is, and so, in eval mode, do its batch-norm statistics."""
    state, recipe = run.state, run.recipe
    state.student.module.train(recipe.generator.student_mode == "train")
    state.generator.module.train()
    steps: list[tuple[float, GeneratorStep]] = []

    def losses() -> Iterator[Tensor]:
        batch = run.generator.draw_batch()
        for share, part in split_generator_batch(batch, recipe.batch_size, recipe.compute.micro_batch):
            step = run.generator.loss(part)
            steps.append((share, step._replace(loss=step.loss.detach())))
            yield share * step.loss

    state.generator.update(losses(), run.forward_state)
    total = torch.stack([share * step.loss for share, step in steps]).sum()
    terms = {name: torch.stack([share * step.terms[name] for share, step in steps]).sum() for name in steps[0][1].terms}
    return total, terms
