"""Arguments that a training framework saved beside the weights: architecture, image size, mean, std, class names.

They are read from timm's and torchvision's scripts (``args``), PyTorch Lightning (``hyper_parameters``), the MM
libraries (``meta``) and any dictionary with the usual names. Weights are facts and win over them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError
from dfadc.networks.names import documented_contract
from dfadc.preprocessing import Preprocessing
from dfadc.teacher.unpickle import Record

#: Keys of a checkpoint under which arguments are saved.
_CONTAINERS = (
    "args", "hyper_parameters", "hparams", "config", "cfg", "opt", "options", "meta", "dataset_meta", "model_args",
    "model_config", "train_args", "model", "data", "datamodule_hyper_parameters", "preprocessing", "data_preprocessor",
)  # fmt: skip
_ARCHITECTURE = ("arch", "architecture", "model_name", "model", "backbone", "encoder_name", "network", "net", "type")
_SIZE = ("val_crop_size", "input_size", "img_size", "image_size", "imsize", "img_dim", "resolution", "crop_size")
_STATISTICS = (("mean", "std"), ("image_mean", "image_std"), ("img_mean", "img_std"), ("norm_mean", "norm_std"))
_CLASSES = ("class_names", "classes", "CLASSES", "labels", "idx_to_class", "class_to_idx")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_WANTED = {
    *(*_ARCHITECTURE, *_SIZE, *_CLASSES, *(name for pair in _STATISTICS for name in pair)),
    *("crop_pct", "val_resize_size", "interpolation"),
}
_DEPTH = 4


@dataclass(frozen=True, slots=True)
class TrainingArguments:
    """Arguments as one checkpoint holds them.

    Args:
        source: framework and key, for the user.
        values: name -> plain value.
        is_timm: whether timm's training script wrote them.
        is_reference: whether torchvision's did.
    """

    source: str
    values: Mapping[str, Any]
    is_timm: bool = False
    is_reference: bool = False

    @property
    def architectures(self) -> tuple[str, ...]:
        """Names under which the network may be known; hints only."""
        names = [self.values[key] for key in _ARCHITECTURE if isinstance(self.values.get(key), str)]
        # timm's own network, where its script wrote the file: torchvision may have another of that name.
        return tuple(f"timm:{name}" for name in names if self.is_timm) + tuple(names)

    @property
    def side(self) -> tuple[int, int] | None:
        """(H, W) of the images."""
        return next((size for key in _SIZE if (size := _pair(self.values.get(key)))), None)

    def to_fields(self, *, channels: int | None, num_classes: int | None) -> ContractFields:
        """The contract's fields, as far as they fit the weights' channels and classes."""
        documented = ContractFields()
        if self.is_timm:  # its script used the network's own defaults for what its arguments leave open
            with contextlib.suppress(DfadcError):
                documented = documented_contract(f"timm:{self.values.get('model', '')}")
        channels = channels or 3
        side = self.side or (documented.input_size[1:] if documented.input_size else None)
        mean, std = self._statistics(channels)
        if mean is None and documented.mean is not None and len(documented.mean) == channels:
            mean, std = documented.mean, documented.std
        names = self._class_names()
        return ContractFields(
            input_size=None if side is None else (channels, *side),
            mean=mean,
            std=std,
            class_names=names if names and len(names) == num_classes else None,
            preprocessing=self._preprocessing(side) or documented.preprocessing,
        )

    def _statistics(self, channels: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        for names in _STATISTICS:
            mean, std = (_floats(self.values.get(name), channels) for name in names)
            if mean and std and min(std) > 0:
                factor = 255 if max(*map(abs, mean), *std) > 1 else 1
                return tuple(value / factor for value in mean), tuple(value / factor for value in std)
        if self.is_reference and channels == 3:
            return IMAGENET["mean"], IMAGENET["std"]
        return None, None

    def _class_names(self) -> tuple[str, ...] | None:
        for key in _CLASSES:
            value = self.values.get(key)
            if isinstance(value, Mapping) and value:
                pairs = [(index, name) if isinstance(name, str) else (name, index) for name, index in value.items()]
                by_index = {index: name for index, name in pairs if isinstance(index, int)}
                value = [by_index.get(index) for index in range(len(pairs))]
            if isinstance(value, Sequence) and len(value) > 1 and all(isinstance(name, str) for name in value):
                return tuple(value)
        return None

    def _preprocessing(self, side: tuple[int, int] | None) -> Preprocessing | None:
        share = self.values.get("crop_pct")
        resized = self.values.get("val_resize_size")
        if isinstance(resized, int) and resized > 0 and side is not None:
            share = side[0] / resized
        interpolation = str(self.values.get("interpolation") or "bilinear")
        if isinstance(share, int | float) and not isinstance(share, bool):
            with contextlib.suppress(DfadcError):
                return Preprocessing(crop_share=float(share), interpolation=interpolation)  # type: ignore[arg-type]
        return None


def read_training_arguments(value: object) -> TrainingArguments | None:
    """The arguments in an unpickled checkpoint; None where it holds none."""
    if not isinstance(value, Mapping):
        return None
    found: dict[str, Any] = {}
    for key, entry in _entries(value):
        if key in _WANTED and entry is not None:
            found.setdefault(key, entry)
    if not found:
        return None
    keys = [key for key in _CONTAINERS if _arguments_in(value.get(key)) is not None]
    arguments = plain(value.get("args"))
    names = arguments.keys() if isinstance(arguments, Mapping) else set()
    is_timm = {"model", "crop_pct"} <= names and bool({"in_chans", "gp", "drop_path"} & names)
    is_reference = not is_timm and {"model", "data_path"} <= names
    kind = "the checkpoint"
    if "pytorch-lightning_version" in value:
        kind = "PyTorch Lightning"
    elif is_timm or is_reference:
        kind = "timm's training script" if is_timm else "torchvision's reference script"
    place = f" ({', '.join(keys[:3])})" if keys else ""
    return TrainingArguments(f"arguments of {kind}{place}", found, is_timm, is_reference)


def plain(value: object) -> object:
    """A record as plain values: its attributes and entries; omegaconf's nodes as what they hold."""
    if not isinstance(value, Record):
        return value
    attributes = value.attributes
    if "_content" in attributes:
        content = plain(attributes["_content"])
        if isinstance(content, Mapping):
            return {key: plain(entry) for key, entry in content.items()}
        return [plain(entry) for entry in content] if isinstance(content, list) else content
    if "_val" in attributes:
        return plain(attributes["_val"])
    if value.elements and not attributes and not value.entries:
        return value.elements
    return attributes | {key: entry for key, entry in value.entries.items() if isinstance(key, str)}


