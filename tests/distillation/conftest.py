"""Real games in miniature: the engine as it is, networks and images as small as they go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.distillation.fit import fit_recipe
from dfadc.distillation.game import Game
from dfadc.distillation.generator import build_generator
from dfadc.distillation.players import Players
from dfadc.distillation.precision import choose_policy
from dfadc.models.norm_layers import is_batch_norm_with_statistics
from dfadc.recipe import load_recipe

GameBuilder = Callable[..., Game]
StateDict = dict[str, Any]

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


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """More threads than one only slow networks of this size down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_contract() -> ImageContract:
    """One channel, 8 x 8 pixels, ten classes, known mean and std."""
    return SMALL_CONTRACT


@pytest.fixture(scope="session")
def build_network() -> type[SmallNetwork]:
    """``build_network(contract, width=4, dropout=0)`` -> a network with two batch norms."""
    return SmallNetwork


@pytest.fixture(scope="session")
def build_game() -> GameBuilder:
    """``build_game("auto", "student.steps=2", student=network)`` -> a game that has not started, always the same."""

    def build(
        recipe: str = "auto",
        *overrides: str,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        contract: ImageContract = SMALL_CONTRACT,
    ) -> Game:
        torch.manual_seed(0)
        teacher = make_teacher(contract) if teacher is None else teacher
        batch_norms = [layer for layer in teacher.modules() if is_batch_norm_with_statistics(layer)]
        settings, _ = fit_recipe(load_recipe(recipe, [*MINIATURE, *overrides]), contract, len(batch_norms))
        policy = choose_policy(settings.compute, torch.device("cpu"))
        student = SmallNetwork(contract) if student is None else student
        generator = build_generator(settings.generator, contract)
        players = Players(student, generator, recipe=settings, contract=contract, policy=policy)
        teacher.to(memory_format=policy.memory_format)  # type: ignore[call-overload]
        return Game(teacher, batch_norms, players=players, recipe=settings, contract=contract, policy=policy)

    return build


@pytest.fixture(scope="session")
def assert_same_state() -> Callable[[Any, Any], None]:
    """Compares two states bit by bit, whatever they nest; names the first value that differs."""
    return compare_states


def make_teacher(contract: ImageContract) -> nn.Module:
    """A frozen network whose batch norms have seen some images."""
    teacher = SmallNetwork(contract, width=6)
    with torch.no_grad():
        for _ in range(20):
            teacher(torch.randn(32, *contract.input_size))
        teacher.classifier.weight *= 5
    return teacher.eval().requires_grad_(requires_grad=False)


def compare_states(one: Any, other: Any, path: str = "") -> None:
    """Raises AssertionError where two nested states differ in type, shape or any bit."""
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one.nan_to_num(nan=12345.0), other.nan_to_num(nan=12345.0)), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            compare_states(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            compare_states(*pair, f"{path}[{index}]")
    else:
        assert one == other, path
