"""Batch norms of exported programs become layers again, and the network computes what it computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dfadc.contract import ContractFields
from dfadc.networks.norm_layers import find_norm_layers
from dfadc.teacher.exported_norms import ExportedBatchNorm, restore_batch_norms_
from dfadc.teacher.load import load_teacher

if TYPE_CHECKING:
    from pathlib import Path


class Network(nn.Module):
    """Batch norms of every kind that an export can meet; ``twice`` is called more than once."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU())
        self.twice = nn.BatchNorm2d(4, eps=1e-3)
        self.flat = nn.BatchNorm1d(4, affine=False)
        self.classifier = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.twice(torch.relu(self.twice(self.features(images))))
        logits: Tensor = self.classifier(self.flat(maps.mean(dim=(2, 3))))
        return logits


def trained(norm: nn.Module) -> Network:
    """In eval mode, its statistics those of some images."""
    torch.manual_seed(0)
    network = Network(norm)
    with torch.no_grad():
        for _ in range(5):
            network(2 * torch.randn(16, 1, 8, 8) + 1)
    return network.eval()


def export(network: nn.Module) -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim("batch")},)
    return torch.export.export(network, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=dynamic)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.SyncBatchNorm(4)], ids=["plain", "sync"])
def test_batch_norms_of_a_graph_become_layers_that_see_what_passes(norm: nn.Module, decomposed: bool) -> None:
    network = trained(norm)
    program = export(network)
    if decomposed:
        program = program.run_decompositions()
    module = program.module()
    keys = list(module.state_dict())
    restore_batch_norms_(module)
    images = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(module(images), network(images))
    # Keys tell the architecture of a whole module.
    assert sorted(module.state_dict()) == sorted(keys)
    seen: list[str] = []
    for name, layer in module.named_modules():
        if isinstance(layer, ExportedBatchNorm):
            layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: seen.append(name))
    module(images)
    assert seen == ["features.1", "twice", "twice", "flat"]


def test_a_batch_norm_that_export_dissolved_is_no_layer() -> None:
    """Its statistics are still there, on a container that nothing calls: it must not be counted."""
    network = trained(FrozenBatchNorm2d(4))
    module = export(network).module()
    restore_batch_norms_(module)
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(module(images), network(images))
    assert [layer.name for layer in find_norm_layers(module) if layer.has_statistics] == ["twice", "flat"]


def test_what_is_no_graph_is_left_alone() -> None:
    network = trained(nn.BatchNorm2d(4))
    kinds = [type(layer) for layer in network.modules()]
    restore_batch_norms_(network)
    assert [type(layer) for layer in network.modules()] == kinds


def test_a_loaded_program_shows_its_batch_norms_and_gives_gradients(tmp_path: Path) -> None:
    network = trained(nn.BatchNorm2d(4))
    torch.export.save(export(network), tmp_path / "teacher.pt2")
    teacher = load_teacher(tmp_path / "teacher.pt2", fields=ContractFields(), trust=True)
    assert len(teacher.batch_norms) == 3
    found = {layer.name: layer.num_channels for layer in teacher.norm_layers if layer.has_statistics}
    assert found == {"features.1": 4, "twice": 4, "flat": 4}
    images = torch.randn(4, 1, 8, 8, requires_grad=True)
    ours = torch.autograd.grad(teacher.module(images).square().sum(), images)[0]
    theirs = torch.autograd.grad(network(images).square().sum(), images)[0]
    torch.testing.assert_close(ours, theirs)
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
