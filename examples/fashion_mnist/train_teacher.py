"""Trains the Fashion-MNIST teacher that ``make demo`` distils; the one place in this example that sees training data.

    python examples/fashion_mnist/train_teacher.py --write-evaluation examples/fashion_mnist/test_2000.npz

downloads Fashion-MNIST through torchvision, trains, prints the accuracy on all 10,000 test images and writes a dfadc
teacher file. The weights of the last step are saved: no image of the test set chooses anything. ``--data FOLDER`` reads
a local copy of the four idx files instead (on Debian the package ``dataset-fashion-mnist`` brings one).
"""

from __future__ import annotations

import gzip
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional
from torchvision.datasets import FashionMNIST

from dfadc.contract import ImageContract
from dfadc.distillation.precision import ComputePolicy, choose_policy
from dfadc.errors import DfadcError
from dfadc.models.architectures import build_architecture
from dfadc.models.flops import count_flops, count_parameters
from dfadc.models.network_file import save_network
from dfadc.recipe import ComputeSettings
from dfadc.storage import atomic_write

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTRACT = ImageContract(
    input_size=(1, 28, 28),
    num_classes=10,
    mean=(0.2860,),  # of the 60,000 training images
    std=(0.3530,),
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
)
TEACHER_FILE = Path(__file__).with_name("teacher.safetensors")
FILE_PREFIXES = {"train": "train", "test": "t10k"}
SHIFT = 2  # pixels an image may move in training
ERASED_SHARE = 0.5  # of the training images lose a square
ERASED_SIDES = (6, 12)  # in pixels
PEAK_LEARNING_RATE = 0.2  # for a batch of 128; scaled linearly
WEIGHT_DECAY = 5e-4
WARM_UP_SHARE = 0.2
NUM_EVALUATION_IMAGES = 2000


