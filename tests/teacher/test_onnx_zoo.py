"""Classifiers of torchvision and timm through ONNX files of three opsets: outputs and input gradients come back."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchvision
from onnx_files import export_by_tracing
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from dfadc.contract import ContractFields
from dfadc.teacher.load import load_teacher

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("onnx2fx")

OPSETS = (13, 17, 20)
#: Largest network that is exported here: 90 million parameters are 360 MB a file.
_MOST_PARAMETERS = 90e6
_SIDE = 64
_SIDES = {"alexnet": 224, "inception_v3": 96, "maxvit_t": 224}
TIMM = (
    *("resnet18", "resnetv2_50", "seresnet18", "skresnet18", "ecaresnet26t", "regnety_002", "mobilenetv3_small_050"),
    *("efficientnet_lite0", "tf_efficientnet_b0", "mixnet_s", "ghostnet_100", "hardcorenas_a", "rexnet_100", "dla34"),
    *("convnext_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "mobilevit_xxs", "xcit_nano_12_p16_224"),
    *("poolformer_s12", "edgenext_xx_small", "levit_128s"),
)


def torchvision_names() -> list[str]:
    """Classifiers whose documented number of parameters is within bounds."""
    names = list_models(module=torchvision.models)
    return [name for name in names if next(iter(get_model_weights(name))).meta["num_params"] <= _MOST_PARAMETERS]


def trained(network: nn.Module) -> nn.Module:
    """The network with statistics that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def make_torchvision(name: str) -> tuple[nn.Module, int]:
    side = _SIDES.get(name, _SIDE)
    settings: dict[str, Any] = {}
    if name.startswith("vit_"):
        settings["image_size"] = side
    if name in ("googlenet", "inception_v3"):
        settings = {"aux_logits": False, "init_weights": False}
    torch.manual_seed(0)
    return trained(get_model(name, num_classes=5, **settings)), side


def make_timm(name: str) -> tuple[nn.Module, int]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    network = timm.create_model(name, num_classes=5, **({"img_size": _SIDE} if fixed else {}))
    return trained(network), _SIDE


def comes_back(network: nn.Module, side: int, opset: int, path: Path) -> tuple[float, float]:
    """Differences of outputs and input gradients to the network's own, as shares of their ranges.

    The outputs' is the largest of three draws of images, the gradients' the smallest: where a ReLU's input is within
    1e-7 of zero, rounding alone moves a gradient by 1e-3 of its range, in the network itself too.
    """
    export_by_tracing(network, path, opset=opset, size=(3, side, side))
    teacher = load_teacher(path, fields=ContractFields(input_size=(3, side, side)))
    outputs, gradients = [], []
    for seed in range(3):
        images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
        (logits, gradient), (found, slope) = (_ask(module, images) for module in (network, teacher.module))
        outputs.append(_share(found, logits))
        gradients.append(_share(slope, gradient))
    return max(outputs), min(gradients)


def own_rounding(network: nn.Module, side: int) -> float:
    """Difference between a network's input gradients in float32 and in float64, as the gradients above are drawn."""
    exact = copy.deepcopy(network).double()
    shares = []
    for seed in range(3):
        images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
        shares.append(_share(_ask(network, images)[1].double(), _ask(exact, images.double())[1]))
    return min(shares)


def _ask(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs for images, and the gradient of their squares."""
    leaf = images.clone().requires_grad_()
    logits: Tensor = module(leaf)
    (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
    return logits.detach(), gradient


def _share(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / (wanted.max() - wanted.min()))


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", [*torchvision_names(), *(f"timm:{name}" for name in TIMM)])
def test_a_classifier_comes_back(name: str, opset: int, tmp_path: Path) -> None:
    network, side = make_timm(name[5:]) if name.startswith("timm:") else make_torchvision(name)
    try:
        outputs, gradients = comes_back(network, side, opset, tmp_path / "teacher.onnx")
    except torch.onnx.errors.UnsupportedOperatorError as exc:
        pytest.skip(f"torch exports it from a later opset on: {str(exc)[:120]}")
    assert outputs <= 1e-5
    assert gradients <= 1e-4 or gradients <= own_rounding(network, side)
