"""Writes all 10,000 Fashion-MNIST test images with labels as .npz, for `--data`: published figures are taken on them.

    python examples/fashion_mnist/write_test_images.py --out test_10000.npz

downloads Fashion-MNIST through torchvision; ``--data FOLDER`` reads a local copy of the idx files instead. Settings are
chosen on images of ``--split train``, so that no test image has a say in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from train_teacher import load_fashion_mnist, write_evaluation_images


def main(
    *,
    out: Annotated[Path, typer.Option(help="The .npz to write.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the idx files, .gz or not; else downloads.")] = None,
    split: Annotated[Literal["test", "train"], typer.Option(help="Which part of Fashion-MNIST.")] = "test",
    count: Annotated[int, typer.Option(min=1, max=10_000, help="The first so many of its images.")] = 10_000,
) -> None:
    """Writes labelled images as .npz."""
    write_evaluation_images(load_fashion_mnist(data, split=split), out, count=count)
    print(f"wrote {count:,} labelled images of the {split} part to {out}")


if __name__ == "__main__":
    typer.run(main)
