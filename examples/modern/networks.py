"""Networks of other kinds, for ``--teacher-arch networks:vit`` and ``--student networks:vit_half_width``."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models import ConvNeXt, VisionTransformer
from torchvision.models.convnext import CNBlockConfig


def vit(
    num_classes: int, image_size: int, *, channels: int = 1, width: int = 64, depth: int = 4, heads: int = 4
) -> VisionTransformer:
    """Torchvision's Vision Transformer with patches of 4 x 4 pixels."""
    network = VisionTransformer(image_size, 4, depth, heads, width, 4 * width, num_classes=num_classes)
    network.conv_proj = nn.Conv2d(channels, width, 4, stride=4)
    return network


def vit_half_width(num_classes: int, image_size: int) -> VisionTransformer:
    """Half of the heads, each as wide."""
    return vit(num_classes, image_size, width=32, heads=2)


def vit_half_depth(num_classes: int, image_size: int) -> VisionTransformer:
    """Half of the layers."""
    return vit(num_classes, image_size, depth=2)


def convnext(num_classes: int, channels: int = 1, width: int = 48) -> ConvNeXt:
    """Torchvision's ConvNeXt with two stages of two blocks."""
    stages = [CNBlockConfig(width, 2 * width, 2), CNBlockConfig(2 * width, None, 2)]
    network = ConvNeXt(stages, num_classes=num_classes)
    network.features[0][0] = nn.Conv2d(channels, width, 4, stride=4)
    return network


def convnext_half_width(num_classes: int, channels: int = 1) -> ConvNeXt:
    """Half of the channels."""
    return convnext(num_classes, channels, width=24)


class GroupNormBlock(nn.Module):
    """Residual block of two convolutions, each with a group norm.

    Args:
        inputs: channels.
        outputs: channels.
        stride: of the first convolution and the shortcut.
        groups: of each norm.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W) -> (N, C', H / stride, W / stride)."""
        inner = self.norm1(self.conv1(maps)).relu()
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(maps))


def group_norm_resnet(num_classes: int, channels: int = 1, width: int = 32, groups: int = 8) -> nn.Sequential:
    """A residual network of three blocks with group norms."""
    blocks = [
        GroupNormBlock(inputs * width, outputs * width, stride, groups)
        for inputs, outputs, stride in ((1, 1, 1), (1, 2, 2), (2, 4, 2))
    ]
    stem = (nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(groups, width), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes))
    return nn.Sequential(*stem, *blocks, *head)


def group_norm_resnet_half_width(num_classes: int, channels: int = 1) -> nn.Sequential:
    """Half of the channels in as many groups."""
    return group_norm_resnet(num_classes, channels, width=16)


def vgg(num_classes: int, channels: int = 1, width: int = 32) -> nn.Sequential:
    """Five convolutions of 3 x 3 with biases, and two linear layers."""
    layers: list[nn.Module] = []
    widths = (channels, width, width, 2 * width, 2 * width, 4 * width)
    for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        if number in (2, 4):
            layers.append(nn.MaxPool2d(2))
    head = (nn.Linear(16 * width, 4 * width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4 * width, num_classes))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *head)


def vgg_half_width(num_classes: int, channels: int = 1) -> nn.Sequential:
    """Half of the channels."""
    return vgg(num_classes, channels, width=16)


def five_convolutions(num_classes: int, channels: int = 1, width: int = 32) -> nn.Sequential:
    """A plain network with batch norms."""
    return _plain(num_classes, (channels, width, 2 * width, 2 * width, 3 * width, 3 * width), strides=(1, 2, 1, 2, 1))


def three_convolutions(num_classes: int, channels: int = 1, width: int = 16) -> nn.Sequential:
    """A tenth of its parameters and other strides: no smaller copy of it."""
    return _plain(num_classes, (channels, width, 2 * width, 2 * width), strides=(2, 1, 2))


def _plain(num_classes: int, widths: tuple[int, ...], strides: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for (inputs, outputs), stride in zip(pairwise(widths), strides, strict=True):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


def pooled(num_classes: int, channels: int = 1, widths: tuple[int, int, int] = (32, 64, 128)) -> nn.Sequential:
    """Two convolutions, each with max pooling, and two linear layers with dropout: many a first network for digits."""
    first, second, hidden = widths
    return nn.Sequential(
        *(nn.Conv2d(channels, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(49 * second, hidden), nn.ReLU(), nn.Dropout(0.4), nn.Linear(hidden, num_classes)),
    )
