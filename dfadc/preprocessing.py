"""Rule by which photographs become a network's images: resize, crop, interpolation, channel order. Free of Pillow."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Mapping

Resize = Literal["cover", "squash"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
ChannelOrder = Literal["RGB", "BGR"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "resize": get_args(Resize),
    "interpolation": get_args(Interpolation),
    "channel_order": get_args(ChannelOrder),
}
#: Above 1 the image is smaller than the crop and framed in black; timm documents up to 1.15.
_HIGHEST_SHARE = 2.0
#: 224 / (224 / 232) may lie a hair below 232.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Steps of a teacher's evaluation before its mean and std; the values' range is theirs.

    Args:
        resize: "cover" keeps the proportions, "squash" does not.
        crop_share: side of the centre crop, of which the input size is, as a share of the resized image's.
        interpolation: of the resize, by Pillow's names; Pillow smooths before it makes smaller.
        channel_order: of the network's three channels.

    Raises:
        DfadcError: a value is unknown or out of range.
    """

    resize: Resize = "cover"
    crop_share: float = 1.0
    interpolation: Interpolation = "bilinear"
    channel_order: ChannelOrder = "RGB"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise DfadcError(f"preprocessing has {name} {value!r}", f"known: {', '.join(known)}")
        if not 0 < self.crop_share <= _HIGHEST_SHARE:
            raise DfadcError(
                f"preprocessing has crop_share {self.crop_share}, not above 0 and up to {_HIGHEST_SHARE:g}",
                "224 px cropped out of 256 px is 0.875",
            )

    def resized(self, width: int, height: int, *, crop: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that an image of ``width`` x ``height`` is resized to before the ``crop`` (height, width).

        Of a square crop it is torchvision's Resize of the shorter side, to the pixel.
        """
        target_height, target_width = (math.floor(side / self.crop_share + _ROUNDING) for side in crop)
        if self.resize == "squash":
            return target_width, target_height
        if target_width * height >= target_height * width:
            return target_width, max(target_height, int(target_width * height / width))
        return max(target_width, int(target_height * width / height)), target_height

    def describe(self, crop: tuple[int, int]) -> str:
        """The steps in words, for a ``crop`` of (height, width)."""
        width, height = self.resized(crop[1], crop[0], crop=crop)
        size = f"{width}x{height}" if self.resize == "squash" or crop[0] != crop[1] else f"{width} px"
        steps = {"cover": f"shorter side to {size}", "squash": f"squashed to {size}"}[self.resize]
        if self.resize == "cover" and crop[0] != crop[1]:
            steps = f"resized to cover {size}"
        order = "" if self.channel_order == "RGB" else f", {self.channel_order}"
        return f"{steps} ({self.interpolation}), centre {crop[1]}x{crop[0]}{order}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Reads plain JSON or TOML values.

        Raises:
            DfadcError: a field is unknown, or its value is.
            TypeError, ValueError: a value has the wrong type.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise DfadcError(f"unknown preprocessing field {unknown[0]!r}", f"known fields: {', '.join(known)}")
        return cls(**{**values, "crop_share": float(values.get("crop_share", 1.0))})


#: Taken where nobody says how the teacher's images were made.
UNKNOWN = Preprocessing()
