"""Arguments that training frameworks save beside the weights: which become the contract, and which do not."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torchvision.models import mobilenet_v3_small, resnet18, squeezenet1_1

from dfadc.contract import ContractFields
from dfadc.teacher.load import Teacher, load_teacher
from dfadc.teacher.training_arguments import read_training_arguments

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return dict(squeezenet1_1(num_classes=3).state_dict())


def load(value: Any, folder: Path, **fields: Any) -> Teacher:
    torch.save(value, folder / "t.pt")
    return load_teacher(folder / "t.pt", fields=ContractFields(**fields))


def test_torchvisions_reference_states_everything(weights: dict[str, Tensor], tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        model="squeezenet1_1",
        data_path="/data",
        val_resize_size=80,
        val_crop_size=64,
        train_crop_size=48,
        interpolation="bicubic",
    )
    teacher = load({"model": weights, "args": arguments}, tmp_path)
    assert teacher.contract.input_size == (3, 64, 64)
    assert (teacher.contract.mean, teacher.contract.std) == IMAGENET
    assert teacher.contract.preprocessing is not None
    assert teacher.contract.preprocessing.crop_share == 0.8
    assert teacher.contract.preprocessing.interpolation == "bicubic"
    assert teacher.contract_sources["input_size"] == "arguments of torchvision's reference script (args)"


def test_timms_script_states_its_model_and_the_rest_is_its_default(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("mobilenetv3_small_050", num_classes=3)
    arguments = {"model": "mobilenetv3_small_050", "num_classes": 3, "in_chans": None, "gp": None, "crop_pct": None}
    unset = dict.fromkeys(("img_size", "input_size", "mean", "std", "interpolation"))
    value = {"arch": "mobilenetv3_small_050", "version": 2, "state_dict": network.state_dict()}
    teacher = load(value | {"args": argparse.Namespace(**arguments, **unset)}, tmp_path)
    documented = timm.get_pretrained_cfg("mobilenetv3_small_050")
    assert teacher.architecture == "timm:mobilenetv3_small_050"
    assert teacher.contract.input_size == documented.input_size
    assert teacher.contract.mean == documented.mean
    assert "timm's training script" in teacher.contract_sources["mean"]
    set_ = unset | {"img_size": 96, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    teacher = load(value | {"args": argparse.Namespace(**arguments | {"crop_pct": 0.9}, **set_)}, tmp_path)
    assert teacher.contract.input_size == (3, 96, 96)
    assert teacher.contract.mean == (0.5, 0.5, 0.5)
    assert teacher.contract.preprocessing is not None
    assert teacher.contract.preprocessing.crop_share == 0.9


def test_timm_wins_over_torchvision_where_its_script_wrote_the_file(tmp_path: Path) -> None:
    """Both have a resnet18 of these names and shapes."""
    pytest.importorskip("timm")
    arguments = argparse.Namespace(model="resnet18", crop_pct=None, in_chans=None, img_size=64)
    value = {"state_dict": resnet18(num_classes=3).state_dict(), "args": arguments}
    assert load(value, tmp_path).architecture == "timm:resnet18"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"img_size": 40}, {"input_size": (3, 40, 40)}),
        ({"input_size": [3, 40, 48]}, {"input_size": (3, 40, 48)}),
        ({"input_size": (40, 48, 3)}, {"input_size": (3, 40, 48)}),
        ({"image_size": [40, 48]}, {"input_size": (3, 40, 48)}),
        ({"data": {"transform": {"resolution": 40}}}, {}),
        ({"data": {"resolution": 40}}, {"input_size": (3, 40, 40)}),
        ({"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}, {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2)}),
        ({"mean": [102.0, 127.5, 153.0], "std": [51.0] * 3}, {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2)}),
        ({"mean": 0.5, "std": 0.2}, {}),
        ({"mean": [0.5], "std": [0.2]}, {}),
        ({"mean": [0.4, 0.5, 0.6]}, {}),
        ({"classes": ["a", "b", "c"]}, {"class_names": ("a", "b", "c")}),
        ({"class_to_idx": {"b": 1, "a": 0, "c": 2}}, {"class_names": ("a", "b", "c")}),
        ({"classes": ["a", "b"]}, {}),
        ({"classes": 3}, {}),
        ({"img_size": 100_000}, {}),
        ({"img_size": True}, {}),
    ],
)
@pytest.mark.parametrize("key", ["hyper_parameters", "args", "config", "top"])
def test_usual_names_become_the_contract_and_odd_values_do_not(
    key: str, arguments: dict[str, Any], expected: dict[str, Any], weights: dict[str, Tensor]
) -> None:
    read = read_training_arguments({"state_dict": weights} | (arguments if key == "top" else {key: arguments}))
    found = ContractFields() if read is None else read.to_fields(channels=3, num_classes=3)
    stated = {name: getattr(found, name) for name in ("input_size", "mean", "std", "class_names")}
    assert {name: value for name, value in stated.items() if value is not None} == expected


def test_flags_and_weights_win_over_arguments(weights: dict[str, Tensor], tmp_path: Path) -> None:
    value = {
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{key}": tensor for key, tensor in weights.items()},
        "hyper_parameters": {"model_name": "resnet18", "num_classes": 10, "img_size": 64, "in_channels": 1},
    }
    teacher = load(value, tmp_path)
    assert teacher.architecture == "torchvision:squeezenet1_1"
    assert teacher.contract.num_classes == 3
    assert teacher.contract.input_size == (3, 64, 64)
    assert teacher.contract_sources["input_size"] == "arguments of PyTorch Lightning (hyper_parameters)"
    assert load(value, tmp_path, input_size=(3, 48, 48)).contract.input_size == (3, 48, 48)


def test_arguments_choose_among_architectures_that_fit(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("tf_efficientnet_lite0", num_classes=3)
    teacher = load({"arch": "tf_efficientnet_lite0", "net": network.state_dict(), "img_size": 64}, tmp_path)
    assert teacher.architecture == "timm:tf_efficientnet_lite0"


def test_a_file_cannot_name_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.chdir(tmp_path)
    value = {
        "arch": "evil.py:factory",
        "model_name": "evil:factory",
        "net": mobilenet_v3_small(num_classes=3).state_dict(),
    }
    assert load(value, tmp_path, input_size=(3, 32, 32)).architecture == "torchvision:mobilenet_v3_small"
