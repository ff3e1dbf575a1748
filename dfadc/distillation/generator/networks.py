"""Generators: latents (N, Z) in, images (N, C, H, W) in the contract's normalised range out."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dfadc.contract import ImageContract
    from dfadc.recipe.schema import GeneratorSettings

#: Generator A's first layer grows with the image's area; the paper uses A up to 32 px and B from 128 px.
LARGEST_PAPER_A = 64
#: The scalable generator starts from a grid of at most this many cells a side.
LARGEST_GRID = 8


class Standardised(nn.Module):
    """tanh, then batch norm without affine: every batch has zero mean and unit variance per channel (the paper)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, raw: Tensor) -> Tensor:
        """Raw (N, C, H, W) of any range in, images of zero mean and unit variance out."""
        normalised: Tensor = self.norm(torch.tanh(raw.float()))
        return normalised


class Pixels(nn.Module):
    """Bounds pixels to [0, 1] and normalises them as the contract says."""

    low: Tensor
    span: Tensor

    def __init__(self, contract: ImageContract) -> None:
        super().__init__()
        low, high = (torch.tensor(bound).view(1, -1, 1, 1) for bound in contract.value_range())
        self.register_buffer("low", low)
        self.register_buffer("span", high - low)

    def forward(self, raw: Tensor) -> Tensor:
        """Raw (N, C, H, W) of any range in, normalised images of real pixels out."""
        return self.low + self.span * torch.sigmoid(raw.float())