class Split(NamedTuple):
    """Images (N, 28, 28) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor


def main(
    *,
    data: Annotated[Path | None, typer.Option(help="Folder of the four idx files, .gz or not; else downloads.")] = None,
    architecture: Annotated[str, typer.Option(help="Any architecture that dfadc knows.")] = "compact_resnet_48",
    epochs: Annotated[int, typer.Option(min=1)] = 14,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    seed: Annotated[int, typer.Option()] = 0,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 where native.")] = "auto",
    out: Annotated[Path, typer.Option(help="The dfadc teacher file to write.")] = TEACHER_FILE,
    write_evaluation: Annotated[Path | None, typer.Option(help="Also write 2,000 test images as .npz.")] = None,
) -> None:
    """Trains a Fashion-MNIST teacher and writes it as a dfadc teacher file."""
    train, test = load_fashion_mnist(data, split="train"), load_fashion_mnist(data, split="test")
    if write_evaluation is not None:
        write_evaluation_images(test, write_evaluation)
    torch.manual_seed(seed)
    teacher = build_architecture(architecture, CONTRACT)
    parameters, flops = count_parameters(teacher.module), count_flops(teacher.module, CONTRACT.input_size)
    policy = choose_policy(ComputeSettings(precision=precision), torch.device("cpu"))
    print(f"{teacher.name}: {parameters:,} parameters, {flops:,} FLOPs an image, {policy.precision}", flush=True)
    fit(teacher.module, train, policy, epochs=epochs, batch_size=batch_size)
    accuracy = measure_accuracy(teacher.module, test)
    training = f"{epochs} epochs, batch {batch_size}, seed {seed}, {policy.precision}: {accuracy:.2%} of 10,000 images"
    save_network(
        out,
        teacher.module.to(memory_format=torch.contiguous_format),
        architecture=teacher.name,
        stem=teacher.stem,
        contract=CONTRACT,
        extra={"dfadc.training": training},
    )
    print(f"test accuracy {accuracy:.2%} on {len(test.labels):,} images; wrote {out}")


def load_fashion_mnist(folder: Path | None, *, split: Literal["train", "test"]) -> Split:
    """Reads a split from ``folder``, or downloads it through torchvision into the temporary folder.

    Raises:
        DfadcError: the folder lacks a file of the split, or the file is not idx.
    """
    if folder is None:
        cache = Path(tempfile.gettempdir()) / "fashion-mnist"
        downloaded = FashionMNIST(str(cache), train=split == "train", download=True)
        return Split(downloaded.data, downloaded.targets)
    images = read_idx(folder, f"{FILE_PREFIXES[split]}-images-idx3-ubyte")
    labels = read_idx(folder, f"{FILE_PREFIXES[split]}-labels-idx1-ubyte")
    return Split(torch.from_numpy(images), torch.from_numpy(labels).long())


def read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Reads an idx file of bytes: two zeros, type 8 (unsigned byte), number of axes, big-endian sides, values."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DfadcError(f"{folder} holds neither {name} nor {name}.gz", "give the folder of the four idx files")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if content[:3] != b"\0\0\x08":
        raise DfadcError(f"{path} is not an idx file of unsigned bytes")
    num_axes = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=num_axes, offset=4)
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * num_axes)
    return values.reshape(shape.tolist()).copy()


def normalise(images: Tensor) -> Tensor:
    """(N, 28, 28) uint8 -> (N, 1, 28, 28) float32 as the contract says."""
    assert CONTRACT.mean is not None
    assert CONTRACT.std is not None
    return images[:, None].float().div_(255).sub_(CONTRACT.mean[0]).div_(CONTRACT.std[0])


def augment(images: Tensor) -> Tensor:
    """Shifts, mirrors and partly erases a batch, each image by its own draw: (N, 28, 28) uint8 -> the same."""
    num, side = images.shape[0], images.shape[-1]
    padded = functional.pad(images, (SHIFT,) * 4)
    pixel = torch.arange(side)
    rows = pixel + torch.randint(0, 2 * SHIFT + 1, (num, 1))
    columns = torch.where(torch.rand(num, 1) < 0.5, side - 1 - pixel, pixel) + torch.randint(0, 2 * SHIFT + 1, (num, 1))
    shifted = padded[torch.arange(num)[:, None, None], rows[:, :, None], columns[:, None, :]]
    sides = torch.randint(ERASED_SIDES[0], ERASED_SIDES[1] + 1, (num, 1)) * (torch.rand(num, 1) < ERASED_SHARE)
    top, left = torch.randint(0, side, (2, num, 1)) - sides // 2
    in_rows = (pixel >= top) & (pixel < top + sides)
    in_columns = (pixel >= left) & (pixel < left + sides)
    return shifted.masked_fill(in_rows[:, :, None] & in_columns[:, None, :], 0)


def fit(module: nn.Module, train: Split, policy: ComputePolicy, *, epochs: int, batch_size: int) -> None:
    """Trains ``module`` in place: SGD with Nesterov momentum under a one-cycle learning rate."""
    module.train().to(memory_format=policy.memory_format)
    steps_per_epoch = len(train.labels) // batch_size
    peak = PEAK_LEARNING_RATE * batch_size / 128
    optimizer = torch.optim.SGD(module.parameters(), lr=peak, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak, total_steps=epochs * steps_per_epoch, pct_start=WARM_UP_SHARE, cycle_momentum=False
    )
    for epoch in range(1, epochs + 1):
        start, total_loss = time.perf_counter(), torch.zeros(())
        for chosen in torch.randperm(len(train.labels)).split(batch_size)[:steps_per_epoch]:
            images = normalise(augment(train.images[chosen])).contiguous(memory_format=policy.memory_format)
            with policy.autocast():
                logits = module(images)
            loss = functional.cross_entropy(logits.float(), train.labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch}/{epochs}: loss {total_loss.item() / steps_per_epoch:.4f}, {seconds:.1f} s", flush=True)


@torch.no_grad()
def measure_accuracy(module: nn.Module, test: Split) -> float:
    """Share of ``test`` that ``module`` gets right, in fp32."""
    module.eval()
    predictions = [module(normalise(images)).argmax(1) for images in test.images.split(500)]
    return (torch.cat(predictions) == test.labels).double().mean().item()


def write_evaluation_images(test: Split, path: Path, *, count: int = NUM_EVALUATION_IMAGES) -> None:
    """Writes the first ``count`` test images (N, 1, 28, 28) uint8 with their labels, for evaluation only."""
    with atomic_write(path) as temporary:
        np.savez_compressed(
            temporary,
            images=test.images[:count, None].numpy(),
            labels=test.labels[:count].numpy(),
        )


if __name__ == "__main__":
    try:
        typer.run(main)
    except DfadcError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
