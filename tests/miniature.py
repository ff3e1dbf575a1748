"""Real distillations in miniature for the tests: the engine as it is, networks and images as small as they go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dfadc.contract import ImageContract
from dfadc.distillation.compute.policy import choose_policy, images_at_once
from dfadc.distillation.distillation import Distillation
from dfadc.distillation.generator.networks import build_generator
from dfadc.distillation.state import TrainingState
from dfadc.networks.adaptation import random_images
from dfadc.networks.flops import count_parameters
from dfadc.networks.network_file import save_network
from dfadc.networks.zoo.compact_resnet import CompactResNet
from dfadc.recipe.load import load_recipe
from dfadc.recipe.resolve import StudentFacts, resolve_recipe
from dfadc.student.inherit import corresponding_layers, find_copy
from dfadc.teacher.file_kind import FileKind
from dfadc.teacher.load import Teacher

if TYPE_CHECKING:
    from dfadc.recipe.schema import Recipe

SMALL_CONTRACT = ImageContract(input_size=(1, 8, 8), num_classes=10, mean=(0.3,), std=(0.4,))
#: Laid over every recipe: a step takes milliseconds, and the arithmetic is the same on every machine.
MINIATURE = (
    "steps=8",
    "batch_size=8",
    "generator.latent_dim=8",
    "replay.capacity=32",
    "compute.precision=fp32",
    "compute.compile=off",
)
#: Images that the miniature's reservoir holds.
RESERVOIR = 16


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


def build_run(
    recipe: str = "auto",
    *overrides: str,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    generator: nn.Module | None = None,
    contract: ImageContract = SMALL_CONTRACT,
    channels_last: bool = True,
    adversarial: float = 1.0,
    device: str = "cpu",
) -> Distillation:
    """A distillation that has not started, always the same: ``build_run("auto", "student.steps=2", student=network)``.

    Its context is open: hooks are on both networks.
    """
    torch.manual_seed(0)
    loaded = as_teacher(make_teacher(contract) if teacher is None else teacher, contract)
    student = SmallNetwork(contract) if student is None else student
    few = ["replay.repeats=2"] if load_recipe(recipe).replay.repeats else []
    # As one that begins with a file's weights, whose composition auto leaves as it is.
    asked = load_recipe(recipe, [*MINIATURE, *few, "student.weights=student.pt", *overrides])
    copy = find_copy(student, loaded.module, random_images(contract))
    part = None if isinstance(copy, str) else copy
    num_hints = len(corresponding_layers(student, loaded.module, part))
    facts = StudentFacts("student", is_inherited=False, has_batch_norm=True, num_hints=num_hints)
    settings = resolve(asked, contract, len(loaded.batch_norms), facts)
    policy = replace(choose_policy(settings.compute, torch.device(device)), channels_last=channels_last)
    generator = build_generator(settings.generator, contract) if generator is None else generator
    state = TrainingState(
        student,
        generator,
        recipe=settings,
        contract=contract,
        policy=policy,
        logit_size=contract.input_size[1:] if contract.task == "segmentation" else (),
        reservoir_size=RESERVOIR,
    )
    loaded = loaded.placed(policy.placement(images_at_once(settings, contract)))
    hints = corresponding_layers(student, loaded.module, part)
    run = Distillation(
        loaded, loaded.batch_norms, state, recipe=settings, policy=policy, adversarial=adversarial, hints=hints
    )
    return run.__enter__()


def resolve(
    recipe: Recipe,
    contract: ImageContract,
    num_batch_norms: int,
    student: StudentFacts | None = None,
) -> Recipe:
    """The recipe for a teacher of so many batch norms, without its notes."""
    student = student or StudentFacts("student", is_inherited=False, has_batch_norm=True, num_hints=2)
    return resolve_recipe(recipe, contract, num_batch_norms=num_batch_norms, student=student)[0]


def make_teacher(contract: ImageContract) -> nn.Module:
    """A frozen network whose batch norms have seen some images."""
    teacher = SmallNetwork(contract, width=6)
    with torch.no_grad():
        for _ in range(20):
            teacher(torch.randn(32, *contract.input_size))
        teacher.classifier.weight *= 5
    return teacher.eval().requires_grad_(requires_grad=False)


def as_teacher(module: nn.Module, contract: ImageContract = SMALL_CONTRACT) -> Teacher:
    """A network that no file holds, as a loaded teacher."""
    return Teacher(
        module=module,
        architecture="teacher",
        contract=contract,
        contract_sources={},
        sha256="0" * 64,
        kind=FileKind.SAFETENSORS,
        norm_layers=(),
        num_parameters=count_parameters(module),
        path=Path("teacher.safetensors"),
    )


def save_untrained_teacher(folder: Path, contract: ImageContract) -> Path:
    """A teacher whose batch norms have seen images; training it would add nothing to what these tests show."""
    torch.manual_seed(0)
    network = CompactResNet(contract, width=8)
    with torch.no_grad():
        for _ in range(10):
            network(torch.randn(32, *contract.input_size))
    path = folder / "teacher.safetensors"
    save_network(path, network, architecture="compact_resnet_8", stem="default", contract=contract)
    return path
