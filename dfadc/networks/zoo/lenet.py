"""LeNet5 and its half-width student, the MNIST pair of the data-free papers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from dfadc.errors import DfadcError
from dfadc.networks.zoo.initialisation import initialise_weights_

if TYPE_CHECKING:
    from dfadc.contract import ImageContract


class LeNet5(nn.Module):
    """Three 5x5 convolutions and two linear layers for 32 px images; 28 px images are padded by 2.

    Args:
        contract: channels, size (28 or 32 px, square) and number of classes.
        widths: channels of the three convolutions and units of the hidden layer.

    Raises:
        DfadcError: the images are neither 28 nor 32 px.

    Source: DAFL and DFAD (arXiv 1904.01186, 1912.11006), ReLU and max pooling instead of LeCun's originals.
    """

    def __init__(self, contract: ImageContract, *, widths: tuple[int, int, int, int] = (6, 16, 120, 84)) -> None:
        super().__init__()
        channels, height, width = contract.input_size
        if height != width or height not in (28, 32):
            raise DfadcError(
                f"LeNet5 takes 28 or 32 px square images, not {height}x{width}",
                "choose a network with adaptive pooling, e.g. compact_resnet_32",
            )
        first, second, third, hidden = widths
        self.conv1 = nn.Conv2d(channels, first, 5, padding=(32 - height) // 2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.conv3 = nn.Conv2d(second, third, 5)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.fc1 = nn.Linear(third, hidden)
        self.fc2 = nn.Linear(hidden, contract.num_classes)
        initialise_weights_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalised -> logits (N, K)."""
        maps = self.pool(self.relu(self.conv1(images)))
        maps = self.pool(self.relu(self.conv2(maps)))
        features = self.relu(self.conv3(maps)).flatten(1)
        logits: Tensor = self.fc2(self.relu(self.fc1(features)))
        return logits


def lenet5(contract: ImageContract) -> nn.Module:
    """LeNet5 (62 k parameters at one channel)."""
    return LeNet5(contract)


def lenet5_half(contract: ImageContract) -> nn.Module:
    """LeNet5 with half the channels (16 k parameters at one channel)."""
    return LeNet5(contract, widths=(3, 8, 60, 42))
