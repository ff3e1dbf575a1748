"""Trains the Fashion-MNIST teachers; the one place in this example that sees training data.

    python examples/fashion_mnist/train_teacher.py --write-evaluation examples/fashion_mnist/test_2000.npz

downloads Fashion-MNIST through torchvision, trains, prints the accuracy on all 10,000 test images and writes a dfadc
teacher file. The weights of the last step are saved: no image of the test set chooses anything. ``--data FOLDER`` reads
a local copy of the four idx files instead (on Debian the package ``dataset-fashion-mnist`` brings one).
``--architecture lenet5`` trains the teacher without batch norm.
"""

from __future__ import annotations

import gzip
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

from dfadc.cli.script import run_as_script
from dfadc.contract import ImageContract
from dfadc.distillation.compute.policy import ComputePolicy, choose_policy
from dfadc.errors import DfadcError
from dfadc.networks.flops import count_flops, count_parameters
from dfadc.networks.names import build_architecture
from dfadc.networks.network_file import save_network
from dfadc.recipe.schema import ComputeSettings
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
FILE_PREFIXES = {"train": "train", "test": "t10k"}
ERASED_SIDES = (6, 12)  # of the square that a training image may lose, in pixels
WEIGHT_DECAY = 5e-4
WARM_UP_SHARE = 0.2
NUM_EVALUATION_IMAGES = 2000


class Split(NamedTuple):
    """Images (N, C, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor


class Training(NamedTuple):
    """Training of a teacher.

    Args:
        epochs: passes over the training images.
        batch_size: images of an update.
        peak_rate: the highest learning rate of the cycle.
        shift: pixels by which an image may move.
        flips: whether half of the images are mirrored.
        erased_share: of the images that lose a square, in [0, 1].
    """

    epochs: int
    batch_size: int
    peak_rate: float
    shift: int = 2
    flips: bool = True
    erased_share: float = 0.0

    def __str__(self) -> str:
        flips = ", flips" if self.flips else ""
        augmentation = f"shift {self.shift}{flips}, {self.erased_share:.0%} erased"
        return f"{self.epochs} epochs, batch {self.batch_size}, rate {self.peak_rate:g}, {augmentation}"


#: Architecture -> how it is trained; any other as the first.
TRAININGS = {
    "compact_resnet_48": Training(epochs=14, batch_size=128, peak_rate=0.2, erased_share=0.5),
    # Without batch norm the rate must be lower, and so small a network learns nothing from images with holes.
    "lenet5": Training(epochs=50, batch_size=128, peak_rate=0.05),
}
DEFAULT_ARCHITECTURE = "compact_resnet_48"


def main(
    *,
    data: Annotated[Path | None, typer.Option(help="Folder of the four idx files, .gz or not; else downloads.")] = None,
    architecture: Annotated[str, typer.Option(help="Any that dfadc knows.")] = DEFAULT_ARCHITECTURE,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the architecture's own.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Likewise; the rate follows linearly.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 where native.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="The dfadc teacher file to write.")] = None,
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
    training = choose_training(architecture, epochs, batch_size)
    fit(teacher.module, train, training, contract=CONTRACT, policy=policy)
    accuracy = measure_accuracy(teacher.module, test, CONTRACT)
    said = f"{training}, seed {seed}, {policy.precision}: {accuracy:.2%} of {len(test.labels):,} images"
    out = out or teacher_file(architecture)
    save_network(
        out,
        teacher.module.to(memory_format=torch.contiguous_format),
        architecture=teacher.name,
        stem=teacher.stem,
        contract=CONTRACT,
        extra={"dfadc.training": said},
    )
    print(f"test accuracy {accuracy:.2%} on {len(test.labels):,} images; wrote {out}")


def choose_training(architecture: str, epochs: int | None, batch_size: int | None) -> Training:
    """Training of an architecture, with other epochs and batches where they are given."""
    training = TRAININGS.get(architecture, TRAININGS[DEFAULT_ARCHITECTURE])
    size = batch_size or training.batch_size
    rate = training.peak_rate * size / training.batch_size
    return training._replace(epochs=epochs or training.epochs, batch_size=size, peak_rate=rate)


def teacher_file(architecture: str) -> Path:
    """Path of an architecture's teacher, beside this script."""
    suffix = "" if architecture == DEFAULT_ARCHITECTURE else f"_{architecture.replace(':', '_')}"
    return Path(__file__).with_name(f"teacher{suffix}.safetensors")


