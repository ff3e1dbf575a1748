"""The papers' own networks and ours, by name: each factory takes the image contract."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from torch import nn

from dfadc.contract import ImageContract
from dfadc.networks.zoo.compact_resnet import CompactResNet
from dfadc.networks.zoo.compact_unet import CompactUnet
from dfadc.networks.zoo.deeplab_mobilenet_v2 import DeepLabMobileNetV2
from dfadc.networks.zoo.lenet import lenet5, lenet5_half
from dfadc.networks.zoo.resnet_8x import resnet18_8x, resnet34_8x
from dfadc.networks.zoo.vgg import VGG11
from dfadc.networks.zoo.wide_resnet import WideResNet

NetworkFactory = Callable[[ImageContract], nn.Module]

#: Classifiers, logits (N, K); any other ``wrn_DEPTH_WIDTH`` and ``compact_resnet_WIDTH`` can be built too.
NETWORKS: dict[str, NetworkFactory] = {
    "lenet5": lenet5,
    "lenet5_half": lenet5_half,
    "resnet18_8x": resnet18_8x,
    "resnet34_8x": resnet34_8x,
    "vgg11_bn": VGG11,
    **{f"wrn_{d}_{w}": partial(WideResNet, depth=d, width=w) for d, w in ((10, 2), (16, 1), (16, 2), (40, 1), (40, 2))},
    **{f"compact_resnet_{width}": partial(CompactResNet, width=width) for width in (16, 32, 48, 64)},
}

#: Segmentation networks, logits (N, K, h, w); any other ``compact_unet_WIDTH`` can be built too.
SEGMENTERS: dict[str, NetworkFactory] = {
    "deeplabv3_mobilenetv2": DeepLabMobileNetV2,
    **{f"compact_unet_{width}": partial(CompactUnet, width=width) for width in (8, 16, 24, 32)},
}

_WIDE_RESNET = re.compile(r"wrn_(\d{1,3})_(\d{1,2})")
_COMPACT_RESNET = re.compile(r"compact_resnet_(\d{1,3})")
_COMPACT_UNET = re.compile(r"compact_unet_(\d{1,3})")


def find_network(name: str) -> NetworkFactory | None:
    """The factory of one of our own networks, or None where the name is not ours."""
    if (known := {**NETWORKS, **SEGMENTERS}.get(name)) is not None:
        return known
    if match := _WIDE_RESNET.fullmatch(name):
        return partial(WideResNet, depth=int(match[1]), width=int(match[2]))
    if match := _COMPACT_RESNET.fullmatch(name):
        return partial(CompactResNet, width=int(match[1]))
    if match := _COMPACT_UNET.fullmatch(name):
        return partial(CompactUnet, width=int(match[1]))
    return None
