"""Our own modest residual network for small images: about 5 k parameters times (W / 4)²."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from dfadc.errors import DfadcError
from dfadc.networks.zoo.initialisation import initialise_weights_
from dfadc.networks.zoo.resnet_8x import BasicBlock

if TYPE_CHECKING:
    from dfadc.contract import ImageContract

#: Smallest and largest width that is built.
WIDTHS = (4, 256)


class CompactResNet(nn.Module):
    """A full-size 3x3 stem, three residual blocks of stride 2, global pooling and one linear layer.

    Args:
        contract: channels and number of classes; any size.
        width: W, channels of the stem; the blocks have W, 2 W and 4 W.

    Raises:
        DfadcError: the width is out of bounds.
    """

    def __init__(self, contract: ImageContract, *, width: int) -> None:
        super().__init__()
        lowest, highest = WIDTHS
        if not lowest <= width <= highest:
            raise DfadcError(f"compact_resnet_{width}: the width must lie in {lowest}..{highest}")
        self.stem = nn.Sequential(
            nn.Conv2d(contract.channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential(
            BasicBlock(width, width, stride=2),
            BasicBlock(width, 2 * width, stride=2),
            BasicBlock(2 * width, 4 * width, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * width, contract.num_classes)
        initialise_weights_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalised -> logits (N, K)."""
        maps = self.stages(self.stem(images))
        logits: Tensor = self.classifier(self.pool(maps).flatten(1))
        return logits
