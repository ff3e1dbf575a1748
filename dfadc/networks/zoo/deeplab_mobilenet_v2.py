"""DeepLabv3 on MobileNetV2: the paper's student for segmentation, beside torchvision's DeepLabv3 on ResNet-50."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

if TYPE_CHECKING:
    from dfadc.contract import ImageContract

#: The logits are an eighth of the images, as those of torchvision's ``deeplabv3_resnet50`` before it enlarges them.
OUTPUT_STRIDE = 8
#: Channels of MobileNetV2's last bottleneck; the 1x1 convolution to 1280 behind it serves its classifier alone.
_FEATURES = 320


class DeepLabMobileNetV2(nn.Module):
    """MobileNetV2 with dilation instead of its last two strides, atrous pooling, and logits that are not enlarged.

    Args:
        contract: channels and number of classes; any size, also one that no stride divides.

    Source: Fang et al. 2019 (the pair), Chen et al. 2017 (arXiv 1706.05587) for the head with rates 12, 24 and 36 at
    stride 8, Sandler et al. 2018 (arXiv 1801.04381). The papers do not say the student's stride; ours is the teacher's.
    """

    def __init__(self, contract: ImageContract) -> None:
        super().__init__()
        self.backbone = mobilenet_v2(weights=None).features[:-1]
        _replace_strides_(self.backbone)
        if contract.channels != 3:
            stem = self.backbone[0][0]
            self.backbone[0][0] = nn.Conv2d(contract.channels, stem.out_channels, 3, stride=2, padding=1, bias=False)
        self.classifier = DeepLabHead(_FEATURES, contract.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), normalised -> logits (N, K, ⌈H / 8⌉, ⌈W / 8⌉)."""
        logits: Tensor = self.classifier(self.backbone(images))
        return logits


def _replace_strides_(backbone: nn.Module) -> None:
    """Strides beyond ``OUTPUT_STRIDE`` become 1 in place, and what comes behind them looks as far as it did before."""
    stride = dilation = 1
    for layer in backbone.modules():
        if not isinstance(layer, nn.Conv2d) or layer.kernel_size == (1, 1):
            continue
        layer.dilation, layer.padding = (dilation, dilation), (dilation, dilation)
        if layer.stride == (2, 2):
            if stride == OUTPUT_STRIDE:
                layer.stride = (1, 1)
                dilation *= 2
            else:
                stride *= 2
