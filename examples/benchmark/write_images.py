"""Writes the real images that judge the students of a task as .npz, for `--data`.

    python examples/benchmark/write_images.py digits --out digits_597.npz
    python examples/benchmark/write_images.py colour --out colour_2388.npz
    python examples/benchmark/write_images.py digits --optdigits optdigits.tra --out digits_3823.npz

Scikit-learn ships the 1,797 digits of 13 writers that are the test part of UCI's Optical Recognition of Handwritten
Digits (Alpaydin and Kaynak 1998, https://archive.ics.uci.edu/dataset/80, CC BY 4.0). ``optdigits.tra`` is the other
part: 3,823 digits of 30 other writers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from tasks import TASKS, as_pixels
from train_teacher import Split, write_evaluation_images

from dfadc.cli.script import run_as_script
from dfadc.errors import DfadcError

SIDE, DEEPEST = 8, 16


def main(
    task: Annotated[Literal["digits", "colour"], typer.Argument(help="Whose test images.")],
    *,
    out: Annotated[Path, typer.Option(help="The .npz to write.")],
    optdigits: Annotated[
        Path | None, typer.Option(help="UCI's optdigits.tra: the digits of that file instead.")
    ] = None,
) -> None:
    """Writes labelled images as .npz."""
    if optdigits is not None and task != "digits":
        raise DfadcError(f"--optdigits holds digits, the task is {task}", "write_images.py digits --optdigits FILE")
    test = TASKS[task].load("test", None) if optdigits is None else read_optdigits(optdigits)
    write_evaluation_images(test, out, count=len(test.labels))
    print(f"wrote {len(test.labels):,} labelled images to {out}")


def read_optdigits(path: Path) -> Split:
    """Digits (N, 1, 8, 8) of a file with 64 values in 0..16 and a digit in every line.

    Raises:
        DfadcError: the file cannot be read, or is none of these.
    """
    way = "pass optdigits.tra as UCI publishes it"
    try:
        lines = [[int(value) for value in line.split(",")] for line in path.read_text().splitlines()]
        rows = np.array(lines, dtype=np.int64).reshape(-1, SIDE * SIDE + 1)
    except (OSError, ValueError) as exc:
        raise DfadcError(f"{path} cannot be read: {exc}", way) from exc
    values, labels = rows[:, :-1], rows[:, -1]
    if not (len(rows) and 0 <= values.min() <= values.max() <= DEEPEST and 0 <= labels.min() <= labels.max() <= 9):
        raise DfadcError(f"{path} has other lines than {SIDE * SIDE} values in 0..{DEEPEST} and a digit", way)
    return Split(as_pixels(torch.from_numpy(values).view(-1, 1, SIDE, SIDE).double()), torch.from_numpy(labels))


if __name__ == "__main__":
    run_as_script(main)
