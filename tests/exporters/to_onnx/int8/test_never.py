"""Nodes that no INT8 graph quantises: batch norms, layer norms and the sums they read, softmaxes over one element."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from exporters.to_onnx.file import load_onnx
from exporters.to_onnx.fp32 import export_onnx
from exporters.to_onnx.int8.presets import PRESETS
from exporters.to_onnx.int8.quantise import quantise

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from dfadc.contract import ImageContract


class OneToken(nn.Module):
    """Attention of three heads over a single token, as in the last stage of a LeViT for small images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.query_key_value, self.head = nn.Conv2d(3, 24, 8, 8), nn.Linear(24, 72), nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        token = self.stem(images).mean((2, 3))
        query, key, value = self.query_key_value(token).reshape(-1, 3, 3, 1, 8).unbind(1)
        weights = (query @ key.transpose(-1, -2)).softmax(-1)
        logits: Tensor = self.head((weights @ value).flatten(1).relu())
        return logits


class Stream(nn.Module):
    """Two blocks that add to a stream of tokens, each after a layer norm; and a sum that no layer norm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 24, 8, 8), nn.Conv2d(24, 24, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            tokens = tokens + block(norm(tokens)).relu()
        maps = tokens.transpose(1, 2).reshape(-1, 24, 4, 4)
        logits: Tensor = self.head((self.last(maps) + self.last(maps.relu())).relu().mean((2, 3)))
        return logits


class Dense(nn.Module):
    """A batch norm between a convolution and the sum of both, which no convolution before it can take in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.last = nn.Conv2d(3, 24, 8, 8), nn.BatchNorm2d(24), nn.Conv2d(24, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images).relu()
        logits: Tensor = self.head((maps + self.last(self.norm(maps).relu())).mean((2, 3)))
        return logits


def int8_graph(network: nn.Module, preset: str, contract: ImageContract, folder: Path) -> onnx.GraphProto:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in network.parameters():
            nn.init.normal_(parameter, 0, 0.2)
        images = torch.randn(16, *contract.input_size) + 2 * torch.randn(16, 3, 1, 1)
    path = folder / "student.onnx"
    export_onnx(network.eval(), path, contract=contract, metadata={})
    return quantise(load_onnx(path), images.numpy(), preset=preset, calibrator="minmax").model.graph


def reads_rounded(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[bool]:
    """Of each input of a node that is computed, whether it comes out of a DequantizeLinear."""
    written = {name: each.op_type for each in graph.node for name in each.output}
    return [written[name] == "DequantizeLinear" for name in node.input if name in written]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_softmax_over_one_element_is_not_quantised(preset: str, contract: ImageContract, tmp_path: Path) -> None:
    """Up to 1.23, ONNX Runtime computes 0 for it in uint8; ``test_old_runtimes.py`` runs such releases."""
    graph = int8_graph(OneToken(), preset, contract, tmp_path)
    softmax = next(node for node in graph.node if node.op_type == "Softmax")
    assert reads_rounded(softmax, graph) == [False]


@pytest.mark.parametrize("preset", PRESETS)
def test_batch_norms_are_not_quantised(preset: str, contract: ImageContract, tmp_path: Path) -> None:
    graph = int8_graph(Dense(), preset, contract, tmp_path)
    norm = next(node for node in graph.node if node.op_type == "BatchNormalization")
    assert not any(reads_rounded(norm, graph))


@pytest.mark.parametrize("preset", PRESETS)
def test_layer_norms_and_their_sums_are_not_quantised(preset: str, contract: ImageContract, tmp_path: Path) -> None:
    graph = int8_graph(Stream(), preset, contract, tmp_path)
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert [any(reads_rounded(node, graph)) for node in norms] == [False, False]
    producers = {name: node for node in graph.node for name in node.output}
    between = producers[norms[1].input[0]]
    assert (between.op_type, any(reads_rounded(between, graph))) == ("Add", False)
    for node in graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            assert all(reads_rounded(node, graph)), node.name
    last = [node for node in graph.node if node.op_type == "Add"][-1]
    assert reads_rounded(last, graph) == [True, True]
