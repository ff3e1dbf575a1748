"""Teachers of several labels an image, as files that others wrote: how they are seen, and what is refused."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
import torchvision
from command_line import run_command
from torch import Tensor, nn

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError
from dfadc.teacher.load import load_teacher

if TYPE_CHECKING:
    from pathlib import Path

SIZE = (3, 32, 32)
LABELS = ContractFields(input_size=SIZE, task="multilabel")


def network(*last: nn.Module, outputs: int = 7) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, outputs), *last).eval()


def saved(module: nn.Module, path: Path) -> Path:
    """A whole network of torch's own layers, which needs no trust."""
    torch.save(module, path)
    return path


def test_raw_logits_of_labels_need_one_word(tmp_path: Path) -> None:
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=7).eval()
    path = tmp_path / "teacher.pt"
    torch.save(resnet.state_dict(), path)
    flags = ("--input-size", "3x64x64")
    assert "classification" in run_command("inspect", path, *flags).out
    outcome = run_command("inspect", path, *flags, "--task", "multilabel")
    assert outcome.code == 0
    assert "finite logits of 7 labels (multilabel)" in outcome.out
    path.with_suffix(".toml").write_text('[contract]\ninput_size = [3, 64, 64]\ntask = "multilabel"\n')
    teacher = load_teacher(path)
    assert (teacher.contract.task, teacher.contract.num_classes) == ("multilabel", 7)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(teacher.logits(images), resnet(images))


def test_a_sigmoid_for_each_output_is_seen_and_said(tmp_path: Path) -> None:
    teacher = load_teacher(saved(network(nn.Sigmoid()), tmp_path / "t.pt"), fields=ContractFields(input_size=SIZE))
    assert teacher.contract.task == "multilabel"
    assert teacher.contract_sources["task"] == "a sigmoid for each output"
    assert any("--task classification" in warning for warning in teacher.warnings)
    images = torch.rand(4, *SIZE)
    torch.testing.assert_close(teacher.logits(images), network()(images))


def test_a_keras_file_that_ends_in_sigmoids(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    os.environ["KERAS_BACKEND"] = "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras = pytest.importorskip("keras")
        with keras.device("cpu"):
            layers = [keras.layers.Conv2D(4, 3), keras.layers.GlobalAveragePooling2D()]
            model = keras.Sequential([keras.Input((16, 16, 3)), *layers, keras.layers.Dense(3, activation="sigmoid")])
        model.save(tmp_path / "teacher.keras")
    teacher = load_teacher(tmp_path / "teacher.keras")
    assert teacher.contract.task == "multilabel"
    images = torch.rand(2, 3, 16, 16)
    with keras.device("cpu"), torch.no_grad():
        expected: Tensor = model(images.permute(0, 2, 3, 1))
    torch.testing.assert_close(teacher.logits(images).sigmoid(), expected)


@pytest.mark.parametrize(
    ("module", "fields", "says", "hint"),
    [
        (network(nn.Softmax(1)), LABELS, "ends in a softmax", "leave --task multilabel away"),
        (network(nn.LogSoftmax(1)), LABELS, "ends in a softmax", "leave --task multilabel away"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), LABELS, "every pixel 4 labels", "--task segmentation"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid()),
            ContractFields(input_size=SIZE),
            "every pixel 4 labels",
            "--task segmentation",
        ),
        (network(outputs=1), LABELS, "one output", "--num-classes 2"),
        (network(outputs=1), ContractFields(SIZE, 2, task="multilabel"), "yes-or-no question", "--num-classes 2"),
    ],
)
def test_what_cannot_be_labels_is_refused_with_the_way(
    module: nn.Module, fields: ContractFields, says: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(DfadcError, match=says) as caught:
        load_teacher(saved(module, tmp_path / "t.pt"), fields=fields)
    assert hint in caught.value.hint
