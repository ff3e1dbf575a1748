from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError
from dfadc.networks.flops import count_flops, count_parameters
from dfadc.networks.names import build_architecture, documented_contract, resolve_architecture
from dfadc.networks.stems import first_convolution
from dfadc.student import build
from dfadc.student.build import build_student

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ImageContract((1, 28, 28), 5)
LARGE = ImageContract((3, 224, 224), 5)


def _last_side(module: nn.Module, contract: ImageContract) -> int:
    """Side of the last maps that a convolution gives."""
    sides: list[int] = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda _layer, _inputs, output: sides.append(output.shape[-1]) if output.shape[-1] > 1 else None
            )
    with torch.no_grad():
        module.eval()(torch.zeros(1, *contract.input_size))
    return sides[-1]


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv2",
        "mobilenet_v3_small",
        "resnet18",
        "efficientnet_b0",
        "shufflenet_v2_x0_5",
        "densenet121",
        "regnet_x_400mf",
    ],
)
def test_small_images_get_a_small_stem(name: str) -> None:
    student = build_student(name, SMALL)
    assert student.stem == "small"
    assert any("total stride 32 -> 8" in note for note in student.notes)
    # 28 / 8 = 3.5: padded convolutions round up, DenseNet's pooling down.
    assert _last_side(student.module, SMALL) in (3, 4)
    first = first_convolution(student.module)
    assert first is not None
    assert first[1].in_channels == 1


def test_large_images_keep_the_library_network() -> None:
    student = build_student("mobilenetv2", LARGE)
    assert student.architecture == "torchvision:mobilenet_v2"
    assert student.stem == "default"
    assert student.notes == ()
    assert student.module.training
    assert _last_side(student.module, LARGE) == 7


def test_stem_can_be_insisted_on() -> None:
    assert build_student("resnet18", SMALL, stem="default").stem == "default"
    own = build_student("lenet5", SMALL, stem="small")
    assert own.stem == "default"
    assert any("no small stem known" in note for note in own.notes)
    with pytest.raises(DfadcError, match="unknown stem 'tiny'"):
        build_student("lenet5", SMALL, stem="tiny")


@pytest.mark.parametrize(
    ("name", "stem"),
    [("vit_b_16", "auto"), ("torchvision:inception_v3", "default"), ("alexnet", "default"), ("maxvit_t", "auto")],
)
def test_networks_that_cannot_take_the_size_say_so(name: str, stem: str) -> None:
    with pytest.raises(DfadcError, match="1x28x28"):
        build_student(name, SMALL, stem=stem)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("mobilenetv4", "mobilenetv2"),
        ("torchvision:resnet19", "resnet18"),
        ("lenet", "lenet5"),
        ("timm:resnet19", "resnet18"),
    ],
)
def test_unknown_names_bring_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(DfadcError, match="unknown architecture") as caught:
        resolve_architecture(wrong)
    assert right in caught.value.hint


def test_factories_get_the_keywords_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from torch import nn\n"
        "def tiny(num_classes, in_chans):\n"
        "    return nn.Sequential(nn.Conv2d(in_chans, 4, 3, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(4, num_classes))\n"
        "def whole(contract):\n"
        "    return tiny(contract.num_classes, contract.channels)\n"
        "def wrong():\n"
        "    return 3\n"
    )
    (tmp_path / "my_factories.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for factory in ("tiny", "whole"):
        student = build_student(f"my_factories:{factory}", SMALL)
        assert student.module(torch.zeros(2, 1, 28, 28)).shape == (2, 5)
    with pytest.raises(DfadcError, match="not a torch"):
        build_student("my_factories:wrong", SMALL)
    with pytest.raises(DfadcError, match="no callable 'missing'"):
        build_student("my_factories:missing", SMALL)
    with pytest.raises(DfadcError, match="cannot import"):
        build_student("no_such_module_here:tiny", SMALL)


def test_timm_students_take_channels_and_size() -> None:
    pytest.importorskip("timm")
    student = build_student("timm:mobilenetv3_small_050", SMALL)
    assert student.architecture == "timm:mobilenetv3_small_050"
    assert student.stem == "small"
    assert documented_contract("timm:mobilenetv3_small_050").input_size == (3, 224, 224)


def test_starts_from_weights(tmp_path: Path) -> None:
    first = build_student("lenet5_half", SMALL)
    torch.save(first.module.state_dict(), tmp_path / "weights.pt")
    second = build_student("lenet5_half", SMALL, weights=tmp_path / "weights.pt")
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], tensor)
    with pytest.raises(DfadcError, match="do not fit lenet5"):
        build_student("lenet5", SMALL, weights=tmp_path / "weights.pt")


def test_list_has_every_network_and_survives_those_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three classifiers stand for all of torchvision's, which take ten seconds.
    monkeypatch.setattr(build, "torchvision_classifiers", lambda: ("resnet18", "vit_b_16", "regnet_x_400mf"))
    rows = {row.name: row for row in build.list_students(SMALL)}
    assert rows["torchvision:vit_b_16"].num_parameters is None
    assert "28" in rows["torchvision:vit_b_16"].reason
    assert rows["torchvision:resnet18"].stem == "small"
    for name in ("torchvision:resnet18", "torchvision:regnet_x_400mf", "wrn_16_1"):
        built = build_architecture(name, SMALL, stem=rows[name].stem)
        assert rows[name].num_parameters == count_parameters(built.module)
        assert rows[name].flops == count_flops(built.module, SMALL.input_size)


@pytest.mark.slow
def test_every_torchvision_classifier_is_listed() -> None:
    rows = build.list_students(LARGE)
    assert len(rows) > 80
    assert [row.name for row in rows if row.reason] == ["lenet5", "lenet5_half"]


def test_documentation_is_read_without_downloading() -> None:
    documented = documented_contract("torchvision:mobilenet_v2")
    assert documented.input_size == (3, 224, 224)
    assert documented.mean == (0.485, 0.456, 0.406)
    assert documented.num_classes == 1000
    assert documented_contract("lenet5").input_size is None
