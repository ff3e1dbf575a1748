"""ONNX teachers in other number formats: quantised, and half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx_files import (
    SIZE,
    export,
    of_runtime,
    saved,
    small_network,
)

from dfadc.teacher.load import load_teacher

if TYPE_CHECKING:
    from pathlib import Path


pytest.importorskip("onnx2fx")


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_quantised_graph_passes_gradients(per_channel: bool, tmp_path: Path) -> None:
    """As ONNX Runtime quantises: the gradients are about those of the float network."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    path = export(small_network(), tmp_path / "float.onnx")

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            name = onnx.load(path).graph.input[0].name
            self.batches = iter([{name: np.random.default_rng(0).random((8, *SIZE), np.float32)}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    quantised = tmp_path / "teacher.onnx"
    kind = QuantType.QInt8 if per_channel else QuantType.QUInt8
    quantize_static(
        path, quantised, Images(), quant_format=QuantFormat.QDQ, per_channel=per_channel, activation_type=kind
    )
    teacher = load_teacher(quantised)
    assert any("rounding passes gradients" in note for note in teacher.notes)
    images = torch.rand(4, *SIZE, requires_grad=True)
    logits = teacher.logits(images)
    span = float((logits.max() - logits.min()).detach())
    torch.testing.assert_close(logits.detach(), of_runtime(quantised, images.detach()), rtol=0, atol=0.05 * span)
    assert not torch.equal(logits, small_network()(images))
    found, wanted = (
        torch.autograd.grad(each.square().sum(), images)[0].flatten() for each in (logits, small_network()(images))
    )
    assert float(torch.cosine_similarity(found, wanted, dim=0)) > 0.9


def test_a_graph_of_half_precision_is_widened(tmp_path: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    for keeps_io in (True, False):
        model = convert_float_to_float16(
            onnx.load(export(small_network(), tmp_path / "f.onnx")), keep_io_types=keeps_io
        )
        teacher = load_teacher(saved(model, tmp_path))
        images = torch.rand(4, *SIZE)
        torch.testing.assert_close(teacher.logits(images), small_network()(images), rtol=1e-2, atol=1e-2)
        assert any("FLOAT16 values are computed in float32" in note for note in teacher.notes)
