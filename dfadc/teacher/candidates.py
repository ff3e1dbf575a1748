"""Candidate architectures of weights: our networks, torchvision's and timm's with about as many parameters."""

# ruff: noqa: C408 -- a table of names
from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import torchvision

from dfadc.errors import RequirementMissing
from dfadc.networks.construct import import_timm, torchvision_classifiers
from dfadc.networks.zoo import NETWORKS, SEGMENTERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

#: Largest difference between a network's parameters and the documented number at which exact shapes are compared;
#: another stem and other channels move them by less.
_TOLERANCE = 0.03
_TOLERANCE_PARAMETERS = 25_000
#: Parameters that the documented heads of 1000 classes have, from SqueezeNet's to MobileNetV3's; VGG's and AlexNet's.
_HEADS = (200_000, 4_500_000)
_LARGE_HEADS = (50_000_000, 130_000_000)
#: Beginning of torchvision's names -> name of its first weights.
_FIRST_NAMES = {
    **dict.fromkeys(("resnet", "resnext", "wide_resnet"), "conv1.weight"),
    **dict.fromkeys(("mobilenet", "efficientnet", "convnext", "swin"), "features.0.0.weight"),
    **dict.fromkeys(("vgg", "alexnet", "squeezenet"), "features.0.weight"),
    "densenet": "features.conv0.weight",
    "googlenet": "conv1.conv.weight",
    "inception": "Conv2d_1a_3x3.conv.weight",
    "mnasnet": "layers.0.weight",
    "shufflenet": "conv1.0.weight",
    "regnet": "stem.0.weight",
    "vit": "conv_proj.weight",
    "maxvit": "stem.0.0.weight",
}
# fmt: off
#: Name of the first weights -> architectures that begin with them, each with its parameters at 1000 classes: those that
#: people use, of timm's 1,300. Members with the shapes of another but other padding (``tf_``) stand beside it.
_TIMM: dict[str, dict[str, int]] = {
    "conv_stem.weight": dict(
        mobilenetv3_small_050=1_593_224, mobilenetv3_small_075=2_041_872, mobilenetv3_small_100=2_542_856,
        mobilenetv3_large_075=3_993_528, mobilenetv3_large_100=5_483_032, tf_mobilenetv3_small_075=2_041_872,
        tf_mobilenetv3_small_100=2_542_856, tf_mobilenetv3_large_075=3_993_528, tf_mobilenetv3_large_100=5_483_032,
        mobilenetv2_035=1_677_128, mobilenetv2_050=1_968_680, mobilenetv2_075=2_636_424, mobilenetv2_100=3_504_872,
        mobilenetv2_110d=4_516_520, mobilenetv2_120d=5_831_144, mobilenetv2_140=6_108_776, efficientnet_b0=5_288_548,
        efficientnet_b1=7_794_184, efficientnet_b2=9_109_994, efficientnet_b3=12_233_232, efficientnet_b4=19_341_616,
        tf_efficientnet_b0=5_288_548, tf_efficientnet_b1=7_794_184, tf_efficientnet_b2=9_109_994,
        tf_efficientnet_b3=12_233_232, tf_efficientnet_b4=19_341_616, efficientnet_es=5_438_392,
        efficientnet_em=6_899_496, tf_efficientnet_es=5_438_392, efficientnet_lite0=4_652_008,
        efficientnet_lite1=5_416_680, efficientnet_lite2=6_092_072, tf_efficientnet_lite0=4_652_008,
        tf_efficientnet_lite1=5_416_680, tf_efficientnet_lite2=6_092_072, tf_efficientnetv2_b0=7_139_704,
        tf_efficientnetv2_b1=8_141_052, efficientnetv2_rw_t=13_649_388, efficientnetv2_rw_s=23_941_296,
        efficientnetv2_s=21_458_488, tf_efficientnetv2_s=21_458_488, mnasnet_small=2_030_264, mnasnet_100=4_383_312,
        semnasnet_075=2_912_278, semnasnet_100=3_887_038, fbnetc_100=5_572_200, lcnet_035=1_644_370,
        lcnet_050=1_880_856, lcnet_075=2_358_288, lcnet_100=2_953_800, tinynet_a=6_187_972, tinynet_b=3_730_562,
        tinynet_c=2_457_234, tinynet_d=2_338_446, tinynet_e=2_042_972, ghostnet_050=2_587_292, ghostnet_100=5_182_508,
        mixnet_s=4_134_606, mixnet_m=5_014_382, hardcorenas_a=5_260_232, spnasnet_100=4_421_616,
        mobilenetv4_conv_small=3_774_024, mobilenetv4_conv_medium=9_715_512,
    ),
    "stem.conv.weight": dict(
        rexnet_100=4_796_873, rexnet_130=7_557_091, regnetx_002=2_684_792, regnetx_004=5_157_512,
        regnetx_006=6_196_040, regnetx_008=7_259_656, regnetx_016=9_190_136, regnetx_032=15_296_552,
        regnety_002=3_162_996, regnety_004=4_344_144, regnety_006=6_055_160, regnety_008=6_263_168,
        regnety_016=11_202_430, regnety_032=19_436_338, mobilevit_xxs=1_272_024, mobilevit_xs=2_317_848,
        mobilevit_s=5_578_632, poolformer_s12=11_915_176, nf_resnet50=25_557_032,
    ),
    "stem.0.weight": dict(
        convnext_atto=3_695_520, convnext_femto=5_217_784, convnext_pico=9_045_672, convnext_nano=15_593_560,
        convnext_tiny=28_589_128, convnext_small=50_223_688, convnextv2_atto=3_708_400, convnextv2_femto=5_233_240,
        convnextv2_pico=9_066_280, convnextv2_nano=15_623_800, convnextv2_tiny=28_635_496,
        edgenext_xx_small=1_327_216, edgenext_x_small=2_336_804, edgenext_small=5_586_832, selecsls42b=32_458_248,
    ),
    "patch_embed.proj.weight": dict(
        swin_tiny_patch4_window7_224=28_288_354, swin_small_patch4_window7_224=49_606_258,
        swin_base_patch4_window7_224=87_768_224, pvt_v2_b0=3_666_760, pvt_v2_b1=14_009_000,
    ),
    "conv1.0.weight": dict(
        resnet10t=5_435_488, resnet14t=10_081_632, resnet18d=11_708_744, resnet26d=16_014_408, resnet26t=16_011_872,
        resnet34d=21_816_904, resnet50d=25_576_264, resnet101d=44_568_392, resnetrs50=35_691_912,
        ecaresnet26t=16_011_916, resnest14d=10_611_688, resnest26d=17_069_448, resnest50d=27_483_240,
    ),
    "conv1.weight": dict(
        resnet26=15_995_176, seresnet18=11_779_624, seresnet34=21_960_416, seresnet50=28_088_024,
        res2net50_26w_4s=25_699_120, hrnet_w18_small=13_187_464,
    ),
    "stem.conv1.conv.weight": dict(
        resnext26ts=10_297_952, cspdarknet53=27_642_184, darknet53=41_609_928, cspresnet50=21_616_168,
    ),
    "base_layer.0.weight": dict(dla34=15_742_104, dla60=22_036_632),
    "stem.conv_kxk.conv.weight": dict(repvgg_a0=9_108_968, repvgg_b0=15_817_960),
    "stem.0.conv.weight": dict(vovnet39a=22_600_296, ese_vovnet19b_dw=6_543_080, xception41=26_969_560),
    "stem.conv_kxk.0.conv.weight": dict(mobileone_s0=5_293_272, mobileone_s1=4_825_192),
    "stem.0.conv_kxk.0.conv.weight": dict(fastvit_t8=4_026_232),
    "stem.conv1.weight": dict(efficientformer_l1=12_289_928),
    "stem.conv1.linear.weight": dict(levit_128s=7_777_058),
    "stem.proj.weight": dict(mixer_s16_224=18_528_264, mixer_b16_224=59_880_472),
    "patch_embed.conv1.conv.weight": dict(tiny_vit_5m_224=5_392_764),
    "pos_embed1": dict(visformer_tiny=10_321_368),
    "features.0.conv.weight": dict(inception_v4=42_679_816),
    "cls_token": dict(
        vit_tiny_patch16_224=5_717_416, vit_small_patch16_224=22_050_664, vit_small_patch32_224=22_878_952,
        vit_base_patch16_224=86_567_656, vit_base_patch32_224=88_224_232, vit_large_patch16_224=304_326_632,
        deit_tiny_distilled_patch16_224=5_910_800, deit_small_distilled_patch16_224=22_436_432,
        deit3_small_patch16_224=22_059_496, cait_xxs24_224=11_956_264, beit_base_patch16_224=86_530_984,
    ),
}
# fmt: on
#: Architectures that are named where none fits.
_NEAREST = 3


