"""Recognising timm's architectures by the names and shapes of weights, where timm is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfadc.errors import DfadcError, RequirementMissing
from dfadc.networks.construct import import_timm
from dfadc.teacher.identify import Match, match_one, size_of_positions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

#: A name of weights that a family has -> its members that people use. Members with the shapes of another but other
#: padding (``tf_``) stand beside it: both fit, and the user chooses. timm has 1,300 networks, which would take minutes.
_FAMILIES: dict[str, tuple[str, ...]] = {
    "conv_stem.weight": (
        *("mobilenetv3_small_050", "mobilenetv3_small_075", "mobilenetv3_small_100", "mobilenetv3_large_075"),
        *("mobilenetv3_large_100", "tf_mobilenetv3_small_100", "tf_mobilenetv3_large_100", "mobilenetv2_050"),
        *("mobilenetv2_100", "mobilenetv2_140", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2"),
        *("efficientnet_b3", "tf_efficientnet_b0", "tf_efficientnet_b1", "tf_efficientnet_b2", "tf_efficientnet_b3"),
        *("efficientnet_lite0", "efficientnet_lite1", "tf_efficientnet_lite0", "tf_efficientnet_lite1", "mnasnet_100"),
        *("tf_efficientnetv2_b0", "efficientnetv2_rw_t", "tf_efficientnetv2_s", "fbnetc_100", "lcnet_050", "lcnet_100"),
    ),
    "stages.0.blocks.0.conv_dw.weight": (
        *("convnext_atto", "convnext_femto", "convnext_pico", "convnext_nano", "convnext_tiny", "convnext_small"),
        *("convnextv2_atto", "convnextv2_femto", "convnextv2_nano", "convnextv2_tiny"),
    ),
    "layers.0.blocks.0.attn.relative_position_bias_table": (
        "swin_tiny_patch4_window7_224",
        "swin_small_patch4_window7_224",
        "swin_base_patch4_window7_224",
    ),
    "s1.b1.conv1.conv.weight": (
        *("regnetx_002", "regnetx_004", "regnetx_006", "regnetx_008", "regnety_002", "regnety_004", "regnety_006"),
        *("regnety_008", "regnety_016"),
    ),
    "layer1.0.conv1.weight": ("resnet10t", "resnet14t", "resnet18d", "resnet26", "resnet26d", "resnet34d", "resnet50d"),
    "layer1.0.se.fc1.weight": ("seresnet18", "seresnet34", "seresnet50"),
    "stages.0.0.conv1_1x1.conv.weight": ("darknet53", "cspdarknet53"),
}
_TRANSFORMER_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}


def match_timm(state_dict: Mapping[str, Tensor], *, input_size: tuple[int, int, int] | None = None) -> list[Match]:
    """Matches of these weights among timm's usual architectures; none where timm is not installed."""
    names = list(_candidates(state_dict))
    if not names:
        return []
    try:
        timm = import_timm()
    except RequirementMissing:
        return []
    found = []
    for name in names:
        if timm.is_model(name):
            try:
                found.append(match_one(f"timm:{name}", state_dict, stem="default", input_size=input_size))
            except DfadcError:
                continue
    return [match for match in found if match is not None]


def _candidates(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    for key, names in _FAMILIES.items():
        if key in state_dict:
            yield from names
    patches = state_dict.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 4 and "blocks.0.attn.qkv.weight" in state_dict:
        width = _TRANSFORMER_WIDTHS.get(int(patches.shape[0]))
        side = size_of_positions(state_dict) or 224
        for documented in dict.fromkeys((224, side)):
            if width is not None:
                yield f"vit_{width}_patch{patches.shape[2]}_{documented}"
