"""Tasks: teachers, students, and the real images that judge them.

Digits and colour are built from what scikit-learn ships; Fashion-MNIST is read from a folder or downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_sample_images
from torch.nn import functional

# The examples are scripts, not a package.
sys.path.append(str(Path(__file__).resolve().parents[1] / "fashion_mnist"))
from train_teacher import Split, load_fashion_mnist

SplitName = Literal["train", "test"]
Pixels = NDArray[np.uint8]

HERE = Path(__file__).resolve().parent
FASHION_MNIST = HERE.parent / "fashion_mnist"
#: Of scikit-learn's 1,797 digits.
NUM_TEST_DIGITS = 597
#: Images that are made of each digit in the colour task.
COLOUR_COPIES = {"train": 10, "test": 4}
COLOUR_SIDE, COLOUR_DIGIT_SIDE = 32, 28
#: The column of both photos that separates the patches of training from those of the test.
PHOTO_BORDER = 427


@dataclass(frozen=True)
class Task:
    """One teacher, and the student that is to learn from it.

    Args:
        teacher: its file.
        student: architecture with at most about a quarter of the teacher's parameters.
        load: reads a split of the real images, given the folder of Fashion-MNIST or None.
    """

    teacher: Path
    student: str
    load: Callable[[SplitName, Path | None], Split]


def digits(split: SplitName, _: Path | None = None) -> Split:
    """Scikit-learn's real digits, (N, 1, 8, 8), in a fixed random order of which the first are the test."""
    images, labels = _shuffled_digits()
    chosen = slice(NUM_TEST_DIGITS) if split == "test" else slice(NUM_TEST_DIGITS, None)
    return Split(as_pixels(images[chosen]), labels[chosen])


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    """UCI's digits, of values in 0..16, in uint8."""
    return images.mul(255 / 16).round().byte()


def colour(split: SplitName, _: Path | None = None) -> Split:
    """Real digits over real photographs, (N, 3, 32, 32): |patch - digit|, as MNIST-M is made.

    Each digit is enlarged to 28 px and laid at random over random patches of the two photos that scikit-learn ships.
    Digits and patches of the test are never those of training: its digits are others, its patches lie right of a
    border.

    Source: Ganin et al. 2016 (arXiv 1505.07818), section 5.2.4, with MNIST and BSDS500.
    """
    drawn, labels = digits(split)
    size = (COLOUR_DIGIT_SIDE, COLOUR_DIGIT_SIDE)
    enlarged = functional.interpolate(drawn.float(), size=size, mode="bilinear").round().byte()[:, 0].numpy()
    margin = COLOUR_SIDE - COLOUR_DIGIT_SIDE
    framed = np.pad(enlarged, ((0, 0), (margin, margin), (margin, margin)))
    columns = slice(PHOTO_BORDER) if split == "train" else slice(PHOTO_BORDER, None)
    photos = np.stack(load_sample_images().images)[:, :, columns]
    num = COLOUR_COPIES[split] * len(labels)
    dice = np.random.default_rng(0 if split == "train" else 1)
    patches = _windows(photos, dice.integers(len(photos), size=num), dice)
    overlay = _windows(framed, np.arange(num) % len(labels), dice)
    pixels = np.abs(patches.astype(np.int16) - overlay[..., None]).astype(np.uint8)
    return Split(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), labels.repeat(COLOUR_COPIES[split]))


def _windows(pictures: Pixels, chosen: NDArray[np.int64], dice: np.random.Generator) -> Pixels:
    """A window of 32 px at a random place of each chosen picture: pictures (P, H, W, ...) -> (N, 32, 32, ...)."""
    side, inside = COLOUR_SIDE, np.arange(COLOUR_SIDE)
    top, left = (dice.integers(length - side + 1, size=(len(chosen), 1)) for length in pictures.shape[1:3])
    windows: Pixels = pictures[chosen[:, None, None], (top + inside)[:, :, None], (left + inside)[:, None, :]]
    return windows


def fashion_mnist(split: SplitName, folder: Path | None = None) -> Split:
    """Fashion-MNIST, (N, 1, 28, 28), from the folder of the idx files; without one it is downloaded."""
    return load_fashion_mnist(folder, split=split)


def _shuffled_digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return torch.from_numpy(found.images[order])[:, None], torch.from_numpy(found.target[order]).long()


TASKS: dict[str, Task] = {
    "digits": Task(HERE / "digits.safetensors", "compact_resnet_8", digits),
    "colour": Task(HERE / "colour.safetensors", "compact_resnet_12", colour),
    "fashion-resnet": Task(FASHION_MNIST / "teacher.safetensors", "compact_resnet_20", fashion_mnist),
    "fashion-lenet5": Task(FASHION_MNIST / "teacher_lenet5.safetensors", "lenet5_half", fashion_mnist),
}
