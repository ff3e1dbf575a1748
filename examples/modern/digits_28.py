"""Scikit-learn's 1,797 real digits as images of 28 px, white on black: 1,197 to train on, 600 held out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from dfadc import ImageContract

sys.path.append(str(Path(__file__).resolve().parents[1] / "fashion_mnist"))
from train_teacher import Split

CONTRACT = ImageContract((1, 28, 28), 10, mean=(0.1307,), std=(0.3081,))
NUM_HELD_OUT = 600


def load_digits_28(split: str, *, seed: int = 0) -> Split:
    """Part ``train`` or ``test`` of the digits, divided by a seed; strokes are as sharp as a pen's."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    chosen = order[:-NUM_HELD_OUT] if split == "train" else order[-NUM_HELD_OUT:]
    images = torch.from_numpy(digits.images[chosen, None]).float() * (255 / 16)
    images = functional.interpolate(images, size=(24, 24), mode="bicubic").clamp(0, 255)
    sharpened = ((functional.pad(images, (2, 2, 2, 2)) - 90) * 2.2 + 100).clamp(0, 255).round()
    return Split(sharpened.to(torch.uint8), torch.from_numpy(digits.target[chosen]).long())
