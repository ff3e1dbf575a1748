"""Losses of the student and the generator, built from the recipe, compiled or not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dfadc.distillation.images import augmentation
from dfadc.distillation.images.batches import draw_repeated_batch, draw_student_batch
from dfadc.distillation.losses import priors
from dfadc.distillation.losses.batch_norm import BatchNormMatching
from dfadc.distillation.losses.discrepancy import AS_CLASSES, compute_discrepancy, kl, l1, scaled_l1
from dfadc.distillation.losses.hints import LayerHints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from dfadc.distillation.compute.policy import ComputePolicy
    from dfadc.distillation.images.batches import StudentBatch
    from dfadc.distillation.state import TrainingState
    from dfadc.recipe.schema import Recipe
    from dfadc.student.inherit import Correspondence
    from dfadc.teacher.load import Teacher


class StudentStep(NamedTuple):
    """Result of the student's loss on a batch.

    Args:
        loss: scalar.
        fresh: (F + P, C, H, W), images that were drawn for it.
        fresh_logits: the teacher's logits to them.
        images: (N, C, H, W), as the student saw them: mixed up, where the recipe does that.
        teacher_logits: to these.
    """

    loss: Tensor
    fresh: Tensor
    fresh_logits: Tensor
    images: Tensor
    teacher_logits: Tensor


class GeneratorBatch(NamedTuple):
    """Inputs of a generator update.

    Args:
        latents: (N, Z); None where they are trained with the generator: then they are drawn within its loss.
        targets: (N,), the classes that the teacher is to see in the images; None: its own argmax.
        adversarial: scalar, the weight of the discrepancy now.
        rows: those of the latents that are drawn within the loss.
    """

    latents: Tensor | None
    targets: Tensor | None
    adversarial: Tensor
    rows: slice = slice(None)


class GeneratorStep(NamedTuple):
    """Result of the generator's loss on a batch.

    Args:
        loss: scalar.
        terms: by name, detached and unweighted.
    """

    loss: Tensor
    terms: dict[str, Tensor]


class StudentObjective:
    """The student's loss, and the batches that it is taken on.

    Args:
        teacher: placed on the policy's device.
        state: student, generator, replay buffer and random streams.
        recipe: resolved.
        policy: how tensors are computed.
        hints: layers of student and teacher that correspond.
    """

    def __init__(
        self,
        teacher: Teacher,
        state: TrainingState,
        *,
        recipe: Recipe,
        policy: ComputePolicy,
        hints: Sequence[Correspondence] = (),
    ) -> None:
        self.teacher = teacher
        self.state = state
        self.recipe = recipe
        self.policy = policy
        self.as_classes = AS_CLASSES[teacher.contract.task]
        self.hints = LayerHints(hints) if recipe.student.hints > 0 and hints else None
        self.loss: Callable[[StudentBatch], StudentStep] = self._loss

    def compile(self, backend: str) -> None:
        """Compiles forward pass and loss, as one graph for each shape.

        With replay the very first batch, all fresh, has a shape of its own, and repeated batches have theirs;
        ``dynamic=False`` keeps the graph of all others static. ``backward`` and ``optimizer.step`` stay outside: they
        break a full graph (torch 2.14).
        """
        self.loss = torch.compile(self._loss, fullgraph=True, dynamic=False, backend=backend)

    def uncompile(self) -> None:
        """Goes back to the eager function."""
        self.loss = self._loss

    def draw_batch(self) -> StudentBatch:
        """Inputs of an update on new images."""
        return draw_student_batch(self.state, self.recipe, self.teacher.contract)

    def draw_repeated_batch(self) -> StudentBatch:
        """Inputs of an update that repeats earlier ones."""
        return draw_repeated_batch(self.state, self.recipe.batch_size)

    def _loss(self, batch: StudentBatch) -> StudentStep:
        """The loss on a batch, and the images and logits to store. No graph leads to generator or teacher."""
        settings, mixes = self.recipe.student, self.recipe.augmentation.mixup > 0
        with nullcontext() if self.hints is None else self.hints.comparing() as distance, self.policy.autocast():
            with torch.no_grad():
                fresh = self._draw_fresh(batch)
                images = torch.cat([fresh, batch.replayed]) if len(batch.replayed) else fresh
                if mixes:
                    images = augmentation.mixup(images, batch.mixup)
                images = images.contiguous(memory_format=self.policy.memory_format)
                teacher_logits = self._teacher_logits(images, batch.stored_logits)
                fresh_logits = teacher_logits[: len(fresh)]
                if mixes and self.state.replay.keeps_logits and len(fresh):
                    fresh_logits = self.teacher.logits(fresh)
            student_logits = self.state.student.module(images)
        loss = settings.l1 * l1(student_logits, teacher_logits)
        student_classes, teacher_classes = (self.as_classes(logits) for logits in (student_logits, teacher_logits))
        if settings.scaled_l1 > 0:
            loss = loss + settings.scaled_l1 * scaled_l1(student_classes, teacher_classes)
        if settings.kl > 0:
            loss = loss + settings.kl * kl(student_classes, teacher_classes, temperature=settings.temperature)
        if distance:
            loss = loss + settings.hints * torch.stack(distance).mean()
        return StudentStep(loss, fresh, fresh_logits, images, teacher_logits)

    def _draw_fresh(self, batch: StudentBatch) -> Tensor:
        """New images (F + P, C, H, W); a generator's batch norm takes no empty batch."""
        if not len(batch.latents):
            return batch.procedural
        drawn: Tensor = self.state.generator.module(batch.latents)
        return torch.cat([drawn, batch.procedural.to(drawn.dtype)]) if len(batch.procedural) else drawn

    def _teacher_logits(self, images: Tensor, stored: Tensor) -> Tensor:
        """The teacher's logits to images (N, C, H, W), of which those of the last ones may be ``stored``."""
        new = images[: len(images) - len(stored)]
        if not len(new):
            return stored
        logits = self.teacher.logits(new)
        return torch.cat([logits.float(), stored]) if len(stored) else logits


