"""Contract fields from JSON files that are published beside weights: timm's and Hugging Face's. Free of torch."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from dfadc.contract import ContractFields
from dfadc.errors import DfadcError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

#: Names that published weights have. Beside a file of another name such a JSON may describe another network.
PUBLISHED_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
#: Values of ``resample``, which are Pillow's.
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
#: Class names that transformers makes up.
_UNNAMED = re.compile(r"LABEL_\d+")
_WHOLE_RANGE = 255.0
_SQUASHED_FROM = 384


def read_published_configs(weights: Path) -> list[tuple[str, ContractFields]]:
    """Name and contract fields of each configuration beside published weights.

    Raises:
        DfadcError: a value in one of them is malformed.
    """
    if weights.name not in PUBLISHED_WEIGHTS:
        return []
    # An image processor states the images of this very network; transformers' own configuration those it began with.
    readers: dict[str, Callable[[Mapping[str, Any]], ContractFields]] = {
        "config.json": _of_timm,
        "preprocessor_config.json": _of_image_processor,
        "config.json of transformers": _of_transformers,
    }
    found = []
    for name, reader in readers.items():
        path = weights.parent / name.partition(" ")[0]
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
                fields = reader(config if isinstance(config, dict) else {})
            except (DfadcError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as exc:
                raise DfadcError(f"{path} is malformed: {exc!r}", "correct the value, or remove the file") from exc
            if fields != ContractFields():
                found.append((name, fields))
    return found


def timm_fields(documented: Mapping[str, Any], class_names: list[str] | None = None) -> ContractFields:
    """Statements of a timm ``pretrained_cfg``; no preprocessing for ``crop_mode`` border, which pads with a mean."""
    known = {name: documented[name] for name in ("input_size", "mean", "std") if documented.get(name)}
    resize = {"center": "cover", "squash": "squash"}.get(documented.get("crop_mode") or "center")
    if resize is not None and documented.get("crop_pct"):
        interpolation = documented.get("interpolation") or "bicubic"
        preprocessing = {"resize": resize, "crop_share": documented["crop_pct"], "interpolation": interpolation}
        known["preprocessing"] = preprocessing
    return ContractFields.from_dict({**known, "class_names": class_names})


def _of_timm(config: Mapping[str, Any]) -> ContractFields:
    """Statements of timm's ``config.json``; empty where it is another library's."""
    names = config.get("label_names")
    is_full = isinstance(names, list) and len(names) == config.get("num_classes")
    documented = config.get("pretrained_cfg")
    return timm_fields(documented, names if is_full else None) if documented else ContractFields()


def _of_transformers(config: Mapping[str, Any]) -> ContractFields:
    """Statements of transformers' ``config.json``; empty where it is another library's."""
    known: dict[str, Any] = {}
    if "model_type" not in config:
        return ContractFields()
    by_index = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    names = [by_index[index] for index in range(len(by_index))]
    if any(not _UNNAMED.fullmatch(name) for name in names) and len(set(names)) == len(names):
        known["class_names"] = names
    if size := config.get("image_size"):
        height, width = size if isinstance(size, list) else (size, size)
        known["input_size"] = [config.get("num_channels", 3), height, width]
    return ContractFields.from_dict(known)


def _of_image_processor(config: Mapping[str, Any]) -> ContractFields:
    """Statements of an image processor's ``preprocessor_config.json``; the value range is part of mean and std."""
    known: dict[str, Any] = {}
    mean, std = config.get("image_mean"), config.get("image_std")
    if not config.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if mean and std and not config.get("rescale_offset"):
        factor = config.get("rescale_factor", 1 / _WHOLE_RANGE) if config.get("do_rescale", True) else 1.0
        known["mean"], known["std"] = ([value / (_WHOLE_RANGE * factor) for value in values] for values in (mean, std))
    if config.get("do_resize", True) and (sizes := _sizes(config)):
        resize, before, crop = sizes
        known["input_size"] = [len(mean or "RGB"), *crop]
        if "resample" in config:  # Without it the library's class decides.
            known["preprocessing"] = {
                "resize": resize,
                "crop_share": crop[0] / before[0],
                "interpolation": _RESAMPLE[config["resample"]],
                "channel_order": "BGR" if config.get("do_flip_channel_order") else "RGB",
            }
    return ContractFields.from_dict(known)


def _sizes(config: Mapping[str, Any]) -> tuple[str, Sequence[int], Sequence[int]] | None:
    """Kind of resize, (height, width) that it makes, and the crop; None where images keep any proportions."""
    size, crop_pct = config.get("size"), config.get("crop_pct")
    crop = _pair(config["crop_size"]) if config.get("do_center_crop") and config.get("crop_size") else None
    if isinstance(size, dict) and "shortest_edge" in size:
        size = size["shortest_edge"]
    elif isinstance(size, dict) or not (crop or crop_pct):
        return ("squash", _pair(size), crop or _pair(size)) if size else None
    if size and crop:
        return "cover", _pair(size), crop
    if not size or not crop_pct:
        return None
    # ConvNeXt's: the share counts below 384 px only, where the proportions are kept.
    enlarged = size < _SQUASHED_FROM
    return ("cover", _pair(int(size / crop_pct)), _pair(size)) if enlarged else ("squash", _pair(size), _pair(size))


def _pair(size: Any) -> tuple[int, int]:
    """(height, width) of one number or of a table."""
    return (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
