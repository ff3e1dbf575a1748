"""The generator's priors: terms of its loss that are read off the teacher, as a recipe weighs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfadc.distillation.losses import priors
from dfadc.distillation.losses.batch_norm import BatchNormMatching

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from dfadc.distillation.state import Players
    from dfadc.recipe.schema import PriorSettings


class Terms:
    """Priors of a weight above 0. Matching of batch-norm statistics hangs hooks on the teacher until :meth:`close`.

    Args:
        teacher: (N, C, H, W) -> logits.
        batch_norms: its batch-norm layers with running statistics.
        settings: the weights.
        players: carry what the terms remember.
    """

    def __init__(
        self, teacher: nn.Module, batch_norms: list[nn.Module], *, settings: PriorSettings, players: Players
    ) -> None:
        self.teacher = teacher
        self.settings = settings
        self.matching: BatchNormMatching | None = None
        if settings.batch_norm > 0:
            self.matching = BatchNormMatching(batch_norms, settings.batch_norm_momentum)
            players.carry("batch_norm", self.matching)

    def weight(self, name: str) -> float:
        """The weight of a term."""
        weight: float = getattr(self.settings, name)
        return weight

    def watch(self, images: Tensor) -> Tensor:
        """The teacher's logits to images (N, C, H, W), and a look inside where a term needs one."""
        if self.matching is None:
            logits: Tensor = self.teacher(images)
            return logits
        self.matching.watching = True
        logits = self.teacher(images)
        self.matching.watching = False
        return logits

    def compute(self, teacher_logits: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """The terms by name, unweighted scalars, of images that the teacher was just watched on.

        Args:
            teacher_logits: (N, K) or (N, K, H, W).
            targets: (N,) classes, or None for the teacher's own.
        """
        settings, terms = self.settings, {}
        if self.matching is not None:
            terms["batch_norm"] = self.matching.take()
        if settings.one_hot > 0:
            terms["one_hot"] = priors.one_hot(teacher_logits, targets)
        if settings.balance > 0:
            terms["balance"] = priors.class_balance(teacher_logits)
        return terms

    def end_turn(self) -> None:
        """After the generator's updates of a step."""
        if self.matching is not None:
            self.matching.end_turn()

    def forward_state(self) -> Iterator[Tensor]:
        """Tensors that watching the teacher writes to."""
        if self.matching is not None:
            yield from (*self.matching.latest, self.matching.is_watched)

    def close(self) -> None:
        """Takes all hooks off the teacher."""
        if self.matching is not None:
            self.matching.close()
