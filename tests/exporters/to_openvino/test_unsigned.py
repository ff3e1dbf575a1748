"""INT8 graphs whose activations go through a Concat: OpenVINO computes what ONNX Runtime does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from dfadc import ImageContract
from dfadc.verification.agreement import compare
from exporters.exporter import BuildSettings, ExportRequest
from exporters.sessions.onnx_runtime import OnnxRuntimeSession
from exporters.sessions.openvino_session import OpenVinoSession
from exporters.to_onnx.exporter import DerivedOnnxExporter
from exporters.to_onnx.fp32 import export_onnx
from exporters.to_openvino.exporter import OpenVinoExporter

if TYPE_CHECKING:
    from pathlib import Path

CONTRACT = ImageContract((3, 16, 16), 10, mean=(0.5,) * 3, std=(0.5,) * 3)


class TwoBranches(nn.Module):
    """Two convolutions, joined, and a third; the kinds of networks that join differ in what lies between."""

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 1), nn.Conv2d(3, 32, 3, padding=1)
        self.before, self.after = before, after
        self.third = nn.Conv2d(64, 32, 1)
        self.classes = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        joined = torch.cat([self.before(self.first(images)), self.before(self.second(images))], 1)
        logits: Tensor = self.classes(self.third(self.after(joined)).relu().mean((2, 3)))
        return logits


KINDS = {
    "fire": (nn.ReLU(), nn.Identity()),
    "dense": (nn.Identity(), nn.ReLU()),
    "linear": (nn.Identity(), nn.Identity()),
    "pooled": (nn.MaxPool2d(2), nn.AvgPool2d(2)),
    "shuffled": (nn.Identity(), nn.ChannelShuffle(2)),
    "clipped": (nn.ReLU6(), nn.MaxPool2d(2)),
    "gated": (nn.Sigmoid(), nn.Hardswish()),
    "squashed": (nn.Identity(), nn.Sigmoid()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_concat_keeps_the_steps_of_int8(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install openvino")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TwoBranches(*KINDS[kind]).eval()
        images = (torch.randn(64, *CONTRACT.input_size) + 2 * torch.randn(64, 3, 1, 1)).numpy()
        nn.init.normal_(network.classes.weight)
    fp32, int8, ir = (tmp_path / name for name in ("student.onnx", "student.int8.onnx", "student.int8.openvino.xml"))
    export_onnx(network, fp32, contract=CONTRACT, metadata={})
    settings = BuildSettings(calibration=images, calibrator="minmax", keep_fp32=())
    DerivedOnnxExporter().export(fp32, int8, ExportRequest.parse("onnx:int8"), settings)
    OpenVinoExporter().export(int8, ir, ExportRequest.parse("openvino:int8"), settings)
    with OnnxRuntimeSession(int8, threads=1) as reference, OpenVinoSession(ir, threads=1) as session:
        assert compare(session.run(images), reference.run(images)).sqnr_db > 35
