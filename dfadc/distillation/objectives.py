"""What the players are paid: one forward-and-loss function for each, composed from a recipe, compiled or not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dfadc.distillation.compute.cpu_workarounds import Fp32Layers
from dfadc.distillation.forward_state import ForwardState
from dfadc.distillation.images import augmentation
from dfadc.distillation.images.batches import StudentBatch, draw_echo_batch, draw_student_batch
from dfadc.distillation.losses import discrepancy
from dfadc.distillation.losses.generator_terms import Terms
from dfadc.distillation.losses.hints import LayerHints
from dfadc.student.inherit import corresponding_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dfadc.contract import ImageContract
    from dfadc.distillation.compute.policy import ComputePolicy
    from dfadc.distillation.state import Players
    from dfadc.recipe.schema import Recipe


#: Values of images that may be in a network together outside updates, whatever an update holds.
FREE_VALUES = 2**20


class Lesson(NamedTuple):
    """What a student update was paid for.

    Args:
        loss: scalar.
        fresh: (F + P, C, H, W), what was drawn for it.
        answers: the teacher's logits to them.
        images: (N, C, H, W), as the student was shown them: mixed up, where the recipe does that.
        teacher_logits: to these.
    """

    loss: Tensor
    fresh: Tensor
    answers: Tensor
    images: Tensor
    teacher_logits: Tensor


class GeneratorBatch(NamedTuple):
    """What a generator update is drawn from.

    Args:
        latents: (N, Z); None where they move with the generator: then they are drawn within its loss.
        targets: (N,), the classes that the images are to be taken for; None: the teacher's own argmax.
        adversarial: scalar, the weight of the discrepancy now.
        rows: those of the latents that are drawn within the loss.
    """

    latents: Tensor | None
    targets: Tensor | None
    adversarial: Tensor
    rows: slice = slice(None)


class Game:
    """Teacher, players and the rules that a recipe sets.

    Args:
        teacher: frozen network in eval mode on the policy's device, (N, C, H, W) -> logits.
        batch_norms: the teacher's batch-norm layers with running statistics.
        players: who plays.
        recipe: the rules.
        contract: what an image is.
        policy: how tensors are computed.
        adversarial: weight of the discrepancy in the generator's loss.
    """

    def __init__(
        self,
        teacher: nn.Module,
        batch_norms: list[nn.Module],
        *,
        players: Players,
        recipe: Recipe,
        contract: ImageContract,
        policy: ComputePolicy,
        adversarial: float = 1.0,
    ) -> None:
        self.teacher = teacher
        self.batch_norms = batch_norms
        self.players = players
        self.recipe = recipe
        self.contract = contract
        self.policy = policy
        self.adversarial = adversarial
        self.discrepancy = discrepancy.DISCREPANCIES[recipe.generator.discrepancy]
        self.priors = Terms(teacher, batch_norms, settings=recipe.prior, players=players)
        self.hints: LayerHints | None = None
        if recipe.student.hints > 0 and (layers := corresponding_layers(players.student.module, teacher)):
            self.hints = LayerHints(layers)
        self.fp32_layers = Fp32Layers(teacher, players.student.module, policy=policy)
        #: What the forward passes of an update move.
        self.forward_state = ForwardState(self._forward_state())
        self.student_loss: Callable[[StudentBatch], Lesson] = self._student_loss
        self.generator_loss: Callable[[GeneratorBatch], tuple[Tensor, dict[str, Tensor]]] = self._generator_loss

    @property
    def images_at_once(self) -> int:
        """Images that are in a network together outside updates: as many as in an update, which is known to fit."""
        batch_size, part = self.recipe.batch_size, self.recipe.compute.micro_batch
        return max(min(batch_size, part or batch_size), FREE_VALUES // math.prod(self.contract.input_size))

    def _forward_state(self) -> Iterator[Tensor]:
        for network in (self.players.student.module, self.players.generator.module):
            yield from network.buffers()
        yield from self.priors.forward_state()

    def compile(self, backend: str = "inductor") -> None:
        """Compiles both forward-and-loss functions, each as one graph for each shape.

        With replay the student's very first batch, all fresh, has a shape of its own, and echoes have theirs;
        ``dynamic=False`` keeps the graph of all others static. ``backward`` and ``optimizer.step`` stay outside: they
        break a full graph (torch 2.14).
        """
        self.student_loss = torch.compile(self._student_loss, fullgraph=True, dynamic=False, backend=backend)
        self.generator_loss = torch.compile(self._generator_loss, fullgraph=True, dynamic=False, backend=backend)

    def uncompile(self) -> None:
        """Goes back to the eager functions."""
        self.student_loss, self.generator_loss = self._student_loss, self._generator_loss

    def close(self) -> None:
        """Leaves teacher and student as they were found."""
        self.fp32_layers.close()
        self.priors.close()
        if self.hints is not None:
            self.hints.close()

    # ------------------------------------------------------------------------------------------- student's side

    @property
    def student_plays(self) -> bool:
        """Whether the student's part of the run has begun; until then the generator fills the ring."""
        return self.players.step >= self.recipe.student.start * self.recipe.steps

    def draw_student_batch(self) -> StudentBatch:
        """What the next student update is drawn from."""
        return draw_student_batch(self.players, self.recipe, self.contract)

    def draw_echo_batch(self) -> StudentBatch:
        """What an update that repeats earlier ones is drawn from."""
        return draw_echo_batch(self.players, self.recipe.batch_size)

    def _student_loss(self, batch: StudentBatch) -> Lesson:
        """The student's loss on a batch, and what to remember of it.

        No graph leads to generator or teacher.
        """
        settings, mixes = self.recipe.student, self.recipe.augmentation.mixup > 0
        with self.policy.autocast():
            with torch.no_grad():
                fresh = self._draw_fresh(batch)
                images = torch.cat([fresh, batch.replayed]) if len(batch.replayed) else fresh
                if mixes:
                    images = augmentation.mixup(images, batch.mixup)
                images = images.contiguous(memory_format=self.policy.memory_format)
                teacher_logits = self._ask_teacher(images, batch.answers)
                answers = teacher_logits[: len(fresh)]
                if mixes and self.players.ring.keeps_answers and len(fresh):
                    answers = self.teacher(fresh.contiguous(memory_format=self.policy.memory_format))
            student_logits = self.players.student.module(images)
        loss = settings.l1 * discrepancy.l1(student_logits, teacher_logits)
        if settings.scaled_l1 > 0:
            loss = loss + settings.scaled_l1 * discrepancy.scaled_l1(student_logits, teacher_logits)
        if settings.kl > 0:
            loss = loss + settings.kl * discrepancy.kl(student_logits, teacher_logits, temperature=settings.temperature)
        hints = None if self.hints is None else self.hints.take()
        if hints is not None:
            loss = loss + settings.hints * hints
        return Lesson(loss, fresh, answers, images, teacher_logits)

    def _draw_fresh(self, batch: StudentBatch) -> Tensor:
        """Images that nobody was shown, (F + P, C, H, W); a generator's batch norm takes no empty batch."""
        if not len(batch.latents):
            return batch.procedural
        drawn: Tensor = self.players.generator.module(batch.latents)
        return torch.cat([drawn, batch.procedural.to(drawn.dtype)]) if len(batch.procedural) else drawn

    def _ask_teacher(self, images: Tensor, known: Tensor) -> Tensor:
        """Logits to images (N, C, H, W), of which those of the last ones may be ``known``."""
        asked = images[: len(images) - len(known)]
        if not len(asked):
            return known
        logits = self.teacher(asked) if self.hints is None else self.hints.watch(self.teacher, asked)
        return torch.cat([logits.float(), known]) if len(known) else logits

    # ----------------------------------------------------------------------------------------- generator's side

    def begin_turn(self) -> None:
        """Before the generator's updates of a step."""
        self.players.generator.renew_latents_()

    @torch.no_grad()
    def end_turn(self) -> None:
        """After them: what they leave behind. Where the student lives from the ring alone, that is a batch for it."""
        players, ring_alone = self.players, self.recipe.replay.share == 1
        self.priors.end_turn()
        if ring_alone:
            players.generator.module.train()
            with self.policy.autocast():
                images = players.generator.module(players.draw_latents(self.recipe.batch_size))
                images = images.contiguous(memory_format=self.policy.memory_format)
                answers = self.teacher(images) if players.ring.keeps_answers else None
            players.remember(images, answers, offer=len(images))

    def draw_generator_batch(self) -> GeneratorBatch:
        """Latents, their classes where the recipe gives any, and the weight of the adversarial term."""
        recipe, latents = self.recipe, self.players.generator.latents
        has_begun = self.players.step >= recipe.generator.adversarial_start * recipe.steps
        weight = self.adversarial if has_begun else 0.0
        return GeneratorBatch(
            latents=None if latents.move else self.players.draw_latents(recipe.batch_size),
            targets=latents.targets,
            adversarial=torch.tensor(weight, device=self.policy.device),
        )

    def _generator_loss(self, batch: GeneratorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss, and its terms by name, detached and unweighted."""
        loss, terms = torch.zeros((), device=batch.adversarial.device), {}
        latents = batch.latents
        if latents is None:
            latents = self.players.draw_latents(self.recipe.batch_size)[batch.rows]
        with self.policy.autocast():
            images = self.players.generator.module(latents)
            images = images.contiguous(memory_format=self.policy.memory_format)
            teacher_logits = self.priors.watch(images)
        if self.adversarial > 0:
            with self.policy.autocast():
                student_logits = self.players.student.module(images)
            terms["discrepancy"] = self.discrepancy(student_logits, teacher_logits)
            # The one place where the sign flips: the generator is paid for disagreement.
            loss = loss - batch.adversarial * terms["discrepancy"]
        for name, term in self.priors.compute(teacher_logits, batch.targets).items():
            terms[name] = term
            loss = loss + self.priors.weight(name) * term
        return loss, {name: term.detach() for name, term in terms.items()}
