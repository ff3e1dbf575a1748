"""Images drawn by rule, which nobody trains: leaves that lie on each other, strokes of a pen, photographs' noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfadc.distillation.compute.transfer import send

if TYPE_CHECKING:
    from dfadc.contract import ImageContract

#: Shares of the images that are strokes, and of the others those that are noise alone; the rest has leaves.
_STROKES_SHARE, _NOISE_SHARE = 0.25, 0.15
#: Leaves of an image at most; most images have few.
_MOST_LEAVES = 12
#: A leaf's size and the most that it is longer than wide, as shares of half the image's side and as a factor.
_SIZES, _LONGEST = (0.1, 0.9), math.e
#: Outlines |u|^p + |v|^p = 1: diamonds, ellipses, rounded and sharp rectangles.
_EXPONENTS = (1.0, 2.0, 4.0, 10.0)
#: Shares of the plain black grounds, the mirrored images, the textured and the uneven leaves, and of those with the
#: surface of the leaf before, as parts of one thing have.
_PLAIN, _MIRRORED, _TEXTURED, _UNEVEN, _SAME = 0.5, 0.5, 0.7, 0.5, 0.5
#: Share of the leaves that stand or lie, and by how much they lean: standard deviation in radians.
_UPRIGHT, _LEANING = 0.7, 0.1
#: Strokes of an image at most, points that one is drawn through, and the shares of those that begin where the one
#: before ends, of the straight ones, of the closed ones and of the images that are bright on black.
_MOST_STROKES, _POINTS = 3, 32
_JOINED, _STRAIGHT, _CLOSED, _BRIGHT_ON_BLACK = 0.6, 0.3, 0.2, 0.7
#: How far strokes reach from their middle, half their breadth, and how far their middle lies from the image's (standard
#: deviation), in halves of the image's side; the ink's brightness on black.
_REACH, _BREADTH, _OFF_CENTRE = (0.4, 0.8), (0.04, 0.14), 0.12
_BRIGHTNESS = (0.6, 1.0)
#: Values of images that are drawn at once: what a leaf takes is as much as an image, and an image has several.
_VALUES_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
#: How strong texture and unevenness are at most, in pixels of [0, 1] and in units of a leaf.
_TEXTURE, _UNEVENNESS = 0.3, 0.15


def draw_procedural(
    count: int, contract: ImageContract, rng: torch.Generator, pixel_rng: torch.Generator | None = None
) -> Tensor:
    """Images that have edges, surfaces and textures as photographs do, and look like nothing in particular.

    The student and the teacher answer them as they answer any images. Source: the dead-leaves model (Lee, Mumford and
    Huang 2001) and noise of spectrum 1/f^a (Field 1987), from which Baradad et al. (2021, arXiv 2106.05963) learn
    representations; a quarter are cubic Bézier curves, for teachers of writing and drawings. Deviations: few leaves
    instead of a full cover, half of the images on plain black and half of them mirrored, neighbours of one surface, so
    that single objects with parts come up too; more upright and level leaves than oblique ones, as edges are in
    photographs (Switkes, Mayer and Sloan 1978).

    Args:
        count: N.
        contract: what an image is.
        rng: on the CPU.
        pixel_rng: of all but the numbers of leaves, on the CPU or on CUDA, where the images are drawn; None: ``rng``. A
            CPU core takes 14 ms for 16 images of 28 px and 0.7 s for 16 of 224 px.

    Returns:
        (N, C, H, W) in the contract's value range, on the device of ``pixel_rng``.
    """
    painter = _Painter(contract.input_size, rng, pixel_rng or rng)
    at_once = max(1, _VALUES_AT_ONCE[painter.device.type] // math.prod(contract.input_size))
    parts = [painter.draw(min(at_once, count - done)) for done in range(0, count, at_once)]
    low, high = (send(torch.tensor(bound).view(-1, 1, 1), painter.device) for bound in contract.value_range())
    return low + (high - low) * torch.cat(parts)


class _Painter:
    """Draws pixels in [0, 1].

    Args:
        size: (C, H, W) of an image.
        rng: of the numbers of leaves, which the host must know, on the CPU.
        pixel_rng: of all else, on the device where the images are drawn.
    """

    def __init__(self, size: tuple[int, int, int], rng: torch.Generator, pixel_rng: torch.Generator) -> None:
        self.channels, self.height, self.width = size
        self.rng = rng
        self.pixel_rng = pixel_rng
        self.device = pixel_rng.device
        self._levels, self._exponents = (
            send(torch.tensor(values).view(-1, 1, 1, 1), self.device) for values in ((0, math.pi / 2), _EXPONENTS)
        )

    def draw(self, count: int) -> Tensor:
        """(N, C, H, W): some of strokes, some of noise alone, the others of leaves, in any order."""
        num_strokes = int((torch.rand(count, generator=self.rng) < _STROKES_SHARE).sum())
        parts = []
        if num_strokes < count:
            is_noise = self._uniform(count - num_strokes) < _NOISE_SHARE
            noise, leaves = self._draw_noise(len(is_noise)), self._draw_leaves(len(is_noise))
            parts.append(torch.where(is_noise, noise, leaves))
        if num_strokes:
            parts.append(self._draw_strokes(num_strokes))
        return torch.cat(parts)[send(torch.randperm(count, generator=self.rng), self.device)]

    def _draw_noise(self, count: int) -> Tensor:
        """(N, C, H, W): a colour, and around it noise of one spectrum, stronger or weaker in each channel."""
        amplitudes = self._uniform(count, -0.5, 0.5, channels=self.channels)
        return (self._uniform(count, channels=self.channels) + amplitudes * self._fields(count)).clamp(0, 1)

    def _draw_leaves(self, count: int) -> Tensor:
        """(N, C, H, W): a ground, and leaves upon it. All leaves of all images are cut out at once, then laid down."""
        textures, waves = self._fields(count), self._fields(count, lowest=2.5)
        surfaces = self._surface(textures)
        images = surfaces * (self._uniform(count) > _PLAIN)
        is_mirrored = self._uniform(count) < _MIRRORED
        num_leaves = 1 + _MOST_LEAVES * torch.rand(count, generator=self.rng) ** 2
        layers = torch.arange(1, _MOST_LEAVES + 1).view(-1, 1) <= num_leaves
        lies_on = send(layers.nonzero()[:, 1], self.device)  # the lowest leaves of all images first
        outlines = self._outline(self._pick(waves, len(lies_on)), is_mirrored[lies_on])
        is_part = self._uniform(len(lies_on)) < _SAME
        own = self._surface(self._pick(textures, len(lies_on)))
        sizes = layers.sum(dim=1).tolist()
        for chosen, *leaves in zip(*(each.split(sizes) for each in (lies_on, outlines, is_part, own)), strict=True):
            inside, continues, surface = leaves
            surface = torch.where(continues, surfaces[chosen], surface)
            surfaces[chosen] = surface
            images[chosen] = torch.where(inside, surface, images[chosen])
        return images

    def _draw_strokes(self, count: int) -> Tensor:
        """(N, C, H, W): up to three strokes of one breadth, bright on black or of one surface on another."""
        on_black = self._uniform(count) < _BRIGHT_ON_BLACK
        ground = self._surface(self._fields(count)) * ~on_black
        colour = self._uniform(count, 0.01, channels=self.channels)
        bright = self._uniform(count, *_BRIGHTNESS) * colour / colour.amax(dim=1, keepdim=True)
        ink = torch.where(on_black, bright, self._surface(self._fields(count)))
        return ground.lerp(ink, self._trace(count))

    def _trace(self, count: int) -> Tensor:
        """(N, 1, H, W) in [0, 1]: how much of each pixel strokes cover; each is a cubic Bézier curve."""
        middle = _OFF_CENTRE * torch.randn((count, 1, 2), generator=self.pixel_rng, device=self.device)
        reach, breadth = self._between(_REACH, count, 1, 2), self._between(_BREADTH, count, 1, 1)
        num_strokes = torch.randint(1, _MOST_STROKES + 1, (count, 1, 1), generator=self.pixel_rng, device=self.device)
        along = torch.linspace(0, 1, _POINTS, device=self.device).view(1, -1, 1)
        down, across = (torch.linspace(-1, 1, side, device=self.device) for side in (self.height, self.width))
        covered = torch.zeros(count, self.height, self.width, device=self.device)
        end = middle + reach * self._between((-1, 1), count, 1, 2)
        for number in range(_MOST_STROKES):
            start, first, second, other = (middle + reach * self._between((-1, 1), count, 1, 2) for _ in range(4))
            joined, straight, closed = (
                self._between((0, 1), count, 1, 1) < share for share in (_JOINED, _STRAIGHT, _CLOSED)
            )
            start = torch.where(joined, end, start)
            end = torch.where(closed, start, other)
            first = torch.where(straight, start.lerp(end, 1 / 3), first)
            second = torch.where(straight, start.lerp(end, 2 / 3), second)
            left = 1 - along
            points = left**3 * start + 3 * left**2 * along * first + 3 * left * along**2 * second + along**3 * end
            squares = (down - points[..., :1]).square().unsqueeze(3) + (across - points[..., 1:]).square().unsqueeze(2)
            distance = squares.amin(dim=1).sqrt()
            inside = ((breadth - distance) * min(self.height, self.width) / 2 + 0.5).clamp(0, 1)
            covered = torch.where(num_strokes > number, covered.maximum(inside), covered)
        return covered.unsqueeze(1)

    def _surface(self, textures: Tensor) -> Tensor:
        """(N, C, H, W) of a colour each, some with texture (N, 1, H, W)."""
        count = len(textures)
        strength = _TEXTURE * self._uniform(count) * (self._uniform(count) < _TEXTURED)
        return (self._uniform(count, channels=self.channels) + strength * textures).clamp(0, 1)

    def _outline(self, waves: Tensor, is_mirrored: Tensor) -> Tensor:
        """(N, 1, H, W): the pixels inside a leaf each, and its mirror image where there is one."""
        count = len(waves)
        centre = 0.4 * torch.randn((2, count, 1, 1, 1), generator=self.pixel_rng, device=self.device)
        level = self._pick(self._levels, count)
        leaning = level + _LEANING * torch.randn(level.shape, generator=self.pixel_rng, device=self.device)
        angle = torch.where(self._uniform(count) < _UPRIGHT, leaning, self._uniform(count, 0, math.pi))
        size = self._uniform(count, *map(math.log, _SIZES)).exp()
        stretch = self._uniform(count, -math.log(_LONGEST), math.log(_LONGEST)).exp()
        exponent = self._pick(self._exponents, count)
        edge = 1 + _UNEVENNESS * waves * (self._uniform(count) < _UNEVEN)
        down = torch.linspace(-1, 1, self.height, device=self.device).view(-1, 1) - centre[0]
        across = torch.linspace(-1, 1, self.width, device=self.device)

        def is_inside(right: Tensor) -> Tensor:
            along = (right * angle.cos() + down * angle.sin()) / (size * stretch)
            aside = (down * angle.cos() - right * angle.sin()) / (size / stretch)
            return along.abs() ** exponent + aside.abs() ** exponent < edge

        return is_inside(across - centre[1]) | (is_inside(-across - centre[1]) & is_mirrored)

    def _fields(self, count: int, lowest: float = 0.5, highest: float = 4.0) -> Tensor:
        """(N, 1, H, W): noise of spectrum 1/f^a, a between the bounds, with mean 0 and standard deviation 1."""
        down = self.height * torch.fft.fftfreq(self.height, device=self.device).view(-1, 1)
        across = self.width * torch.fft.rfftfreq(self.width, device=self.device)
        frequencies = torch.hypot(down, across).clamp_min(1)
        shape = (count, 1, *frequencies.shape)
        spectrum = torch.randn(shape, dtype=torch.complex64, generator=self.pixel_rng, device=self.device)
        spectrum *= frequencies ** (-self._uniform(count, lowest, highest) / 2)
        spectrum[..., 0, 0] = 0
        noise: Tensor = torch.fft.irfft2(spectrum, s=(self.height, self.width))
        return noise / noise.std(dim=(2, 3), keepdim=True, correction=0).clamp_min(1e-6)

    def _pick(self, values: Tensor, count: int) -> Tensor:
        """``count`` of the values, drawn with replacement."""
        return values[torch.randint(len(values), (count,), generator=self.pixel_rng, device=self.device)]

    def _between(self, bounds: tuple[float, float], *size: int) -> Tensor:
        """Uniform between the bounds."""
        return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(size, generator=self.pixel_rng, device=self.device)

    def _uniform(self, count: int, low: float = 0.0, high: float = 1.0, *, channels: int = 1) -> Tensor:
        """(N, channels, 1, 1) between the bounds."""
        return self._between((low, high), count, channels, 1, 1)