def _arguments_in(value: object) -> Mapping[Any, Any] | None:
    """A mapping of arguments; None for a mapping that holds weights."""
    found = plain(value)
    if isinstance(found, Mapping) and not any(isinstance(entry, Tensor) for entry in found.values()):
        return found
    return None


def _entries(value: Mapping[Any, Any], depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """Names and plain values, those of the containers first."""
    for key in _CONTAINERS:
        inner = _arguments_in(value.get(key))
        if inner is not None and depth:
            if key in ("model", "backbone") and isinstance(inner.get("name"), str):
                yield "model_name", inner["name"]
            yield from _entries(inner, depth - 1)
    for key, entry in value.items():
        if isinstance(key, str):
            yield key, plain(entry)


def _pair(value: object) -> tuple[int, int] | None:
    """(H, W) of one number, of two, or of three with the channels first or last."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value) if 4 <= value <= 4096 else None
    if isinstance(value, Sequence) and all(isinstance(entry, int) for entry in value):
        sides = list(value)
        if len(sides) == 3:
            sides = sides[1:] if sides[0] <= 16 else sides[:2]
        if len(sides) == 2 and all(4 <= side <= 4096 for side in sides):
            return sides[0], sides[1]
    return None


def _floats(value: object, channels: int) -> tuple[float, ...] | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and channels == 1:
        value = (value,)
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == channels:
        numbers = [entry for entry in value if isinstance(entry, int | float) and math.isfinite(entry)]
        return tuple(map(float, numbers)) if len(numbers) == channels else None
    return None
