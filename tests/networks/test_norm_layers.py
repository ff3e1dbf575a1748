from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dfadc.errors import DfadcError
from dfadc.networks.logits import LogitsOf, unwrap_logits
from dfadc.networks.norm_layers import find_norm_layers, is_batch_norm_with_statistics


@pytest.mark.parametrize(
    ("layer", "counts"),
    [
        (nn.BatchNorm1d(4), True),
        (nn.BatchNorm2d(4), True),
        (nn.SyncBatchNorm(4), True),
        (FrozenBatchNorm2d(4), True),
        (nn.BatchNorm2d(4, track_running_stats=False), False),
        (nn.InstanceNorm2d(4, track_running_stats=True), False),
        (nn.GroupNorm(2, 4), False),
        (nn.LayerNorm(4), False),
    ],
)
def test_what_counts_as_batch_norm_with_statistics(layer: nn.Module, counts: bool) -> None:
    assert is_batch_norm_with_statistics(layer) is counts
    (found,) = find_norm_layers(nn.Sequential(nn.Conv2d(3, 4, 1), layer))
    assert (found.name, found.kind, found.num_channels) == ("1", type(layer).__name__, 4)
    assert found.has_statistics is counts


def test_timm_wrappers_count() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("mobilenetv3_small_050", num_classes=3)
    found = find_norm_layers(network)
    assert {layer.kind for layer in found} == {"BatchNormAct2d"}
    assert all(layer.has_statistics for layer in found)


class _Answer:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class _Dictionary(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"aux": images * 0, "out": images.mean((2, 3))}


def test_unwraps_dicts_and_objects() -> None:
    logits = torch.randn(2, 3)
    assert unwrap_logits(logits) is logits
    assert unwrap_logits({"aux": logits + 1, "out": logits}) is logits
    assert unwrap_logits({"logits": logits}) is logits
    assert unwrap_logits(_Answer(logits)) is logits
    assert LogitsOf(_Dictionary())(torch.ones(2, 3, 4, 4)).shape == (2, 3)


@pytest.mark.parametrize("output", [(torch.ones(2, 3), torch.ones(2, 3)), {"features": torch.ones(2)}, None])
def test_refuses_what_holds_no_logits(output: object) -> None:
    with pytest.raises(DfadcError, match="not a tensor of logits"):
        unwrap_logits(output)
