"""Trains a teacher without batch norm on Fashion-MNIST and writes its state dict.

    python examples/modern/train_modern.py vit --epochs 8 --out vit.pt

downloads Fashion-MNIST; ``--data FOLDER`` reads a local copy of the four idx files. The weights of the last step are
saved: no image of the test set chooses anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

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

TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: networks.vit(10, 28),
    "convnext": lambda: networks.convnext(10),
    "group_norm_resnet": lambda: networks.group_norm_resnet(10),
    "vgg": lambda: networks.vgg(10),
}
_RATE, _BATCH_SIZE = 2e-3, 128


def main(
    name: Annotated[str, typer.Argument(help=", ".join(TEACHERS))],
    *,
    out: Annotated[Path, typer.Option(help="The state dict to write.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the four idx files; else downloads.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Trains one of the teachers: AdamW under a one-cycle rate, shifted and mirrored images, bf16."""
    if name not in TEACHERS:
        raise DfadcError(f"no teacher {name!r} is trained here", f"known: {', '.join(TEACHERS)}")
    torch.manual_seed(seed)
    teacher = TEACHERS[name]()
    fit(teacher, fashion_mnist.load_fashion_mnist(data, split="train"), epochs)
    test = fashion_mnist.load_fashion_mnist(data, split="test")
    accuracy = fashion_mnist.measure_accuracy(teacher, test, fashion_mnist.CONTRACT)
    with atomic_write(out) as temporary:
        torch.save(teacher.state_dict(), temporary)
    print(f"{name}, {epochs} epochs, seed {seed}: {accuracy:.2%} of {len(test.labels):,} test images; wrote {out}")


def fit(teacher: nn.Module, train: fashion_mnist.Split, epochs: int) -> None:
    """Trains in place."""
    training = fashion_mnist.Training(epochs=epochs, batch_size=_BATCH_SIZE, peak_rate=_RATE)
    steps = len(train.labels) // _BATCH_SIZE
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=_RATE, weight_decay=0.02)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_RATE, total_steps=epochs * steps, pct_start=0.2)
    teacher.train()
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(train.labels)).split(_BATCH_SIZE)[:steps]:
            augmented = fashion_mnist.augment(train.images[chosen], training)
            images = fashion_mnist.normalise(augmented, fashion_mnist.CONTRACT)
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
