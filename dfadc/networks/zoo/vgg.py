"""VGG-11 with batch norm and one linear layer, as the data-free papers use it on 32 px images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from dfadc.networks.zoo.initialisation import initialise_weights_

if TYPE_CHECKING:
    from dfadc.contract import ImageContract


class VGG11(nn.Module):
    """Eight 3x3 convolutions in five blocks and one linear classifier (9.2 M parameters).

    Below 64 px there is no pooling before the last block, so that 32 px images still have 4x4 maps there.

    Args:
        contract: channels, size and number of classes.

    Source: the VGG of RepDistiller and CMI (arXiv 1910.10699, 2105.08584).
    """

    def __init__(self, contract: ImageContract) -> None:
        super().__init__()
        self.block0 = _block(contract.channels, (64,))
        self.block1 = _block(64, (128,))
        self.block2 = _block(128, (256, 256))
        self.block3 = _block(256, (512, 512))
        self.block4 = _block(512, (512, 512))
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.last_pool = nn.MaxPool2d(2) if min(contract.input_size[1:]) >= 64 else nn.Identity()
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, contract.num_classes)
        initialise_weights_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalised -> logits (N, K)."""
        maps = self.pool(self.relu(self.block0(images)))
        maps = self.pool(self.relu(self.block1(maps)))
        maps = self.pool(self.relu(self.block2(maps)))
        maps = self.last_pool(self.relu(self.block3(maps)))
        maps = self.global_pool(self.relu(self.block4(maps)))
        logits: Tensor = self.classifier(maps.flatten(1))
        return logits


def _block(channels_in: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Convolution and norm for each width, ReLU between them; the caller applies the last ReLU."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels_in = width
    return nn.Sequential(*layers[:-1])
