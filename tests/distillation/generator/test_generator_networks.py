"""Generators: shapes at every size, parameters, what comes out of both heads, and the structure of the paper's two."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn import functional

from dfadc.contract import ImageContract
from dfadc.distillation.generator.networks import (
    LARGEST_PAPER_A,
    Generator,
    Grid,
    Pixels,
    Standardised,
    UpsamplingConv2d,
    build_generator,
)
from dfadc.errors import DfadcError
from dfadc.recipe.schema import GeneratorSettings

Architecture = Literal["scalable", "paper", "paper_a", "paper_b"]
SIDES = (8, 9, 12, 16, 20, 28, 31, 32, 33, 48, 64, 65, 96, 100, 128, 160, 192, 224, 225, 256, 299, 384, 512)
RECTANGLES = ((28, 280), (8, 256), (97, 33), (240, 320), (2, 7), (1, 1))


def contract_of(height: int, width: int, *, channels: int = 3, has_pixels: bool = True) -> ImageContract:
    mean, std = ((0.2, 0.5, 0.7)[:channels], (0.1, 0.3, 0.4)[:channels]) if has_pixels else (None, None)
    return ImageContract((channels, height, width), num_classes=10, mean=mean, std=std)


def build(
    architecture: Architecture, contract: ImageContract, *, bounded: bool | None = None, **changes: Any
) -> Generator:
    generator = build_generator(GeneratorSettings(architecture=architecture, **changes), contract, bounded=bounded)
    assert isinstance(generator, Generator)
    return generator


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("architecture", ["scalable", "paper"])
@pytest.mark.parametrize("size", [*((side, side) for side in SIDES), *RECTANGLES], ids=str)
def test_every_size_comes_out_as_asked(architecture: Architecture, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        generator = build(architecture, contract_of(*size), latent_dim=16)
        images = generator(torch.empty(2, 16))
    assert images.shape == (2, 3, *size)
    assert images.dtype == torch.float32


@pytest.mark.parametrize("architecture", ["scalable", "paper", "paper_b"])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (33, 20), (2, 7)], ids=str)
def test_odd_sizes_really_run_and_teach(architecture: Architecture, bounded: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    generator = build(architecture, contract_of(*size), bounded=bounded, latent_dim=8)
    latents = torch.randn(4, 8)
    images = generator(latents)
    assert images.shape == (4, 3, *size)
    assert images.isfinite().all()
    # Weighted by fixed noise: the plain sum of a standardised batch is 0 whatever the weights are.
    torch.autograd.backward((images * torch.randn_like(images)).sum())
    still = [name for name, parameter in generator.named_parameters() if parameter.grad is None]
    assert not still, f"no gradient reaches {still}"
    assert all(parameter.grad.isfinite().all() for parameter in generator.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [28, 32, 33, 40, 48, 64, 96, 112, 128, 160, 192, 224])
def test_the_scalable_generator_has_one_to_eight_million_parameters(side: int, channels: int) -> None:
    with torch.device("meta"):
        generator = build("scalable", contract_of(side, side, channels=channels), latent_dim=256)
    assert 1_000_000 <= count(generator) <= 8_000_000


@pytest.mark.parametrize("side", [28, 96, 224])
def test_a_generator_of_half_the_width_has_half_the_channels_in_every_layer(side: int) -> None:
    with torch.device("meta"):
        full, half = (build("scalable", contract_of(side, side), latent_dim=16, width=width) for width in (1.0, 0.5))
        assert half(torch.empty(2, 16)).shape == (2, 3, side, side)
    channels = [[m.in_channels for m in each.modules() if isinstance(m, nn.Conv2d)] for each in (full, half)]
    assert len(channels[0]) >= 2
    assert channels[1] == [wide // 2 for wide in channels[0]]


@pytest.mark.parametrize("architecture", ["scalable", "paper_a", "paper_b"])
def test_standardised_images_have_zero_mean_and_unit_variance_in_every_batch(architecture: Architecture) -> None:
    torch.manual_seed(0)
    images = build(architecture, contract_of(16, 16), bounded=False, latent_dim=8)(torch.randn(16, 8))
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    # Batch norm divides by √(σ² + 1e-5): a shade less than 1 for the small outputs of a new generator B.
    torch.testing.assert_close(images.var(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=2e-2)


def test_a_standardised_image_alone_does_not_depend_on_its_batch_in_eval_mode() -> None:
    torch.manual_seed(0)
    generator = build("scalable", contract_of(8, 8), latent_dim=8)
    generator(torch.randn(16, 8))
    latents = torch.randn(4, 8)
    torch.testing.assert_close(generator.eval()(latents)[:1], generator(latents[:1]))


def test_pixels_fill_the_contracts_range_and_never_leave_it() -> None:
    contract = contract_of(8, 8)
    generator = build("scalable", contract, latent_dim=8)
    low, high = contract.value_range()
    raw = torch.tensor([-1e4, 0.0, 1e4]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    darkest, middle, brightest = generator.head(raw)
    for channel in range(3):
        assert torch.all(darkest[channel] == low[channel])
        torch.testing.assert_close(brightest[channel], torch.full((8, 8), high[channel]))
        torch.testing.assert_close(middle[channel], torch.full((8, 8), (low[channel] + high[channel]) / 2))
    images = generator(10 * torch.randn(8, 8))
    assert all(low[c] <= images[:, c].min() and images[:, c].max() <= high[c] + 1e-6 for c in range(3))


def test_generator_a_is_the_papers() -> None:
    """Linear to 128 channels at H/4, BN, twice (x2 nearest, conv3, BN, LeakyReLU .2), conv3; then the head."""
    body = build("paper_a", contract_of(32, 32, channels=1), latent_dim=100).body
    assert isinstance(body, nn.Sequential)
    assert [type(layer).__name__ for layer in body] == [
        *("Grid", "BatchNorm2d"),
        *("UpsamplingConv2d", "BatchNorm2d", "LeakyReLU"),
        *("UpsamplingConv2d", "BatchNorm2d", "LeakyReLU"),
        "Conv2d",
    ]
    assert isinstance(body[0], Grid)
    assert body[0].shape == (128, 8, 8)
    assert [layer.negative_slope for layer in body if isinstance(layer, nn.LeakyReLU)] == [0.2, 0.2]
    linear = 100 * 128 * 64 + 128 * 64
    convolutions = (128 * 128 + 128 * 64 + 64 * 1) * 9 + 128 + 64 + 1
    norms = 2 * (128 + 128 + 64)
    assert count(body) == linear + convolutions + norms


@pytest.mark.parametrize("size", [(4, 4), (7, 5), (1, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_upsampling_convolution_is_the_two_that_it_replaces(
    size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    """Values, gradients of features, weights and bias: those of nearest upsampling, then a 3x3 convolution."""
    torch.manual_seed(0)
    layer = UpsamplingConv2d(3, 5, 3, padding=1).double()
    features = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    upsampled = functional.interpolate(features, scale_factor=2, mode="nearest")
    expected = functional.conv2d(upsampled, layer.weight, layer.bias, padding=1)
    weights = torch.randn_like(expected)
    inputs = (features, *layer.parameters())
    torch.testing.assert_close(layer(features), expected)
    for got, wanted in zip(
        torch.autograd.grad((layer(features) * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_generator_b_is_the_papers() -> None:
    """A DCGAN from H/16 with 512, 256, 128, 64, 64 channels, conv3, tanh; weights N(0, .02)."""
    torch.manual_seed(0)
    body = build("paper_b", contract_of(128, 128), latent_dim=256).body
    assert isinstance(body, nn.Sequential)
    transposed = [layer for layer in body if isinstance(layer, nn.ConvTranspose2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in transposed] == [
        (512, 256),
        (256, 128),
        (128, 64),
        (64, 64),
    ]
    assert isinstance(body[0], Grid)
    assert body[0].shape == (512, 8, 8)
    assert isinstance(body[-1], nn.Conv2d)
    assert (body[-1].in_channels, body[-1].out_channels, body[-1].kernel_size) == (64, 3, (3, 3))
    weights = [
        layer.weight for layer in body.modules() if isinstance(layer, nn.ConvTranspose2d | nn.Conv2d | nn.Linear)
    ]
    for weight in weights:
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert weight.mean().item() == pytest.approx(0.0, abs=0.002)
    scales = torch.cat([layer.weight for layer in body.modules() if isinstance(layer, nn.BatchNorm2d)])
    assert scales.mean().item() == pytest.approx(1.0, abs=0.01)
    assert scales.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(("architecture", "side"), [("paper_a", 32), ("paper_b", 32)])
def test_the_paper_ends_in_tanh_and_batch_norm_without_affine(architecture: Architecture, side: int) -> None:
    generator = build(architecture, contract_of(side, side, has_pixels=False), latent_dim=8)
    assert not list(generator.head.parameters())
    raw = torch.randn(8, 3, side, side) * 3
    expected = torch.tanh(raw)
    expected = expected - expected.mean(dim=(0, 2, 3), keepdim=True)
    expected = expected / torch.sqrt(expected.square().mean(dim=(0, 2, 3), keepdim=True) + 1e-5)
    torch.testing.assert_close(generator.head(raw), expected)


@pytest.mark.parametrize(("side", "first_channels"), [(32, 128), (LARGEST_PAPER_A, 128), (LARGEST_PAPER_A + 1, 512)])
def test_paper_takes_a_for_small_images_and_b_for_large_ones(side: int, first_channels: int) -> None:
    with torch.device("meta"):
        body = build("paper", contract_of(side, side)).body
    assert isinstance(body, nn.Sequential)
    assert isinstance(body[1], nn.BatchNorm2d)
    assert body[1].num_features == first_channels


def test_generator_a_is_refused_for_large_images() -> None:
    with pytest.raises(DfadcError, match="generator A is not for 32x128") as caught:
        build("paper_a", contract_of(32, 128))
    assert "generator.architecture=" in caught.value.hint


@pytest.mark.parametrize(
    ("architecture", "has_pixels", "head"),
    [("scalable", True, Pixels), ("scalable", False, Standardised), ("paper", True, Standardised)],
)
def test_images_are_bounded_to_pixels_by_scalable_generators_that_know_mean_and_std(
    architecture: Architecture, has_pixels: bool, head: type[nn.Module]
) -> None:
    assert isinstance(build(architecture, contract_of(8, 8, has_pixels=has_pixels)).head, head)


def test_the_same_seed_builds_the_same_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build("scalable", contract_of(8, 8), latent_dim=8).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