def own_candidates(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    """Our own networks; the numbers in the names of the two families are read off the weights."""
    families = ("wrn_", "compact_resnet_", "compact_unet_")
    yield from (name for name in (*NETWORKS, *SEGMENTERS) if not name.startswith(families))
    stem = state_dict.get("stem.0.weight")
    if stem is not None and "stages.0.conv1.weight" in state_dict and 4 <= stem.shape[0] <= 256:
        yield f"compact_resnet_{stem.shape[0]}"
    if stem is not None and "up2.0.weight" in state_dict and 8 <= stem.shape[0] <= 128:
        yield f"compact_unet_{stem.shape[0]}"
    widened = state_dict.get("block1.layer.0.conv1.weight")
    if widened is not None and widened.ndim == 4 and widened.shape[0] >= 16:
        blocks = sum(key.startswith("block1.layer.") and key.endswith(".conv1.weight") for key in state_dict)
        yield f"wrn_{6 * blocks + 4}_{widened.shape[0] // 16}"


def torchvision_candidates(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    """Classifiers whose documented number of parameters is near."""
    totals = _totals_of(state_dict)
    for name, documented in _families_of(state_dict):
        # The documented number counts Inception's training-only classifier, GoogLeNet's not; compare these two always.
        if name in ("googlenet", "inception_v3") or _is_near(documented, totals):
            yield f"torchvision:{name}"


def timm_candidates(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Timm's usual architectures with about as many parameters; none where timm is not installed."""
    totals = _totals_of(state_dict)
    members = [member for first, each in _TIMM.items() if first in state_dict for member in each.items()]
    names = [name for name, documented in members if _is_near(documented, totals)]
    with contextlib.suppress(RequirementMissing):
        return [f"timm:{name}" for name in names if import_timm().is_model(name)]
    return []


def candidates_of_other_head(state_dict: Mapping[str, Tensor]) -> Iterator[str]:
    """Classifiers whose documented number of parameters leaves room for their own head alone, beside these weights."""
    body = sum(
        tensor.numel()
        for key, tensor in learned_of(state_dict).items()
        if key.partition(".")[0] not in ("fc", "classifier", "head", "heads")
    )
    for name, documented in _families_of(state_dict):
        least, most = _LARGE_HEADS if name.startswith(("vgg", "alexnet")) else _HEADS
        if least <= documented - body <= most:
            yield f"torchvision:{name}"


def nearest_names(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Torchvision's classifiers whose weights begin alike, the nearest in their number of parameters first."""
    totals = _totals_of(state_dict)
    distances = [
        (min(abs(documented - total) for total in totals), f"torchvision:{name}")
        for name, documented in _families_of(state_dict)
    ]
    return [name for _, name in sorted(distances)[:_NEAREST]]


def _totals_of(state_dict: Mapping[str, Tensor]) -> set[int]:
    """Parameters that these weights would have with 1000 classes, whichever layer the classes sit in."""
    learned = learned_of(state_dict)
    total = sum(tensor.numel() for tensor in learned.values())
    totals = {total}
    for key, tensor in learned.items():
        is_head = tensor.ndim == 2 or (tensor.ndim == 4 and tensor.shape[2:] == (1, 1))
        if is_head and (bias := learned.get(key.removesuffix("weight") + "bias")) is not None:
            rows = math.prod(tensor.shape[1:]) + 1
            totals.add(total + (1000 - bias.numel()) * rows)
    return totals


def _is_near(documented: int, totals: set[int]) -> bool:
    margin = _TOLERANCE * documented + _TOLERANCE_PARAMETERS
    return any(abs(documented - total) <= margin for total in totals)


def _families_of(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Torchvision's classifiers whose first weights have a name of these, and their documented parameters."""
    for name in torchvision_classifiers():
        first = next((key for family, key in _FIRST_NAMES.items() if name.startswith(family)), None)
        if first is None or first in state_dict:
            yield name, int(next(iter(torchvision.models.get_model_weights(name))).meta["num_params"])


def learned_of(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without running statistics and integers."""
    return {
        key: tensor
        for key, tensor in state_dict.items()
        if tensor.is_floating_point() and not key.endswith(("running_mean", "running_var"))
    }
