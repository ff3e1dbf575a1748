"""ResNets with a stem for small images: 3x3 stride 1, no pooling, so that the last maps are 1/8 of the images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from dfadc.networks.zoo.initialisation import initialise_weights_

if TYPE_CHECKING:
    from dfadc.contract import ImageContract


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(maps)))))
        output: Tensor = self.relu(residual + self.shortcut(maps))
        return output


class ResNet8x(nn.Module):
    """ResNet of basic blocks in four stages of strides 1, 2, 2, 2.

    Args:
        contract: channels and number of classes; any size.
        blocks: residual blocks per stage.

    Source: DAFL (arXiv 1904.01186).
    """

    def __init__(self, contract: ImageContract, *, blocks: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(contract.channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _stage(64, 64, blocks=blocks[0], stride=1)
        self.layer2 = _stage(64, 128, blocks=blocks[1], stride=2)
        self.layer3 = _stage(128, 256, blocks=blocks[2], stride=2)
        self.layer4 = _stage(256, 512, blocks=blocks[3], stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512, contract.num_classes)
        initialise_weights_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalised -> logits (N, K)."""
        maps = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        logits: Tensor = self.linear(self.pool(maps).flatten(1))
        return logits


def _stage(channels_in: int, channels_out: int, *, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels_out, stride=stride)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out, stride=1) for _ in range(blocks - 1)))


def resnet18_8x(contract: ImageContract) -> nn.Module:
    """ResNet-18 "8x" (11.2 M parameters)."""
    return ResNet8x(contract, blocks=(2, 2, 2, 2))


def resnet34_8x(contract: ImageContract) -> nn.Module:
    """ResNet-34 "8x" (21.3 M parameters)."""
    return ResNet8x(contract, blocks=(3, 4, 6, 3))
