"""What the players are paid: one forward-and-loss function for each, composed from a recipe, compiled or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dfadc.distillation import augmentation, discrepancy, priors

if TYPE_CHECKING:
    from collections.abc import Callable

    from dfadc.contract import ImageContract
    from dfadc.distillation.players import Players
    from dfadc.distillation.precision import ComputePolicy
    from dfadc.recipe import Recipe


class StudentBatch(NamedTuple):
    """What a student update is drawn from, all of it random and none of it traced by a compiler.

    Args:
        latents: (F, Z), for F fresh images.
        replayed: (N - F, C, H, W), images of earlier steps, already augmented; N - F may be 0.
        mixup: scalar, the weight of each image itself in the mixture; 1: not mixed.
    """

    latents: Tensor
    replayed: Tensor
    mixup: Tensor


class Game:
    """Teacher, players and the rules that a recipe sets.

    Args:
        teacher: frozen network in eval mode on the policy's device, (N, C, H, W) -> logits.
        batch_norms: the teacher's batch-norm layers with running statistics.
        players: who plays.
        recipe: the rules.
        contract: what an image is.
        policy: how tensors are computed.
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
    ) -> None:
        self.teacher = teacher
        self.players = players
        self.recipe = recipe
        self.contract = contract
        self.policy = policy
        self.discrepancy = discrepancy.DISCREPANCIES[recipe.generator.discrepancy]
        self.matching = priors.BatchNormMatching(batch_norms) if recipe.prior.batch_norm > 0 else None
        self.student_loss: Callable[[StudentBatch], tuple[Tensor, Tensor]] = self._student_loss
        self.generator_loss: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]] = self._generator_loss

    def compile(self, backend: str = "inductor") -> None:
        """Compiles both forward-and-loss functions, each as one graph for each shape.

        With replay the student's very first batch, all fresh, has a shape of its own; ``dynamic=False`` keeps the
        graph of all others static. ``backward`` and ``optimizer.step`` stay outside: they break a full graph
        (torch 2.14).
        """
        self.student_loss = torch.compile(self._student_loss, fullgraph=True, dynamic=False, backend=backend)
        self.generator_loss = torch.compile(self._generator_loss, fullgraph=True, dynamic=False, backend=backend)

    def uncompile(self) -> None:
        """Goes back to the eager functions."""
        self.student_loss, self.generator_loss = self._student_loss, self._generator_loss

    def close(self) -> None:
        """Leaves the teacher as it was found."""
        if self.matching is not None:
            self.matching.close()

    def draw_student_batch(self) -> StudentBatch:
        """Fresh latents, replayed images and a mixup weight; all fresh while the ring is empty."""
        players, recipe = self.players, self.recipe
        num_replayed = 0
        if len(players.ring):
            num_replayed = min(round(recipe.batch_size * recipe.replay.share), recipe.batch_size - 1)
        replayed = torch.empty((0, *self.contract.input_size), device=self.policy.device)
        if num_replayed:
            replayed = players.ring.draw(num_replayed, players.rng)
            replayed = augmentation.shift(replayed, recipe.augmentation.shift, players.rng)
            if recipe.augmentation.flip:
                replayed = augmentation.flip(replayed, players.rng)
        weight = augmentation.draw_mixup(recipe.augmentation.mixup, players.rng)
        return StudentBatch(
            latents=players.draw_latents(recipe.batch_size - num_replayed),
            replayed=replayed,
            mixup=torch.tensor(weight, device=self.policy.device),
        )

    def _student_loss(self, batch: StudentBatch) -> tuple[Tensor, Tensor]:
        """The student's loss on a batch, and the fresh images of it. No graph leads to generator or teacher."""
        settings = self.recipe.student
        with self.policy.autocast():
            with torch.no_grad():
                fresh = self.players.generator.module(batch.latents)
                images = torch.cat([fresh, batch.replayed])
                if self.recipe.augmentation.mixup > 0:
                    images = augmentation.mixup(images, batch.mixup)
                images = images.contiguous(memory_format=self.policy.memory_format)
                teacher_logits = self.teacher(images)
            student_logits = self.players.student.module(images)
        loss = settings.l1 * discrepancy.l1(student_logits, teacher_logits)
        if settings.kl > 0:
            loss = loss + settings.kl * discrepancy.kl(student_logits, teacher_logits, temperature=settings.temperature)
        return loss, fresh

    def _generator_loss(self, latents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss on latents (N, Z), and its terms by name, detached and unweighted."""
        weights = self.recipe.prior
        with self.policy.autocast():
            images = self.players.generator.module(latents)
            images = images.contiguous(memory_format=self.policy.memory_format)
            if self.matching is not None:
                self.matching.watching = True
            teacher_logits = self.teacher(images)
            if self.matching is not None:
                self.matching.watching = False
            student_logits = self.players.student.module(images)
        terms = {"discrepancy": self.discrepancy(student_logits, teacher_logits)}
        # The one place where the sign flips: the generator is paid for disagreement.
        loss = -self.recipe.generator.adversarial * terms["discrepancy"]
        if self.matching is not None:
            terms["batch_norm"] = self.matching.take()
            loss = loss + weights.batch_norm * terms["batch_norm"]
        for name, weight, prior in (
            ("one_hot", weights.one_hot, priors.one_hot),
            ("balance", weights.balance, priors.class_balance),
        ):
            if weight > 0:
                terms[name] = prior(teacher_logits)
                loss = loss + weight * terms[name]
        if weights.total_variation > 0:
            terms["total_variation"] = priors.total_variation(images)
            loss = loss + weights.total_variation * terms["total_variation"]
        return loss, {name: term.detach() for name, term in terms.items()}
