"""Trains the segmentation teacher of this example; the one place in it that sees training data.

    python examples/segmentation/train_segmenter.py

composes scenes of Fashion-MNIST's training images as it goes, trains, prints the mean IoU on scenes of the test images
and writes a dfadc teacher file. The weights of the last step are saved: no test image chooses anything.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from scenes import CONTRACT, FOLDER, Scenes, compose_scenes, read_garments
from torch.nn import functional

from dfadc.cli.script import run_as_script
from dfadc.distillation.compute.policy import choose_policy
from dfadc.networks.flops import count_flops, count_parameters
from dfadc.networks.logits import answering_pixels
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import save_network
from dfadc.recipe.schema import ComputeSettings

if TYPE_CHECKING:
    from scenes import Garments
    from torch import Tensor, nn

    from dfadc.distillation.compute.policy import ComputePolicy

TEACHER_FILE = Path(__file__).with_name("teacher.safetensors")
PEAK_LEARNING_RATE = 0.1
WEIGHT_DECAY = 5e-4
WARM_UP_SHARE = 0.2
NUM_TEST_SCENES = 1000


def main(
    *,
    data: Annotated[Path, typer.Option(help="Folder of the four idx files, .gz or not.")] = FOLDER,
    architecture: Annotated[str, typer.Option(help="Any segmentation network that dfadc knows.")] = "compact_unet_24",
    steps: Annotated[int, typer.Option(min=1)] = 2400,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    test_scenes: Annotated[int, typer.Option(min=1)] = NUM_TEST_SCENES,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(help="The dfadc teacher file to write.")] = TEACHER_FILE,
) -> None:
    """Trains a segmentation teacher on composed scenes and writes it as a dfadc teacher file."""
    train, test = read_garments(data, "train"), read_garments(data, "test")
    torch.manual_seed(seed)
    teacher = build_architecture(architecture, CONTRACT)
    network = answering_pixels(teacher.module, CONTRACT)
    parameters, flops = count_parameters(network), count_flops(network, CONTRACT.input_size)
    policy = choose_policy(ComputeSettings(), torch.device("cpu"))
    print(f"{teacher.name}: {parameters:,} parameters, {flops:,} FLOPs an image, {policy.precision}", flush=True)
    fit(network, train, policy, steps=steps, batch_size=batch_size, seed=seed)
    accuracy, iou = measure(network, compose_scenes(test, test_scenes, seed=seed))
    for name, value in zip(CONTRACT.class_names or (), iou, strict=True):
        print(f"  IoU {value:.1%} {name}")
    found = f"pixel accuracy {accuracy:.2%}, mean IoU {np.nanmean(iou):.2%} on {test_scenes:,} scenes of test images"
    save_network(
        out,
        teacher.module.to(memory_format=torch.contiguous_format),
        architecture=teacher.name,
        stem=teacher.stem,
        contract=CONTRACT,
        extra={"dfadc.training": f"{steps} steps of {batch_size} scenes, seed {seed}: {found}"},
    )
    print(f"{found}; wrote {out}")


def fit(
    network: nn.Module, garments: Garments, policy: ComputePolicy, *, steps: int, batch_size: int, seed: int
) -> None:
    """Trains ``network`` in place on scenes that it sees once: SGD with Nesterov momentum, one-cycle learning rate."""
    network.train().to(memory_format=policy.memory_format)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=PEAK_LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=steps, pct_start=WARM_UP_SHARE, cycle_momentum=False
    )
    start, total_loss = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        images, masks = as_tensors(compose_scenes(garments, batch_size, seed=seed * steps + step))
        with policy.autocast():
            logits = network(images.contiguous(memory_format=policy.memory_format))
        loss = functional.cross_entropy(logits.float(), masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total_loss += loss.item()
        if step % 250 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}/{steps}: loss {total_loss / 250:.4f}, {seconds:.0f} s", flush=True)
            total_loss = 0.0


@torch.no_grad()
def measure(network: nn.Module, scenes: Scenes) -> tuple[float, np.ndarray]:
    """Pixel accuracy, and the IoU of each class (K,) over all pixels of ``scenes``, in fp32."""
    network.eval()
    num_classes = CONTRACT.num_classes
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for start in range(0, len(scenes.images), 100):
        images, masks = as_tensors(Scenes(*(part[start : start + 100] for part in scenes)))
        pairs = masks * num_classes + network(images).argmax(dim=1)
        confusion += np.bincount(pairs.flatten().numpy(), minlength=confusion.size).reshape(confusion.shape)
    hits = np.diag(confusion)
    with np.errstate(invalid="ignore"):
        return float(hits.sum() / confusion.sum()), hits / (confusion.sum(axis=0) + confusion.sum(axis=1) - hits)


def as_tensors(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Images (N, 1, H, W) normalised as the contract says, and masks (N, H, W) int64."""
    assert CONTRACT.mean is not None
    assert CONTRACT.std is not None
    images = torch.from_numpy(scenes.images).float().div_(255).sub_(CONTRACT.mean[0]).div_(CONTRACT.std[0])
    return images, torch.from_numpy(scenes.masks).long()


if __name__ == "__main__":
    run_as_script(main)
