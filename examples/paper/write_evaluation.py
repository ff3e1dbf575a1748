"""Writes the test images of an experiment with their labels as .npz, for ``dfadc verify --data``.

python examples/paper/write_evaluation.py cifar10 --out runs/paper/cifar10/test.npz
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from experiments import DATASETS, find_experiment
from labelled_images import read_split

from dfadc.cli.script import run_as_script
from dfadc.storage import atomic_write


def main(
    experiment: Annotated[str, typer.Argument(help="Name in experiments.py.")],
    *,
    out: Annotated[Path, typer.Option(help="The .npz to write.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data set; else torchvision downloads it.")] = None,
) -> None:
    """Writes labelled test images as .npz."""
    chosen = find_experiment(experiment)
    test = read_split(DATASETS[chosen.dataset], "test", data)
    images, labels = test.images.numpy(), test.labels.numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary:
        if chosen.is_dense:
            np.savez_compressed(temporary, images=images, masks=labels.astype(np.uint8))
        else:
            np.savez_compressed(temporary, images=images, labels=labels)
    print(f"wrote {len(labels):,} test images to {out}")


if __name__ == "__main__":
    run_as_script(main)
