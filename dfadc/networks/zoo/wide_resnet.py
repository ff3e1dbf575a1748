"""Wide residual networks with pre-activation, for 32 px images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from dfadc.errors import DfadcError
from dfadc.networks.zoo.initialisation import initialise_weights_

if TYPE_CHECKING:
    from dfadc.contract import ImageContract


class PreActivationBlock(nn.Module):
    """Norm and ReLU before each 3x3 convolution; where the shape changes the shortcut starts after the first ReLU."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut: nn.Conv2d | None = None
        if channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""
        activated = self.relu(self.bn1(maps))
        shortcut: Tensor = maps if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        return shortcut + residual


class Stage(nn.Module):
    """Blocks of one width; only the first one strides."""

    def __init__(self, channels_in: int, channels_out: int, *, blocks: int, stride: int) -> None:
        super().__init__()
        first = PreActivationBlock(channels_in, channels_out, stride=stride)
        rest = (PreActivationBlock(channels_out, channels_out, stride=1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""
        output: Tensor = self.layer(maps)
        return output


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times ``width`` channels.

    Args:
        contract: channels and number of classes; any size.
        depth: number of convolutions on the longest path; (depth - 4) is a multiple of 6.
        width: widening factor.

    Raises:
        DfadcError: no such depth.

    Source: Zagoruyko and Komodakis 2016 (arXiv 1605.07146), without dropout.
    """

    def __init__(self, contract: ImageContract, *, depth: int, width: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 != 0 or width < 1:
            raise DfadcError(
                f"there is no wrn_{depth}_{width}: the depth must be 6n + 4 and the width at least 1",
                "e.g. wrn_40_2, wrn_16_1, wrn_10_2",
            )
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(contract.channels, 16, 3, padding=1, bias=False)
        self.block1 = Stage(16, 16 * width, blocks=blocks, stride=1)
        self.block2 = Stage(16 * width, 32 * width, blocks=blocks, stride=2)
        self.block3 = Stage(32 * width, 64 * width, blocks=blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, contract.num_classes)
        initialise_weights_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalised -> logits (N, K)."""
        maps = self.block3(self.block2(self.block1(self.conv1(images))))
        logits: Tensor = self.fc(self.pool(self.relu(self.bn1(maps))).flatten(1))
        return logits
