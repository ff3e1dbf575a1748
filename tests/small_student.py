"""Fixtures of the exporters' tests: one small real student, exported once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2

from dfadc.contract import ImageContract
from exporters.to_onnx.fp32 import export_onnx

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from exporters.exporter import ExportResult


#: Expansion, channels, repeats and stride, as in the paper's table (1801.04381, table 2), of its first blocks.
BLOCKS = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 1, 2]]


@pytest.fixture(scope="session")
def contract() -> ImageContract:
    return ImageContract((3, 32, 32), 10, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


@pytest.fixture(scope="session")
def student(images: NDArray[np.float32]) -> nn.Module:
    """MobileNetV2, a quarter wide, its first blocks; batch norms off their defaults as in training, logits spread."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = mobilenet_v2(num_classes=10, width_mult=0.25, inverted_residual_setting=BLOCKS)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.weight.uniform_(0.8, 1.6, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.5, generator=generator)
        network.train()(torch.from_numpy(images))
    network.eval()
    return network


@pytest.fixture(scope="session")
def images(contract: ImageContract) -> NDArray[np.float32]:
    """(48, 3, 32, 32) smooth random images in the range of normalised pixels."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(48, 3, 6, 6, generator=generator)
    pixels = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (contract.mean, contract.std))
    array: NDArray[np.float32] = ((pixels - mean) / std).numpy()
    return array


@pytest.fixture(scope="session")
def exported(student: nn.Module, contract: ImageContract, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    path = tmp_path_factory.mktemp("artifacts") / "student.onnx"
    return export_onnx(student, path, contract=contract, metadata={"architecture": "torchvision:mobilenet_v2"})


@pytest.fixture(scope="session")
def student_onnx(exported: ExportResult) -> Path:
    return exported.path


@pytest.fixture(scope="session")
def student_logits(student: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = student(torch.from_numpy(images)).numpy()
    return logits
