"""Networks that answer every pixel: their sizes, their logits before they are enlarged, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet50

from dfadc.contract import ImageContract
from dfadc.errors import DfadcError, RequirementMissing
from dfadc.networks.logits import LogitsOf, answering_pixels
from dfadc.networks.network_file import load_network, save_network
from dfadc.networks.zoo import SEGMENTERS
from dfadc.student.build import build_student, list_students
from dfadc.teacher.match import match_architecture

if TYPE_CHECKING:
    from pathlib import Path

#: Neither square nor a multiple of any stride.
ODD = ImageContract((1, 37, 53), 5, task="segmentation")


class Flat(nn.Module):
    """Answers once for an image."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images.mean(dim=(2, 3)))
        return logits


def seven_classes() -> nn.Module:
    """A user's factory that does not ask how many classes there are."""
    return nn.Conv2d(1, 7, 3, padding=1)


@pytest.mark.parametrize("name", [*SEGMENTERS, "compact_unet_9", "lraspp_mobilenet_v3_large"])
def test_takes_odd_sizes_and_answers_every_pixel(name: str) -> None:
    student = build_student(name, ODD)
    images = torch.randn(2, *ODD.input_size)
    with torch.no_grad():
        logits = student.module.eval()(images)
        answers = answering_pixels(student.module, ODD)(images)
    assert logits.shape[:2] == answers.shape[:2] == (2, 5)
    assert logits.shape[2] < answers.shape[2] == 37
    assert logits.shape[3] < answers.shape[3] == 53


def test_logits_are_those_that_torchvision_enlarges() -> None:
    network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5).eval()
    contract = ImageContract((3, 40, 56), 5, task="segmentation")
    images = torch.randn(1, *contract.input_size)
    with torch.no_grad():
        assert LogitsOf(network)(images).shape == (1, 5, 5, 7)
        torch.testing.assert_close(answering_pixels(network, contract)(images), network(images)["out"])


def test_the_papers_student_has_the_teachers_stride() -> None:
    contract = ImageContract((3, 128, 128), 11, task="segmentation")
    student = SEGMENTERS["deeplabv3_mobilenetv2"](contract).to("meta").eval()
    assert student(torch.zeros(1, 3, 128, 128, device="meta")).shape == (1, 11, 16, 16)


def test_a_saved_student_holds_the_network_alone(tmp_path: Path) -> None:
    student = build_student("lraspp_mobilenet_v3_large", ODD)
    path = tmp_path / "student.safetensors"
    save_network(
        path,
        answering_pixels(student.module, ODD),
        architecture=student.architecture,
        stem=student.stem,
        contract=ODD,
    )
    loaded, metadata = load_network(path)
    images = torch.randn(1, *ODD.input_size)
    with torch.no_grad():
        torch.testing.assert_close(LogitsOf(loaded)(images), student.module.eval()(images))
    assert metadata.contract.task == "segmentation"


def test_weights_of_our_segmenters_are_recognised() -> None:
    weights = SEGMENTERS["compact_unet_8"](ODD).state_dict()
    assert [(match.architecture, match.num_classes) for match in match_architecture(weights)] == [("compact_unet_8", 5)]


def test_students_are_listed_by_task() -> None:
    rows = {row.name: row for row in list_students(ODD, ["compact_unet_8", "deeplabv3_mobilenet_v3_large"])}
    assert all(row.num_parameters for row in rows.values())
    listed = [row.name for row in list_students(ImageContract((1, 32, 32), 5, task="segmentation"), ["lenet5"])]
    assert listed == ["lenet5"]


@pytest.mark.parametrize(
    ("name", "contract", "message"),
    [
        ("compact_resnet_4", ODD, r"\(2, 5\) for 2 images, not \(2, K, h, w\)"),
        ("compact_unet_8", ImageContract((1, 32, 32), 5), "one prediction for an image"),
        ("test_segmenters:seven_classes", ODD, "has 7 classes, the teacher 5"),
        ("test_segmenters:Flat", ODD, r"not \(2, K, h, w\): the teacher predicts every pixel"),
        ("compact_unet_256", ODD, r"8\.\.128"),
    ],
)
def test_a_student_of_another_task_or_other_classes_is_refused(
    name: str, contract: ImageContract, message: str
) -> None:
    with pytest.raises(DfadcError, match=message):
        build_student(name, contract)


def test_smp_is_asked_for_where_it_is_missing() -> None:
    try:
        import segmentation_models_pytorch  # noqa: F401
    except ImportError:
        with pytest.raises(RequirementMissing, match="segmentation-models-pytorch is not installed"):
            build_student("smp:Unet:resnet18", ODD)
    else:
        assert build_student("smp:Unet:resnet18", ImageContract((1, 64, 96), 5, task="segmentation")).num_parameters


@pytest.mark.parametrize("name", ["hf-hub:somebody/network", "local-dir:/somewhere", "no_such_network"])
def test_an_encoder_is_one_that_timm_itself_has(name: str) -> None:
    """timm would fetch the first and read the second."""
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(DfadcError, match="unknown architecture"):
        build_student(f"smp:Unet:tu-{name}", ODD)
