"""Batch norms after a linear layer are folded into its weights; where that would change another reader, they stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import pytest
import torch
from torch import Tensor, nn

from dfadc.contract import ImageContract
from exporters.to_onnx.file import operator_counts
from exporters.to_onnx.fp32 import export_onnx

if TYPE_CHECKING:
    from pathlib import Path

CONTRACT = ImageContract((3, 8, 8), 5, mean=(0.5,) * 3, std=(0.5,) * 3)


class Tokens(nn.Module):
    """Four tokens of 48 channels, a linear layer, its batch norm, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear, self.norm, self.head = nn.Linear(48, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 5)
        for value in (self.norm.weight.data, self.norm.bias.data, self.norm.running_mean, self.norm.running_var):
            assert value is not None
            value.uniform_(0.5, 1.5)

    def forward(self, images: Tensor) -> Tensor:
        products = self.linear(images.reshape(len(images), 4, 48))
        if self.kind == "transposed":
            tokens = self.norm(products.transpose(1, 2)).transpose(1, 2)
        else:
            tokens = self.norm(products.flatten(0, 1)).reshape_as(products)
        if self.kind == "read twice":
            tokens = tokens + products
        if self.kind == "used twice":
            again = self.linear(tokens.repeat(1, 1, 8))
            tokens = tokens + again.relu()
        logits: Tensor = self.head(tokens.relu().mean(1))
        return logits


@pytest.mark.parametrize(("kind", "left"), [("flattened", 0), ("transposed", 0), ("used twice", 0), ("read twice", 1)])
def test_batch_norms_of_linear_layers(kind: str, left: int, tmp_path: Path) -> None:
    """The export compares the logits with the module's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Tokens(kind).eval()
    path = tmp_path / "student.onnx"
    export_onnx(network, path, contract=CONTRACT, metadata={})
    model = onnx.load(path)
    assert operator_counts(model).get("BatchNormalization", 0) == left
    read = {name for node in model.graph.node for name in node.input}
    assert read.issuperset(tensor.name for tensor in model.graph.initializer)
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
