"""Trains the teacher of an experiment on real images: the one script for all of them.

    python examples/paper/train_paper_teacher.py cifar10 --out runs/paper/cifar10/teacher.safetensors

The weights of the last step are saved: no test image chooses anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import typer
from experiments import DATASETS, TeacherTraining, find_experiment
from labelled_images import NO_CLASS, Split, read_split
from torch import Tensor, nn
from torch.nn import functional

from dfadc.cli.script import run_as_script
from dfadc.distillation.compute.policy import ComputePolicy, choose_device, choose_policy
from dfadc.networks.logits import answering_pixels
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import save_network
from dfadc.recipe.schema import ComputeSettings

if TYPE_CHECKING:
    from dfadc.contract import ImageContract
    from dfadc.networks.stems import Stem


def main(
    experiment: Annotated[str, typer.Argument(help="Name in experiments.py.")],
    *,
    out: Annotated[Path, typer.Option(help="The dfadc teacher file to write.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data set; else torchvision downloads it.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the experiment's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Instead of the experiment's.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 where native.")] = "auto",
) -> None:
    """Trains a teacher and writes it as a dfadc teacher file."""
    chosen = find_experiment(experiment)
    dataset = DATASETS[chosen.dataset]
    training = dataset.training
    train, test = (read_split(dataset, split, data) for split in ("train", "test"))
    torch.manual_seed(seed)
    stem: Stem = "default"
    teacher = build_architecture(chosen.teacher, dataset.contract, stem=stem)
    policy = choose_policy(ComputeSettings(precision=precision), choose_device(device))
    module = answering_pixels(teacher.module, dataset.contract).to(policy.device)
    size = min(batch_size or training.batch_size, len(train.labels))
    epochs = epochs or training.epochs
    fit(module, train, dataset.contract, training=training, policy=policy, epochs=epochs, batch_size=size)
    measure, value = measure_quality(module, test, dataset.contract, policy)
    described = (
        f"{epochs} epochs, batch {size}, seed {seed}, {policy.precision} on {policy.device}: {measure} {value:.2%}"
    )
    save_network(
        out,
        teacher.module.cpu().to(memory_format=torch.contiguous_format),
        architecture=teacher.name,
        stem=teacher.stem,
        contract=dataset.contract,
        extra={"dfadc.training": described},
    )
    print(f"{described} of {len(test.labels):,} test images; wrote {out}")


def fit(
    module: nn.Module,
    train: Split,
    contract: ImageContract,
    *,
    training: TeacherTraining,
    policy: ComputePolicy,
    epochs: int,
    batch_size: int,
) -> None:
    """Trains ``module`` in place."""
    module.train()
    steps_per_epoch = len(train.labels) // batch_size
    optimizer = torch.optim.SGD(
        module.parameters(), lr=training.learning_rate, momentum=0.9, weight_decay=training.weight_decay
    )
    milestones = [max(1, round(share * epochs * steps_per_epoch)) for share in training.milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    for epoch in range(1, epochs + 1):
        total_loss = torch.zeros((), device=policy.device)
        # The last images of an epoch that do not fill a batch wait for another: batch norm takes no single image.
        for rows in torch.randperm(len(train.labels)).split(batch_size)[:steps_per_epoch]:
            images, labels = augment(train.images[rows], train.labels[rows], training)
            with policy.autocast():
                logits = module(normalise(images.to(policy.device), contract))
            loss = functional.cross_entropy(logits.float(), labels.to(policy.device), ignore_index=NO_CLASS)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()
        print(f"epoch {epoch}/{epochs}: loss {total_loss.item() / steps_per_epoch:.4f}", flush=True)


def augment(images: Tensor, labels: Tensor, training: TeacherTraining) -> tuple[Tensor, Tensor]:
    """Moves and mirrors images (N, C, H, W), each by its own draw, and masks (N, H, W) with them."""
    num, (height, width), shift = len(images), images.shape[2:], training.shift
    rows = torch.randint(2 * shift + 1, (num, 1)) + torch.arange(height)
    columns = torch.randint(2 * shift + 1, (num, 1)) + torch.arange(width)
    if training.flip:
        mirrored = torch.rand(num, 1) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    which = torch.arange(num)[:, None, None]
    padded = functional.pad(images, (shift,) * 4)
    # Indices around a slice put that axis last: (N, H, W, C).
    moved = padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if labels.dim() == 1:
        return moved, labels
    masks = functional.pad(labels, (shift,) * 4, value=NO_CLASS)
    return moved, masks[which, rows[:, :, None], columns[:, None, :]]


def normalise(images: Tensor, contract: ImageContract) -> Tensor:
    """(N, C, H, W) uint8 -> float32 as the contract says."""
    mean, std = (
        torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (contract.mean, contract.std)
    )
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def measure_quality(
    module: nn.Module, test: Split, contract: ImageContract, policy: ComputePolicy
) -> tuple[str, float]:
    """Accuracy, or mean intersection over union of the classes that occur, in fp32."""
    module.eval()
    num_classes = contract.num_classes
    counts = torch.zeros(num_classes * num_classes, dtype=torch.long)
    for images, labels in zip(test.images.split(64), test.labels.split(64), strict=True):
        predicted = module(normalise(images.to(policy.device), contract)).argmax(1).cpu()
        is_class = labels != NO_CLASS
        pairs = labels[is_class] * num_classes + predicted[is_class]
        counts += torch.bincount(pairs, minlength=len(counts))
    confusion = counts.view(num_classes, num_classes).double()
    if contract.task == "classification":
        return "accuracy", float(confusion.diagonal().sum() / confusion.sum())
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return "mean IoU", float((confusion.diagonal() / union)[union > 0].mean())


if __name__ == "__main__":
    run_as_script(main)
