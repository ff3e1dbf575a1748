"""Channels that a narrower student keeps: a layer's own ones, those of residual streams, heads, groups of a norm."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from dfadc.networks.logits import LogitsOf
from dfadc.student.channels import pick
from dfadc.student.inherit import SmallerCopy, copy_weights_, find_copy

if TYPE_CHECKING:
    from collections.abc import Callable

    from dfadc.student.channels import Kept

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """Two blocks with channels of their own, on a stream that both add to."""

    def __init__(self, stream: int, inner: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stream, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(stream, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, stream, 3, padding=1))
            for _ in range(2)
        )
        self.head = nn.Linear(stream, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        for block in self.blocks:
            maps = maps + block(maps)
        logits: Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits


class Heads(nn.Module):
    """Attention over patches, on a stream of one width, as timm writes it."""

    def __init__(self, num_heads: int, size: int) -> None:
        super().__init__()
        self.num_heads, self.size = num_heads, size
        self.embed = nn.Conv2d(3, 12, 8, stride=8)
        self.qkv = nn.Linear(12, 3 * num_heads * size)
        self.proj = nn.Linear(num_heads * size, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        packed = self.qkv(tokens).unflatten(2, (3, self.num_heads, self.size)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(packed[0], packed[1], packed[2], scale=0.5)
        logits: Tensor = self.head(self.proj(mixed.transpose(1, 2).flatten(2)).mean(dim=1))
        return logits


def vit(width: int, heads: int) -> VisionTransformer:
    torch.manual_seed(0)
    network = VisionTransformer(
        32, 8, num_layers=2, num_heads=heads, hidden_dim=width, mlp_dim=4 * width, num_classes=5
    )
    nn.init.normal_(network.heads[0].weight)  # zero as it comes: every permutation would leave its logits as they are
    return network.eval()


def keep(student: nn.Module, teacher: nn.Module) -> Kept:
    copy = find_copy(student.eval(), teacher.eval(), IMAGES)
    assert isinstance(copy, SmallerCopy), copy
    return copy.kept


# ----------------------------------------------------------------------------------------------------- convolutions


def test_each_block_keeps_its_own_channels_and_the_stream_has_one_choice() -> None:
    torch.manual_seed(0)
    teacher, student = Residual(8, 8), Residual(4, 4)
    with torch.no_grad():
        for block, strong in zip(teacher.blocks, (slice(4), slice(4, 8)), strict=True):
            block[0].weight[strong] *= 5  # type: ignore[index]
            block[0].bias[strong] *= 5  # type: ignore[index]
    kept = keep(student, teacher)
    assert kept["blocks.0.0.weight", 0].tolist() == kept["blocks.0.2.weight", 1].tolist() == [0, 1, 2, 3]
    assert kept["blocks.1.0.weight", 0].tolist() == kept["blocks.1.2.weight", 1].tolist() == [4, 5, 6, 7]
    assert kept["blocks.0.0.bias", 0].tolist() == [0, 1, 2, 3]
    stream = kept["stem.weight", 0].tolist()
    for axis in (("blocks.0.0.weight", 1), ("blocks.1.0.weight", 1), ("blocks.0.2.weight", 0), ("head.weight", 1)):
        assert kept[axis].tolist() == stream


def test_channels_go_through_depthwise_layers_and_a_squeeze_that_reads_and_scales_them() -> None:
    torch.manual_seed(0)
    teacher, student = (torchvision.models.mobilenet_v3_small(num_classes=5, width_mult=width) for width in (1, 0.5))
    kept = keep(student, teacher)
    block = "features.4.block"
    expanded = kept[f"{block}.0.0.weight", 0].tolist()
    for axis in (
        ("0.1.running_mean", 0),
        ("1.0.weight", 0),
        ("2.fc1.weight", 1),
        ("2.fc2.weight", 0),
        ("3.0.weight", 1),
    ):
        assert kept[f"{block}.{axis[0]}", axis[1]].tolist() == expanded
    others = [kept[f"features.{index}.block.0.0.weight", 0].tolist() for index in (5, 6)]
    assert len({tuple(each) for each in (expanded, *others)}) == 3


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [((1, 1), [4, 5, 6, 7]), ((2, 2), [2, 3, 6, 7]), ((4, 2), [4, 5, 6, 7]), ((4, 4), [1, 3, 5, 7])],
)
def test_of_groups_as_many_channels_each_are_kept_or_whole_groups(blocks: tuple[int, int], expected: list[int]) -> None:
    assert pick(torch.arange(8.0), 4, blocks).tolist() == expected


@pytest.mark.parametrize("groups", [(4, 4), (4, 2)])
def test_a_group_norm_keeps_its_groups(groups: tuple[int, int]) -> None:
    torch.manual_seed(0)

    def build(width: int, num_groups: int) -> nn.Module:
        convolutions = (nn.Conv2d(3, width, 3), nn.GroupNorm(num_groups, width), nn.ReLU())
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))

    teacher, student = build(16, groups[0]), build(8, groups[1])
    counts = torch.bincount(keep(student, teacher)["0.weight", 0] // 4, minlength=4).tolist()
    assert sorted(counts) == ([2, 2, 2, 2] if groups == (4, 4) else [0, 0, 4, 4])


# --------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(("heads", "size"), [(2, 6), (4, 3), (2, 3)])
@torch.no_grad()
def test_a_student_with_the_heads_that_count_computes_the_same(heads: int, size: int) -> None:
    torch.manual_seed(0)
    teacher, student = Heads(4, 6).eval(), Heads(heads, size).eval()
    counts = torch.zeros(4, 6)
    counts[torch.randperm(4)[:heads, None], torch.stack([torch.randperm(6)[:size] for _ in range(heads)])] = 1
    for name, axis in (("qkv.weight", 0), ("qkv.bias", 0), ("proj.weight", 1)):
        tensor = teacher.get_parameter(name)
        shape = [-1 if place == axis else 1 for place in range(tensor.ndim)]
        tensor.mul_(counts.flatten().repeat(tensor.shape[axis] // 24).view(shape))
    copy = find_copy(student, teacher, IMAGES)
    assert isinstance(copy, SmallerCopy)
    copy_weights_(student, teacher, copy)
    torch.testing.assert_close(student(IMAGES), teacher(IMAGES))


@pytest.mark.parametrize("heads", [2, 4])
def test_a_transformer_keeps_one_stream_whole_heads_and_each_layers_own_units(heads: int) -> None:
    teacher, student = vit(32, 4), vit(16, heads)
    kept = keep(student, teacher)
    stream = kept["conv_proj.weight", 0].tolist()
    for axis in (("class_token", 2), ("encoder.pos_embedding", 2), ("encoder.ln.weight", 0), ("heads.head.weight", 1)):
        assert kept[axis].tolist() == stream
    units = []
    for layer in (f"encoder.layers.encoder_layer_{index}" for index in (0, 1)):
        packed = kept[f"{layer}.self_attention.in_proj_weight", 0].view(3, 16)
        assert torch.equal(packed[1], packed[0] + 32)
        assert torch.equal(packed[2], packed[0] + 64)
        assert torch.equal(packed[0], kept[f"{layer}.self_attention.out_proj.weight", 1])
        counts = torch.bincount(packed[0] // 8, minlength=4).sort().values.tolist()
        assert counts == ([0, 0, 8, 8] if heads == 2 else [4, 4, 4, 4])
        assert kept[f"{layer}.self_attention.in_proj_weight", 1].tolist() == stream
        assert kept[f"{layer}.mlp.0.weight", 0].tolist() == kept[f"{layer}.mlp.3.weight", 1].tolist()
        units.append(kept[f"{layer}.mlp.0.weight", 0].tolist())
    assert units[0] != units[1]


def test_a_windows_positions_are_those_of_the_heads() -> None:
    torch.manual_seed(0)

    def build(width: int, heads: list[int]) -> nn.Module:
        network: nn.Module = torchvision.models.SwinTransformer([2, 2], width, [1, 1], heads, [4, 4], num_classes=5)
        return network

    kept = keep(build(8, [2, 4]), build(16, [4, 8]))
    packed = kept["features.1.0.attn.qkv.weight", 0].view(3, 8)
    table = kept["features.1.0.attn.relative_position_bias_table", 1]
    assert packed[0].tolist() == (table[:, None] * 4 + torch.arange(4)).flatten().tolist()


@pytest.mark.parametrize(
    ("student", "reason"),
    [
        (vit(16, 8), "has 8 heads of 16 channels in all, the teacher's 4 of 32"),
        (vit(32, 4), "nothing is smaller"),
        (vit(48, 4), r"class_token is \(1, 1, 48\), the teacher's \(1, 1, 32\)"),
        (VisionTransformer(32, 4, 2, 4, 16, 64, num_classes=5), "conv_proj.weight is|pos_embedding is"),
        (torchvision.models.mobilenet_v3_small(), "its last layer is classifier.3, the teacher's heads.head"),
    ],
)
def test_a_transformer_that_cannot_inherit_is_told_why(student: nn.Module, reason: str) -> None:
    found = find_copy(student, vit(32, 4), IMAGES)
    assert isinstance(found, str)
    assert re.search(reason, found)


def hugging_face(width: int, heads: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "num_channels": 3, "num_labels": 5}
    config = transformers.ViTConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_hidden_layers=2, **sizes
    )
    network: nn.Module = transformers.ViTForImageClassification(config)
    return LogitsOf(network.eval())


def from_timm(width: int, heads: int) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "num_classes": 5, "depth": 2}
    network: nn.Module = timm.create_model("vit_tiny_patch16_224", embed_dim=width, num_heads=heads, **sizes)
    return network.eval()


@pytest.mark.parametrize("build", [hugging_face, from_timm])
def test_transformers_of_other_libraries_keep_whole_heads(build: Callable[[int, int], nn.Module]) -> None:
    torch.manual_seed(0)
    kept = keep(build(16, 2), build(32, 4))
    blocks = [
        axis for axis in kept if axis[0].endswith(("qkv.weight", "q_proj.weight", "query.weight")) and axis[1] == 0
    ]
    assert len(blocks) == 2
    for axis in blocks:
        queries = kept[axis][:16]
        assert torch.bincount(queries // 8, minlength=4).sort().values.tolist() == [0, 0, 8, 8]