class GeneratorObjective:
    """The generator's loss, and what happens around its updates.

    Args:
        teacher: placed on the policy's device.
        batch_norms: its batch-norm layers with running statistics that images pass through.
        state: student, generator, replay buffer and random streams.
        recipe: resolved.
        policy: how tensors are computed.
        adversarial: weight of the discrepancy; with 0 the student has no say.
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
    ) -> None:
        self.teacher = teacher
        self.state = state
        self.recipe = recipe
        self.policy = policy
        self.adversarial = adversarial
        self.task = teacher.contract.task
        self.matching: BatchNormMatching | None = None
        if recipe.prior.batch_norm > 0:
            self.matching = BatchNormMatching(batch_norms, recipe.prior.batch_norm_momentum)
            state.register_state("batch_norm", self.matching)
        self.loss: Callable[[GeneratorBatch], GeneratorStep] = self._loss

    def compile(self, backend: str) -> None:
        """Compiles forward pass and loss as one graph."""
        self.loss = torch.compile(self._loss, fullgraph=True, dynamic=False, backend=backend)

    def uncompile(self) -> None:
        """Goes back to the eager function."""
        self.loss = self._loss

    def begin_updates(self) -> None:
        """Before the generator's updates of a step."""
        self.state.generator.renew_latents_()

    def end_updates(self) -> None:
        """After the generator's updates of a step."""
        if self.matching is not None:
            self.matching.end_updates()

    @torch.no_grad()
    def fill_replay(self) -> None:
        """Puts a batch into the replay buffer, where the student is trained on that alone."""
        state = self.state
        state.generator.module.train()
        with self.policy.autocast():
            images = state.generator.module(state.draw_latents(self.recipe.batch_size))
            logits = self.teacher.logits(images) if state.replay.keeps_logits else None
        state.store(images, logits, offer=len(images))

    def draw_batch(self) -> GeneratorBatch:
        """Latents, their classes where they have any, and the weight of the discrepancy."""
        state, latents = self.state, self.state.generator.latents
        has_begun = state.step >= self.recipe.generator.adversarial_start * state.num_steps
        return GeneratorBatch(
            latents=None if latents.are_trained else state.draw_latents(self.recipe.batch_size),
            targets=latents.targets,
            adversarial=torch.full((), self.adversarial if has_begun else 0.0, device=self.policy.device),
        )

    def forward_state(self) -> Iterator[Tensor]:
        """Tensors that the loss writes to, beside the buffers of the networks."""
        if self.matching is not None:
            yield from (*self.matching.latest, self.matching.is_recorded)

    def _recording(self) -> AbstractContextManager[list[Tensor]]:
        return nullcontext([]) if self.matching is None else self.matching.recording()

    def _loss(self, batch: GeneratorBatch) -> GeneratorStep:
        terms: dict[str, Tensor] = {}
        latents = batch.latents
        if latents is None:
            latents = self.state.draw_latents(self.recipe.batch_size)[batch.rows]
        with self.policy.autocast():
            images = self.state.generator.module(latents)
            images = images.contiguous(memory_format=self.policy.memory_format)
            with self._recording() as distances:
                teacher_logits = self.teacher.logits(images)
            if self.adversarial > 0:
                student_logits = self.state.student.module(images)
        loss = torch.zeros((), device=batch.adversarial.device)
        if self.adversarial > 0:
            name = self.recipe.generator.discrepancy
            terms["discrepancy"] = compute_discrepancy(name, student_logits, teacher_logits, self.task)
            # The one place where the sign flips: the generator maximises the discrepancy.
            loss = loss - batch.adversarial * terms["discrepancy"]
        weights, teacher_classes = self.recipe.prior, AS_CLASSES[self.task](teacher_logits)
        if self.matching is not None:
            terms["batch_norm"] = torch.stack(distances).sum()
            loss = loss + weights.batch_norm * terms["batch_norm"]
        if weights.one_hot > 0:
            terms["one_hot"] = priors.one_hot(teacher_classes, batch.targets)
            loss = loss + weights.one_hot * terms["one_hot"]
        if weights.balance > 0:
            terms["balance"] = priors.class_balance(teacher_classes)
            loss = loss + weights.balance * terms["balance"]
        return GeneratorStep(loss, {name: term.detach() for name, term in terms.items()})
