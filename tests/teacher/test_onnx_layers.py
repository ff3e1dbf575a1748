"""Layers of ONNX graphs: which nodes become layers again, and students that inherit from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from onnx_files import export, export_by_tracing
from torch import Tensor, nn

from dfadc.contract import ContractFields, ImageContract
from dfadc.distillation.images.procedural import draw_procedural
from dfadc.networks.names import build_architecture
from dfadc.student.build import build_student
from dfadc.student.inherit import corresponding_layers, find_copy, inherit
from dfadc.teacher.load import load_teacher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dfadc.teacher.load import Teacher

SIZE = (1, 28, 28)
CONTRACT = ImageContract(SIZE, 10)
FIELDS = ContractFields(mean=(0.3,), std=(0.3,))


class Odd(nn.Module):
    """Convolution that pads one side more, one whose weights are computed, and a product without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 2, stride=2), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 5, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.first(nn.functional.pad(images, (0, 1, 0, 1))).relu()
        weight = self.second.weight * maps.mean().sigmoid()
        logits: Tensor = self.head(nn.functional.conv2d(maps, weight).mean(dim=(2, 3)))
        return logits


def load(path: Path) -> Teacher:
    return load_teacher(path, fields=FIELDS)


def with_statistics(network: nn.Module) -> nn.Module:
    """The network with batch norms that have seen images, whose scales and shifts differ."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        for _ in range(60):
            network(torch.randn(16, *SIZE))
    return network.eval()


def with_dead_channels(network: nn.Module) -> nn.Module:
    """The network, in which the second half of all channels between layers is 0."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            for axis, size in enumerate(tensor.shape[:2]):
                if size > 10 and not name.endswith("running_var"):
                    tensor.narrow(axis, size // 2, size - size // 2).zero_()
    return network


@pytest.mark.parametrize("exporter", [export, export_by_tracing])
def test_the_student_with_the_channels_that_live_computes_the_same(
    exporter: Callable[..., Path], tmp_path: Path
) -> None:
    """Exporters fold batch norms, call layers by other names, put branches in another order, and drop zero biases."""
    network = with_dead_channels(with_statistics(build_architecture("compact_resnet_32", CONTRACT).module))
    teacher = load(exporter(network, tmp_path / "teacher.onnx", opset=18, size=SIZE))
    assert not teacher.batch_norms
    student = inherit(build_student("compact_resnet_16", teacher.contract), teacher, "on")
    assert student.copy is not None
    assert len(student.copy.pairing.folded) == 10
    assert len(corresponding_layers(student.module, teacher.module, student.copy)) == 10
    images = draw_procedural(64, teacher.contract, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(student.module.eval()(images), network(images), rtol=1e-3, atol=1e-4)


def test_without_batch_norm_too(tmp_path: Path) -> None:
    teacher = load(export(build_architecture("lenet5", CONTRACT).module, tmp_path / "teacher.onnx", size=SIZE))
    student = inherit(build_student("lenet5_half", teacher.contract), teacher, "on")
    assert student.is_inherited
    assert len(corresponding_layers(student.module, teacher.module, student.copy)) == 4


def test_what_is_computed_otherwise_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Odd().eval()
    teacher = load(export(network, tmp_path / "odd.onnx", size=SIZE))
    layers = [type(layer) for layer in teacher.module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert layers == [nn.Linear]
    images = torch.randn(3, *SIZE)
    torch.testing.assert_close(teacher.logits(images, in_fp32=True), network(images), rtol=1e-4, atol=1e-5)
    reason = find_copy(Odd(), teacher.module, images)
    assert isinstance(reason, str)
