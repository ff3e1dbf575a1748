"""Image contract: size, range and classes of a network's inputs and outputs. Free of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from dfadc.errors import DfadcError
from dfadc.preprocessing import Preprocessing

Task = Literal["classification", "multilabel", "segmentation"]

#: How far from the pixel bounds [0, 1] a value may lie when mean and std are unknown, in standard deviations.
STANDARDISED_BOUND = 3.0

#: A std above this is of pixels in 0..255: that of pixels in [0, 1] is 0.5 at most, and 1 where it is no std at all.
LARGEST_STD = 2.0


@dataclass(frozen=True, slots=True)
class ImageContract:
    """Images that a network takes, and logits that it gives.

    Args:
        input_size: (C, H, W) of one image.
        num_classes: K, the length of the logits.
        mean: per-channel mean of pixels in [0, 1]; None where unknown.
        std: per-channel standard deviation of pixels in [0, 1]; None together with ``mean``.
        class_names: K names in the order of the logits, or None.
        task: what the logits are: (N, K) for classification, of which the highest counts; (N, K) for multilabel, each
            that of one label's sigmoid, which is on above 0; (N, K, H, W) for segmentation.
        preprocessing: how photographs become such images, or None. It changes nothing of what the network takes, so
            contracts that differ in it alone are equal.

    Raises:
        DfadcError: a value is impossible or two values contradict each other.
    """

    input_size: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None
    task: Task = "classification"
    preprocessing: Preprocessing | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        channels, height, width = self.input_size
        if min(channels, height, width) < 1:
            raise DfadcError(f"input size {self.input_size} has a side below 1", "give it as CxHxW, e.g. 3x32x32")
        if self.num_classes < 2:
            raise DfadcError(
                f"the teacher has num_classes = {self.num_classes}; distillation needs at least 2",
                "a single output (regression or a sigmoid) has no classes to agree on",
            )
        if (self.mean is None) != (self.std is None):
            raise DfadcError("mean and std must be given together", "pass both --mean and --std")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != channels:
                raise DfadcError(
                    f"{name} has {len(values)} values for {channels} channels (input size {self.input_size})",
                    f"give {channels} comma-separated values",
                )
            if values is not None and not all(map(math.isfinite, values)):
                raise DfadcError(f"{name} must be finite, got {values}")
        if self.std is not None and min(self.std) <= 0:
            raise DfadcError(f"std must be above 0, got {self.std}")
        if self.mean is not None and self.std is not None:
            _check_unit(self.mean, self.std)
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise DfadcError(f"{len(self.class_names)} class names for {self.num_classes} classes")

    @property
    def channels(self) -> int:
        """C, the number of image channels."""
        return self.input_size[0]

    @property
    def is_dense(self) -> bool:
        """True where every pixel has a class of its own."""
        return self.task == "segmentation"

    @property
    def has_pixels(self) -> bool:
        """True where mean and std are known, so that images can be turned into pixels and back."""
        return self.mean is not None

    def value_range(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Lowest and highest normalised value a real image can take, per channel.

        Where mean and std are unknown this is ±3 standard deviations.
        """
        if self.mean is None or self.std is None:
            return (-STANDARDISED_BOUND,) * self.channels, (STANDARDISED_BOUND,) * self.channels
        pairs = list(zip(self.mean, self.std, strict=True))
        return tuple((0.0 - m) / s for m, s in pairs), tuple((1.0 - m) / s for m, s in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of :meth:`from_dict`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def to_json(self) -> str:
        """One line of JSON with sorted keys, for file metadata."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageContract:
        """Builds a contract from plain JSON values.

        Raises:
            DfadcError: a field is missing, unknown or has the wrong type.
        """
        return ContractFields.from_dict(values).complete()


@dataclass(frozen=True, slots=True)
class ContractFields:
    """Some fields of a contract, as one source knows them; None means "this source does not say"."""

    input_size: tuple[int, int, int] | None = None
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None
    task: Task | None = None
    preprocessing: Preprocessing | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ContractFields:
        """Reads plain JSON or TOML values.

        Raises:
            DfadcError: a field is unknown or has the wrong type.
        """
        if unknown := sorted(set(values) - set(_READERS)):
            raise DfadcError(f"unknown contract field {unknown[0]!r}", f"known fields: {', '.join(sorted(_READERS))}")
        try:
            return cls(**{name: _READERS[name](value) for name, value in values.items() if value is not None})
        except (OverflowError, TypeError, ValueError) as exc:
            raise DfadcError(f"malformed contract: {exc}") from exc

    def complete(self) -> ImageContract:
        """The full contract.

        Raises:
            DfadcError: input size or number of classes is missing.
        """
        if self.input_size is None:
            raise DfadcError("the input size is unknown", "pass --input-size CxHxW, e.g. --input-size 3x32x32")
        if self.num_classes is None:
            raise DfadcError("the number of classes is unknown", "pass --num-classes K")
        values: dict[str, Any] = {member.name: getattr(self, member.name) for member in fields(self)}
        return ImageContract(**{**values, "task": self.task or "classification"})


def _check_unit(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Refuses a mean and std of pixels in 0..255: by them every image is nearly the same to a network.

    A mean lies among the pixels. A std is 0.5 at most, but also serves as a factor: 1 leaves pixels in [0, 1], 1/255
    makes them 0..255.
    """
    is_mean_wrong, is_std_wrong = max(map(abs, mean)) > 1, max(std) > LARGEST_STD
    if not (is_mean_wrong or is_std_wrong):
        return
    # A std of 1 beside a mean in 0..255 subtracts the mean alone; one below 1 is already of pixels in [0, 1].
    divides_std = is_std_wrong or max(std) >= 1
    right = {
        "mean": [m / 255 for m in mean] if is_mean_wrong else mean,
        "std": [s / 255 for s in std] if divides_std else std,
    }
    parts = " and ".join(name for name, wrong in (("mean", is_mean_wrong), ("std", divides_std)) if wrong)
    flags = " ".join(f"--{name} {','.join(f'{value:.4g}' for value in values)}" for name, values in right.items())
    raise DfadcError(
        f"mean {_shown(mean)} and std {_shown(std)} are of pixels in 0..255; a contract's are of pixels in [0, 1]",
        f"divide the {parts} by 255: {flags}",
    )


def _shown(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def merge_fields(sources: Mapping[str, ContractFields]) -> tuple[ContractFields, dict[str, str]]:
    """Takes each field from the first source that knows it.

    ``mean`` and ``std`` travel together, so a pair is never mixed from two sources.

    Args:
        sources: name of the source (as printed to the user) -> what it says, the strongest first.

    Returns:
        The merged fields, and for every known field the name of its source.

    Raises:
        DfadcError: a source gives only one of mean and std.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, known in sources.items():
        if (known.mean is None) != (known.std is None):
            raise DfadcError(f"{source} gives only one of mean and std", "give both")
        for name in (member.name for member in fields(ContractFields)):
            value = getattr(known, name)
            if value is not None and name not in merged:
                merged[name] = value
                origin[name] = source
    return ContractFields(**merged), origin


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise TypeError(f"{value!r} is not a whole number")
    return int(value)


def _listed(values: Any) -> list[Any]:
    if isinstance(values, str | bytes):
        raise TypeError(f"{values!r} is text, not a list")
    return list(values)


def _size(values: Any) -> tuple[int, ...]:
    size = tuple(map(_whole, _listed(values)))
    if len(size) != 3:
        raise ValueError(f"input_size has {len(size)} values, not 3 (C, H, W)")
    return size


def _task(value: Any) -> str:
    if value not in get_args(Task):
        raise ValueError(f"task {value!r} is none of {', '.join(get_args(Task))}")
    return str(value)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(map(float, _listed(values)))


def _preprocessing(values: Any) -> Preprocessing:
    if not isinstance(values, Mapping):
        raise TypeError(f"preprocessing is {values!r}, not a table of fields")
    return Preprocessing.from_dict(values)


#: Field -> function that reads its plain JSON value.
_READERS: dict[str, Callable[[Any], Any]] = {
    "input_size": _size,
    "num_classes": _whole,
    "mean": _floats,
    "std": _floats,
    "class_names": lambda values: tuple(map(str, _listed(values))),
    "task": _task,
    "preprocessing": _preprocessing,
}