class Generator(nn.Module):
    """A body that draws raw (N, C, h, w) from latents, a resize where h×w is not the input size, and an output head.

    Args:
        body: latents (N, Z) -> raw (N, C, h, w) with h >= H and w >= W.
        head: raw -> normalised images.
        size: (H, W) of the contract.
    """

    def __init__(self, body: nn.Module, head: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.size = size

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (N, Z), standard normal, in; images (N, C, H, W) in the contract's normalised range out, fp32."""
        raw = self.body(latents)
        if tuple(raw.shape[2:]) != self.size:
            raw = functional.interpolate(raw, size=self.size, mode="bilinear", align_corners=False)
        images: Tensor = self.head(raw)
        return images


class UpsamplingConv2d(nn.Conv2d):
    """×2 nearest upsampling and a 3×3 convolution in one: the transposed convolution that the two of them are.

    Behind the upsampling each pixel stands four times, so of a kernel's nine products four at most differ: the taps
    that meet the same pixel are added up first (Aitken et al. 2017, arXiv 1707.02937). It has the weights of the
    convolution, initialised alike; 4 products a pixel and channel are left of 9, and no upsampled copy is made. On one
    core, (64, 128, 16, 16) to 64 channels in channels_last: forward 54 ms for 113, with backward 178 ms for 462.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W) in, (N, D, 2H, 2W) out."""
        # Sums of 2×2 neighbouring taps, (D, C, 4, 4).
        taps = functional.avg_pool2d(functional.pad(self.weight, (1, 1, 1, 1)), 2, stride=1, divisor_override=1)
        kernel = taps.flip(2, 3).transpose(0, 1)
        return functional.conv_transpose2d(features, kernel, self.bias, stride=2, padding=1)


class Grid(nn.Module):
    """A linear layer from a latent to (N, channels, height, width)."""

    def __init__(self, latent_dim: int, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.linear = nn.Linear(latent_dim, channels * grid[0] * grid[1])
        self.shape = (channels, *grid)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (N, Z) in, features (N, channels, height, width) out."""
        features: Tensor = self.linear(latents)
        return features.view(-1, *self.shape)


def draws_pixels(settings: GeneratorSettings, contract: ImageContract) -> bool:
    """True if images are bounded to pixels: those of scalable generators, where mean and std are known."""
    return settings.architecture == "scalable" and contract.has_pixels


def build_generator(settings: GeneratorSettings, contract: ImageContract, *, bounded: bool | None = None) -> nn.Module:
    """The generator that a recipe names, for the contract's channels and size.

    Args:
        settings: of the recipe.
        contract: of the images.
        bounded: whether images are bounded to pixels; None: as :func:`draws_pixels` says.

    Raises:
        DfadcError: generator A is asked for at a large size.
    """
    channels, height, width = contract.input_size
    bounded = draws_pixels(settings, contract) if bounded is None else bounded
    head = Pixels(contract) if bounded else Standardised(channels)
    name = settings.architecture
    if name == "paper":
        name = "paper_a" if max(height, width) <= LARGEST_PAPER_A else "paper_b"
    if name == "paper_a" and max(height, width) > LARGEST_PAPER_A:
        raise DfadcError(
            f"generator A is not for {height}x{width} images: its linear layer grows with their area",
            "--set generator.architecture=paper_b or scalable",
        )
    bodies: dict[str, Callable[[int, int, tuple[int, int]], nn.Module]] = {
        "paper_a": paper_a,
        "paper_b": paper_b,
        "scalable": partial(scalable, width=settings.width),
    }
    body = bodies[name](settings.latent_dim, channels, (height, width))
    return Generator(body, head, (height, width))


def paper_a(latent_dim: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """Generator A of Fang et al. 2019: linear to H/4, two rounds of ×2 nearest upsampling and convolution."""
    return nn.Sequential(
        Grid(latent_dim, 128, _grid(size, 2)),
        nn.BatchNorm2d(128),
        *_upsampling(128, 128),
        *_upsampling(128, 64),
        nn.Conv2d(64, channels, 3, padding=1),
    )


def paper_b(latent_dim: int, channels: int, size: tuple[int, int]) -> nn.Module:
    """Generator B of Fang et al. 2019: a DCGAN from H/16, 512-256-128-64-64 channels, weights N(0, 0.02)."""
    widths = [512, 256, 128, 64, 64]
    layers: list[nn.Module] = [Grid(latent_dim, widths[0], _grid(size, 4)), nn.BatchNorm2d(widths[0])]
    for wide, narrow in pairwise(widths):
        layers += [
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.LeakyReLU(0.2, inplace=True),
        ]
    body = nn.Sequential(*layers, nn.Conv2d(widths[-1], channels, 3, padding=1))
    for module in body.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return body


def scalable(latent_dim: int, channels: int, size: tuple[int, int], width: float = 1.0) -> nn.Module:
    """Our own: 1-8 M parameters from 28 to 512 px, most of its arithmetic on small grids.

    A linear layer to a grid of at most 8 cells a side, rounds of ×2 nearest upsampling and convolution that halve the
    channels as the grid grows, and a last sub-pixel convolution (Shi et al. 2016): the full-size image costs one
    convolution at half its size. At 28 px that is a seventh of generator A's arithmetic. ``width`` multiplies the
    channels of every layer but the last, for images that need fewer.
    """
    doublings = max(1, math.ceil(math.log2(max(size) / LARGEST_GRID)))
    # 40: from 33 px, where a third doubling makes the grid smallest, the linear layer keeps a million parameters.
    narrowest = 64 if doublings <= 2 else 40 if doublings == 3 else 32
    full = [min(256, narrowest * 2 ** (doublings - 1 - done)) for done in range(doublings)]
    widths = [max(1, round(width * each)) for each in full]
    layers: list[nn.Module] = [
        Grid(latent_dim, widths[0], _grid(size, doublings)),
        nn.BatchNorm2d(widths[0]),
        nn.LeakyReLU(0.2, inplace=True),
    ]
    for wide, narrow in pairwise(widths):
        layers += _upsampling(wide, narrow)
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 4 * channels, 3, padding=1), nn.PixelShuffle(2))


def _upsampling(wide: int, narrow: int) -> list[nn.Module]:
    return [
        UpsamplingConv2d(wide, narrow, 3, padding=1),
        nn.BatchNorm2d(narrow),
        nn.LeakyReLU(0.2, inplace=True),
    ]


def _grid(size: tuple[int, int], doublings: int) -> tuple[int, int]:
    return math.ceil(size[0] / 2**doublings), math.ceil(size[1] / 2**doublings)
