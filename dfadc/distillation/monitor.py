"""Is the game healthy? A probe on fixed latents, and the way back after gradients that are not finite."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dfadc.errors import TrainingDiverged

if TYPE_CHECKING:
    from dfadc.distillation.game import Game
    from dfadc.distillation.players import Player

#: Images of the probe; fixed, so that its readings are comparable over the run.
PROBE_SIZE = 256
#: Skipped updates in a row after which a player is taken back to its last healthy state at half the rate.
MAX_SKIPPED = 3
#: Times a run is taken back before it is given up.
MAX_ROLLBACKS = 3


@dataclass(frozen=True)
class ProbeReading:
    """How the players do on fixed latents.

    Args:
        class_entropy: entropy of the teacher's predicted classes over log K, in [0, 1]; near 0 is a collapse.
        agreement: share of images on which student and teacher predict the same class, in [0, 1].
    """

    class_entropy: float
    agreement: float


class Monitor:
    """Looks at a game at the log interval; between looks nothing waits for the device.

    Args:
        game: the game, not yet started or just resumed.
    """

    def __init__(self, game: Game) -> None:
        self.game = game
        rng = torch.Generator().manual_seed(game.recipe.seed + 3)
        self.latents = torch.randn(PROBE_SIZE, game.recipe.generator.latent_dim, generator=rng).to(game.policy.device)
        self.rollbacks = 0
        self._healthy = self._copy_players()

    @torch.no_grad()
    def probe(self) -> ProbeReading:
        """Draws the probe's images from the averaged generator and asks averaged student and teacher; moves nothing."""
        players = self.game.players
        student, generator = players.student.average, players.generator.average
        student.eval()
        generator.eval()
        with self.game.policy.autocast():
            images = generator(self.latents).contiguous(memory_format=self.game.policy.memory_format)
            teacher_classes = self.game.teacher(images).argmax(dim=1)
            student_classes = student(images).argmax(dim=1)
        num_classes = self.game.contract.num_classes
        shares = torch.bincount(teacher_classes.flatten(), minlength=num_classes) / teacher_classes.numel()
        return ProbeReading(
            class_entropy=float(-torch.xlogy(shares, shares).sum()) / math.log(num_classes),
            agreement=float((teacher_classes == student_classes).float().mean()),
        )

    def check_finite(self) -> str | None:
        """Takes both players back where one is stuck; says so.

        Updates with a gradient that is not finite moved no weight, but the batch-norm statistics have seen their
        images; and a huge but finite gradient may have moved the weights too far to come back.

        Raises:
            TrainingDiverged: the run has been taken back too often.
        """
        players = self.game.players
        both = {"student": players.student, "generator": players.generator}
        stuck = [name for name, player in both.items() if _is_stuck(player)]
        if not stuck:
            if all(float(player.skipped) == 0 for player in both.values()):
                self._healthy = self._copy_players()
            return None
        self.rollbacks += 1
        if self.rollbacks > MAX_ROLLBACKS:
            raise TrainingDiverged(
                f"training diverged at step {players.step}: the {stuck[0]} left the finite numbers again",
                f"try half the learning rate (--set {stuck[0]}.optimizer.learning_rate=...), "
                f"--set {stuck[0]}.optimizer.clip_norm=1 or --precision fp32",
            )
        for name, player in both.items():
            self._take_back(player, self._healthy[name])
        return f"the {stuck[0]} left the finite numbers: both players taken back, learning rates halved"

    def _copy_players(self) -> dict[str, dict[str, Any]]:
        players = self.game.players
        return copy.deepcopy({"student": players.student.state_dict(), "generator": players.generator.state_dict()})

    def _take_back(self, player: Player, state: dict[str, Any]) -> None:
        scale = player.rate_scale
        player.load_state_dict(copy.deepcopy(state))
        player.rate_scale = scale / 2


def _is_stuck(player: Player) -> bool:
    """Too many updates skipped in a row, or weights or statistics that are not finite (or too large to add up)."""
    values = [tensor for tensor in (*player.parameters, *player.module.buffers()) if tensor.is_floating_point()]
    return float(player.skipped) >= MAX_SKIPPED or not bool(torch.nn.utils.get_total_norm(values).isfinite())
