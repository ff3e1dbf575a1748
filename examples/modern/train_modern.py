"""Trains a teacher of another kind on Fashion-MNIST or on digits and writes its state dict.

    python examples/modern/train_modern.py vit --epochs 8 --out vit.pt
    python examples/modern/train_modern.py pooled --digits --epochs 60 --out pooled.pt --test-images digits.npz

downloads Fashion-MNIST, where ``--data FOLDER`` reads a local copy of the four idx files; the digits are
scikit-learn's, at 28 px. The weights of the last step are saved: no image of the test set chooses anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import digits_28
import networks
import torch
import typer
from torch import nn
from torch.nn import functional

from dfadc.cli.script import run_as_script
from dfadc.errors import DfadcError
from dfadc.storage import atomic_write

# The examples are scripts, not a package.
sys.path.append(str(Path(__file__).resolve().parents[1] / "fashion_mnist"))
import train_teacher as fashion_mnist

if TYPE_CHECKING:
    from dfadc import ImageContract

TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: networks.vit(10, 28),
    "convnext": lambda: networks.convnext(10),
    "group_norm_resnet": lambda: networks.group_norm_resnet(10),
    "vgg": lambda: networks.vgg(10),
    "five_convolutions": lambda: networks.five_convolutions(10),
    "pooled": lambda: networks.pooled(10),
}
_RATE, _BATCH_SIZE = 2e-3, 128


def main(
    name: Annotated[str, typer.Argument(help=", ".join(TEACHERS))],
    *,
    out: Annotated[Path, typer.Option(help="The state dict to write.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the four idx files; else downloads.")] = None,
    digits: Annotated[bool, typer.Option("--digits", help="Digits at 28 px, divided by the seed.")] = False,
    test_images: Annotated[Path | None, typer.Option(help="An .npz to write, with the test images for --data.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Trains one of the teachers: AdamW under a one-cycle rate, shifted and mirrored images, bf16."""
    if name not in TEACHERS:
        raise DfadcError(f"no teacher {name!r} is trained here", f"known: {', '.join(TEACHERS)}")
    torch.manual_seed(seed)
    teacher = TEACHERS[name]()
    if digits:
        train, test = (digits_28.load_digits_28(split, seed=seed) for split in ("train", "test"))
    else:
        train, test = (fashion_mnist.load_fashion_mnist(data, split=split) for split in ("train", "test"))
    contract = digits_28.CONTRACT if digits else fashion_mnist.CONTRACT
    fit(teacher, train, epochs, contract, flips=not digits)
    accuracy = fashion_mnist.measure_accuracy(teacher, test, contract)
    if test_images is not None:
        fashion_mnist.write_evaluation_images(test, test_images, count=len(test.labels))
    with atomic_write(out) as temporary:
        torch.save(teacher.state_dict(), temporary)
    print(f"{name}, {epochs} epochs, seed {seed}: {accuracy:.2%} of {len(test.labels):,} test images; wrote {out}")


def fit(
    teacher: nn.Module, train: fashion_mnist.Split, epochs: int, contract: ImageContract, *, flips: bool = True
) -> None:
    """Trains in place."""
    batch_size = min(_BATCH_SIZE, len(train.labels) // 16)
    training = fashion_mnist.Training(epochs=epochs, batch_size=batch_size, peak_rate=_RATE, flips=flips)
    steps = len(train.labels) // batch_size
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=_RATE, weight_decay=0.02)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_RATE, total_steps=epochs * steps, pct_start=0.2)
    teacher.train()
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(train.labels)).split(batch_size)[:steps]:
            augmented = fashion_mnist.augment(train.images[chosen], training)
            images = fashion_mnist.normalise(augmented, contract)
            with torch.autocast("cpu", torch.bfloat16):
                logits = teacher(images)
            loss = functional.cross_entropy(logits.float(), train.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
            optimizer.step()
            cycle.step()
        print(f"epoch {epoch}/{epochs}: loss {float(loss.detach()):.3f}", flush=True)


if __name__ == "__main__":
    run_as_script(main)
