"""Real games in miniature for the tests beside: the engine as it is, networks and images as small as they go."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.distillation.compute.policy import choose_policy
from dfadc.distillation.generator.networks import build_generator
from dfadc.distillation.objectives import Game
from dfadc.distillation.state import Players
from dfadc.networks.adaptation import place
from dfadc.networks.norm_layers import is_batch_norm_with_statistics
from dfadc.recipe.load import load_recipe
from dfadc.recipe.resolve import fit_recipe

SMALL_CONTRACT = ImageContract(input_size=(1, 8, 8), num_classes=10, mean=(0.3,), std=(0.4,))
#: Laid over every recipe: a step takes milliseconds, and the arithmetic is the same on every machine.
MINIATURE = (
    "steps=8",
    "batch_size=8",
    "generator.latent_dim=8",
    "replay.capacity=32",
    "replay.reservoir=16",
    "compute.precision=fp32",
    "compute.compile=off",
)


class SmallNetwork(nn.Module):
    """Convolution, batch norm and a linear layer: what a teacher or student has, a hundred times over."""

    def __init__(self, contract: ImageContract = SMALL_CONTRACT, *, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(contract.channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(2 * width, contract.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        logits: Tensor = self.classifier(self.dropout(self.features(images).mean(dim=(2, 3))))
        return logits


def build_game(
    recipe: str = "auto",
    *overrides: str,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    contract: ImageContract = SMALL_CONTRACT,
) -> Game:
    """A game that has not started, always the same: ``build_game("auto", "student.steps=2", student=network)``."""
    torch.manual_seed(0)
    teacher = make_teacher(contract) if teacher is None else teacher
    batch_norms = [layer for layer in teacher.modules() if is_batch_norm_with_statistics(layer)]
    few = ["replay.echoes=2"] if load_recipe(recipe).replay.echoes else []
    settings, _ = fit_recipe(load_recipe(recipe, [*MINIATURE, *few, *overrides]), contract, len(batch_norms))
    policy = choose_policy(settings.compute, torch.device("cpu"))
    student = SmallNetwork(contract) if student is None else student
    generator = build_generator(settings.generator, contract)
    logit_size = contract.input_size[1:] if contract.task == "segmentation" else ()
    players = Players(student, generator, recipe=settings, contract=contract, policy=policy, logit_size=logit_size)
    teacher = place(teacher, policy.device, policy.memory_format)
    return Game(teacher, batch_norms, players=players, recipe=settings, contract=contract, policy=policy)


def make_teacher(contract: ImageContract) -> nn.Module:
    """A frozen network whose batch norms have seen some images."""
    teacher = SmallNetwork(contract, width=6)
    with torch.no_grad():
        for _ in range(20):
            teacher(torch.randn(32, *contract.input_size))
        teacher.classifier.weight *= 5
    return teacher.eval().requires_grad_(requires_grad=False)
