"""The generator's terms that are read off the teacher, as a recipe composes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfadc.distillation.losses import priors
from dfadc.distillation.losses.activation import Activation, find_classifier
from dfadc.distillation.losses.batch_norm import BatchNormMatching
from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from dfadc.contract import ImageContract
    from dfadc.distillation.state import Players
    from dfadc.recipe.schema import PriorSettings


class Terms:
    """Priors of a weight above 0. Those that look inside the teacher hang hooks on it until :meth:`close`.

    Args:
        teacher: (N, C, H, W) -> logits.
        batch_norms: its batch-norm layers with running statistics.
        settings: the weights.
        contract: what the logits are.
        players: carry what the terms remember.

    Raises:
        DfadcError: the teacher has no layer to read the activation at.
    """

    def __init__(
        self,
        teacher: nn.Module,
        batch_norms: list[nn.Module],
        *,
        settings: PriorSettings,
        contract: ImageContract,
        players: Players,
    ) -> None:
        self.teacher = teacher
        self.settings = settings
        self.matching: BatchNormMatching | None = None
        self.activation: Activation | None = None
        self.running: priors.RunningBalance | None = None
        if settings.batch_norm > 0:
            self.matching = BatchNormMatching(batch_norms, settings.batch_norm_momentum)
            players.carry("batch_norm", self.matching)
        if settings.activation > 0:
            self.activation = Activation(_classifier(teacher, contract.num_classes))
        if settings.balance > 0 and settings.balance_momentum > 0:
            self.running = priors.RunningBalance(contract.num_classes, settings.balance_momentum, players.device)
            players.carry("balance", self.running)

    def weight(self, name: str) -> float:
        """The weight of a term."""
        weight: float = getattr(self.settings, name)
        return weight

    def watch(self, images: Tensor) -> Tensor:
        """The teacher's logits to images (N, C, H, W), and a look inside where a term needs one."""
        watchers = [watcher for watcher in (self.matching, self.activation) if watcher is not None]
        for watcher in watchers:
            watcher.watching = True
        logits: Tensor = self.teacher(images)
        for watcher in watchers:
            watcher.watching = False
        return logits

    def compute(self, images: Tensor, teacher_logits: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """The terms by name, unweighted scalars, of images that the teacher was just watched on.

        Args:
            images: (N, C, H, W).
            teacher_logits: (N, K) or (N, K, H, W).
            targets: (N,) classes, or None for the teacher's own.
        """
        settings, terms = self.settings, {}
        if self.matching is not None:
            terms["batch_norm"] = self.matching.take()
        if settings.one_hot > 0:
            terms["one_hot"] = priors.one_hot(teacher_logits, targets)
        if settings.balance > 0:
            terms["balance"] = (self.running or priors.class_balance)(teacher_logits)
        if self.activation is not None:
            terms["activation"] = self.activation.take()
        if settings.total_variation > 0:
            terms["total_variation"] = priors.total_variation(images)
        if settings.l2 > 0:
            terms["l2"] = priors.l2(images)
        return terms

    def end_turn(self) -> None:
        """After the generator's updates of a step."""
        for memory in (self.matching, self.running):
            if memory is not None:
                memory.end_turn()

    def forward_state(self) -> Iterator[Tensor]:
        """Tensors that watching the teacher writes to."""
        if self.matching is not None:
            yield from (*self.matching.latest, self.matching.is_watched)
        if self.running is not None:
            yield self.running.latest

    def close(self) -> None:
        """Takes all hooks off the teacher."""
        for watcher in (self.matching, self.activation):
            if watcher is not None:
                watcher.close()


def _classifier(teacher: nn.Module, num_classes: int) -> nn.Module:
    found = find_classifier(teacher, num_classes)
    if found is None:
        raise DfadcError(
            f"prior.activation reads what the teacher's last layer reads, and none of its layers has {num_classes} "
            "outputs (exported and scripted teachers show no such layer)",
            "--set prior.activation=0",
        )
    return found
