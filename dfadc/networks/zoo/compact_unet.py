"""Our own small segmentation network: an encoder of residual blocks and a decoder that sees the finer maps again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dfadc.errors import DfadcError
from dfadc.networks.zoo.initialisation import initialise_weights_
from dfadc.networks.zoo.resnet_8x import BasicBlock

if TYPE_CHECKING:
    from dfadc.contract import ImageContract

#: Smallest and largest width that is built. oneDNN (torch 2.14, AVX2) corrupts memory in the backward pass of a 1x1
#: convolution of stride 2 from 4 channels in channels_last.
WIDTHS = (8, 128)


class CompactUnet(nn.Module):
    """Maps of W, 2 W and 4 W channels at 1/2, 1/4 and 1/8 of the size, and back to 1/2; about 410 W² parameters.

    Args:
        contract: channels and number of classes; any size, also one that 8 does not divide.
        width: W.

    Raises:
        DfadcError: the width is out of bounds.

    Source: Ronneberger et al. 2015 (arXiv 1505.04597) for the way back; bilinear instead of transposed convolutions.
    """

    def __init__(self, contract: ImageContract, *, width: int) -> None:
        super().__init__()
        lowest, highest = WIDTHS
        if not lowest <= width <= highest:
            raise DfadcError(f"compact_unet_{width}: the width must lie in {lowest}..{highest}")
        self.stem = nn.Sequential(
            nn.Conv2d(contract.channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.down1 = BasicBlock(width, 2 * width, stride=2)
        self.down2 = BasicBlock(2 * width, 4 * width, stride=2)
        self.up2 = _merge(6 * width, 2 * width)
        self.up1 = _merge(3 * width, width)
        self.classifier = nn.Conv2d(width, contract.num_classes, 1)
        initialise_weights_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalised -> logits (N, K, ⌈H / 2⌉, ⌈W / 2⌉)."""
        fine = self.stem(images)
        middle = self.down1(fine)
        maps = self.up2(_beside(middle, self.down2(middle)))
        logits: Tensor = self.classifier(self.up1(_beside(fine, maps)))
        return logits


def _merge(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


def _beside(fine: Tensor, coarse: Tensor) -> Tensor:
    """Both maps (N, C, H, W) as one, the coarse one enlarged to the size of the fine one."""
    enlarged = functional.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
    return torch.cat([fine, enlarged], dim=1)