def load_fashion_mnist(folder: Path | None, *, split: Literal["train", "test"]) -> Split:
    """Reads a split from ``folder``, or downloads it through torchvision into the temporary folder.

    Raises:
        DfadcError: the folder lacks a file of the split, or the file is not idx; or the download fails.
    """
    if folder is None:
        cache = Path(tempfile.gettempdir()) / "fashion-mnist"
        try:
            downloaded = FashionMNIST(str(cache), train=split == "train", download=True)
        except (OSError, RuntimeError) as exc:
            raise DfadcError(f"cannot download Fashion-MNIST: {exc}", "--data FOLDER reads a local copy") from exc
        return Split(downloaded.data[:, None], downloaded.targets)
    images = read_idx(folder, f"{FILE_PREFIXES[split]}-images-idx3-ubyte")
    labels = read_idx(folder, f"{FILE_PREFIXES[split]}-labels-idx1-ubyte")
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


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


def normalise(images: Tensor, contract: ImageContract) -> Tensor:
    """(N, C, H, W) uint8 -> float32 as the contract says."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (contract.mean, contract.std))
    return images.float().div_(255).sub_(mean).div_(std)


def augment(images: Tensor, training: Training) -> Tensor:
    """Shifts, mirrors and partly erases a batch, each image by its own draw: (N, C, H, W) uint8 -> the same."""
    num, channels, height, width = images.shape
    padded = functional.pad(images, (training.shift,) * 4)
    y, x = torch.arange(height), torch.arange(width)
    rows = y + torch.randint(0, 2 * training.shift + 1, (num, 1))
    mirrored = (torch.rand(num, 1) < 0.5) & training.flips
    columns = torch.where(mirrored, width - 1 - x, x) + torch.randint(0, 2 * training.shift + 1, (num, 1))
    sample, channel = torch.arange(num).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1)
    shifted = padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
    sides = torch.randint(ERASED_SIDES[0], ERASED_SIDES[1] + 1, (num, 1))
    sides = sides * (torch.rand(num, 1) < training.erased_share)
    top, left = (torch.randint(0, side, (num, 1)) - sides // 2 for side in (height, width))
    in_rows, in_columns = (y >= top) & (y < top + sides), (x >= left) & (x < left + sides)
    return shifted.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


def fit(module: nn.Module, train: Split, training: Training, *, contract: ImageContract, policy: ComputePolicy) -> None:
    """Trains ``module`` in place: SGD with Nesterov momentum under a one-cycle learning rate."""
    module.train().to(memory_format=policy.memory_format)
    epochs, batch_size, peak = training.epochs, training.batch_size, training.peak_rate
    steps_per_epoch = len(train.labels) // batch_size
    optimizer = torch.optim.SGD(module.parameters(), lr=peak, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak, total_steps=epochs * steps_per_epoch, pct_start=WARM_UP_SHARE, cycle_momentum=False
    )
    for epoch in range(1, epochs + 1):
        start, total_loss = time.perf_counter(), torch.zeros(())
        for chosen in torch.randperm(len(train.labels)).split(batch_size)[:steps_per_epoch]:
            images = normalise(augment(train.images[chosen], training), contract)
            with policy.autocast():
                logits = module(images.contiguous(memory_format=policy.memory_format))
            loss = functional.cross_entropy(logits.float(), train.labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            cycle.step()
            total_loss += loss.detach()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch}/{epochs}: loss {total_loss.item() / steps_per_epoch:.4f}, {seconds:.1f} s", flush=True)


@torch.no_grad()
def measure_accuracy(module: nn.Module, test: Split, contract: ImageContract) -> float:
    """Share of ``test`` that ``module`` gets right, in fp32."""
    module.eval()
    predictions = [module(normalise(images, contract)).argmax(1) for images in test.images.split(500)]
    return (torch.cat(predictions) == test.labels).double().mean().item()


def write_evaluation_images(test: Split, path: Path, *, count: int = NUM_EVALUATION_IMAGES) -> None:
    """Writes the first ``count`` test images (N, C, H, W) uint8 with their labels, for evaluation only."""
    with atomic_write(path) as temporary:
        np.savez_compressed(
            temporary,
            images=test.images[:count].numpy(),
            labels=test.labels[:count].numpy(),
        )


if __name__ == "__main__":
    run_as_script(main)
