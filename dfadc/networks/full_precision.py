"""Full fp32 on CUDA, where torch computes convolutions in TF32 unless it is told not to."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Convolutions and matrix products.
_SETTINGS = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]


@contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """Computes fp32 layers in fp32 within it, on CUDA; on other devices, which do so anyway, it changes nothing.

    TF32 rounds the factors of a product to 10 bits. Logits that verification compares an artifact with, to a
    ten-thousandth, must not be rounded so.
    """
    if device.type != "cuda":
        yield
        return
    before = [setting.fp32_precision for setting in _SETTINGS]
    try:
        for setting in _SETTINGS:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(_SETTINGS, before, strict=True):
            setting.fp32_precision = value
