"""The two-player game (Fang et al. 2019, algorithm 1), and nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from dfadc.distillation.compute.micro_batches import split_generator_batch, split_student_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from dfadc.distillation.images.batches import StudentBatch
    from dfadc.distillation.objectives import Game, Lesson


class StepLosses(NamedTuple):
    """What one step of the game cost. The tensors are on the device: reading one waits for it.

    Args:
        step: steps done, this one included.
        student_loss: scalar, of the last student update; NaN before its first one.
        generator_loss: scalar, of the last generator update.
        terms: the generator loss's terms by name, unweighted.
    """

    step: int
    student_loss: Tensor
    generator_loss: Tensor
    terms: dict[str, Tensor]


def distill(game: Game, steps: int, on_step: Callable[[StepLosses], None]) -> None:
    """Plays until ``steps`` steps are done, going on from ``game.players.step``.

    ``on_step`` is called after each whole step; what it raises stops the game with the players in a state to save.
    """
    players, recipe = game.players, game.recipe
    while players.step < steps:
        players.set_learning_rates(players.step / recipe.steps)
        student_loss = torch.tensor(math.nan)
        if game.student_plays:
            for _ in range(recipe.student.steps):
                student_loss = update_student(game, game.draw_student_batch())
            for _ in range(recipe.replay.repeats):
                update_student(game, game.draw_echo_batch())
        game.begin_turn()
        for _ in range(recipe.generator.steps):
            generator_loss, terms = update_generator(game)
        game.end_turn()
        players.step += 1
        on_step(StepLosses(players.step, student_loss, generator_loss, terms))


def update_student(game: Game, batch: StudentBatch) -> Tensor:
    """The student learns to agree, on images that the generator draws for it; the generator does not move."""
    players = game.players
    players.student.module.train()
    players.generator.module.train()
    lessons: list[Lesson] = []

    def losses() -> Iterator[Tensor]:
        for share, part in split_student_batch(batch, game.recipe.compute.micro_batch):
            lesson = game.student_loss(part)
            lessons.append(lesson._replace(loss=share * lesson.loss.detach()))
            yield share * lesson.loss

    players.student.update(losses(), game.forward_state)
    players.remember(torch.cat([each.fresh for each in lessons]), torch.cat([each.answers for each in lessons]))
    for lesson in lessons:
        if len(lesson.fresh):  # else it is an echo itself
            players.echo.push(lesson.images, lesson.teacher_logits)
    return torch.stack([lesson.loss for lesson in lessons]).sum()


def update_generator(game: Game) -> tuple[Tensor, dict[str, Tensor]]:
    """The generator learns to disagree; the student does not move, nor, in eval mode, its batch-norm statistics."""
    players, recipe = game.players, game.recipe
    players.student.module.train(recipe.generator.student_mode == "train")
    players.generator.module.train()
    paid: list[Tensor] = []
    terms: dict[str, Tensor] = {}

    def losses() -> Iterator[Tensor]:
        batch = game.draw_generator_batch()
        for share, part in split_generator_batch(batch, recipe.batch_size, recipe.compute.micro_batch):
            loss, terms_of_part = game.generator_loss(part)
            paid.append(share * loss.detach())
            for name, term in terms_of_part.items():
                terms[name] = terms.get(name, 0.0) + share * term
            yield share * loss

    players.generator.update(losses(), game.forward_state)
    return torch.stack(paid).sum(), terms
