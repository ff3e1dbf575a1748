"""Architecture names -> modules: torchvision, timm, a user's own factory, and our networks."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model, list_models

from dfadc.contract import ContractFields, ImageContract
from dfadc.errors import DfadcError, RequirementMissing
from dfadc.models.networks import NETWORKS, find_network
from dfadc.models.stems import Stem, adapt_channels_, apply_small_stem_

Library = Literal["own", "torchvision", "timm", "factory"]

#: Names as the field writes them -> names as torchvision does.
ALIASES = {"mobilenetv2": "mobilenet_v2", "mobilenetv3": "mobilenet_v3_large", "shufflenetv2": "shufflenet_v2_x1_0"}


@dataclass(frozen=True, slots=True)
class ArchitectureName:
    """A resolved name: where the network comes from and what it is called there."""

    library: Library
    name: str

    @property
    def canonical(self) -> str:
        """The one spelling that is written to files, e.g. ``torchvision:mobilenet_v2`` or ``lenet5``."""
        return self.name if self.library in ("own", "factory") else f"{self.library}:{self.name}"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A freshly initialised network.

    Args:
        module: images (N, C, H, W) -> its outputs, in training mode.
        name: canonical name; building it again gives the same layers.
        stem: what was built, which is ``default`` where no small stem is known.
        notes: what was adapted, for the user.
    """

    module: nn.Module
    name: str
    stem: Stem
    notes: tuple[str, ...] = ()


@functools.cache
def torchvision_classifiers() -> tuple[str, ...]:
    """Names of torchvision's image classifiers."""
    return tuple(str(name) for name in list_models(module=torchvision.models))


@functools.cache
def torchvision_segmenters() -> tuple[str, ...]:
    """Names of torchvision's semantic segmentation networks, which may be teachers."""
    return tuple(str(name) for name in list_models(module=torchvision.models.segmentation))


def training_only_prefixes(canonical: str) -> tuple[str, ...]:
    """Where torchvision keeps classifiers that only training uses; they are not built, and their weights left out."""
    known = {"torchvision:googlenet": ("aux1.", "aux2."), "torchvision:inception_v3": ("AuxLogits.",)}
    library, _, name = canonical.partition(":")
    if library == "torchvision" and name in torchvision_segmenters():
        return ("aux_classifier.",)
    return known.get(canonical, ())


def resolve_architecture(name: str) -> ArchitectureName:
    """Finds out what a name means, without building anything.

    Bare names are looked up among our own networks first, then in torchvision.

    Raises:
        DfadcError: nobody knows the name; the hint gives the nearest ones.
        RequirementMissing: a timm name where timm is not installed.
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix == "torchvision":
        if rest in torchvision_classifiers() or rest in torchvision_segmenters():
            return ArchitectureName("torchvision", rest)
        raise _unknown(name, torchvision_classifiers(), rest)
    if colon and prefix == "timm":
        timm = _import_timm()
        # A tag such as resnet18.a1_in1k chooses weights, which are never fetched.
        if timm.is_model(rest):
            return ArchitectureName("timm", rest)
        raise _unknown(name, timm.list_models(), rest)
    if colon:
        return ArchitectureName("factory", name)
    if find_network(name) is not None:
        return ArchitectureName("own", name)
    bare = ALIASES.get(name, name)
    if bare in torchvision_classifiers():
        return ArchitectureName("torchvision", bare)
    raise _unknown(name, [*NETWORKS, *ALIASES, *torchvision_classifiers()], name)


def build_architecture(
    name: str, contract: ImageContract, *, stem: Stem = "default", device: str = "cpu"
) -> Architecture:
    """Builds a network with random weights for the contract's channels, size and classes.

    Args:
        name: as :func:`resolve_architecture` takes it.
        contract: the images and classes to build for.
        stem: ``small`` removes early strides until the total stride is 8; our own networks and the user's
            factories are built as they are.
        device: ``cpu``, or ``meta`` for shapes without weights.

    Raises:
        DfadcError: the name is unknown, or the network cannot be built for this contract.
    """
    resolved = resolve_architecture(name)
    notes: list[str] = []
    with torch.device(device) if device != "meta" else _WeightsOnMeta():
        module = _construct(resolved, contract)
        if device == "meta":
            module = module.to(device)
        if resolved.library == "torchvision" and adapt_channels_(module, contract.channels):
            notes.append(f"first convolution takes {contract.channels} channels")
        if stem == "small":
            note = None
            if resolved.library in ("torchvision", "timm"):
                note = apply_small_stem_(module, contract.channels)
            stem = "default" if note is None else "small"
            notes.append(note or f"no small stem known for {resolved.canonical}: default stem")
    return Architecture(module, resolved.canonical, stem, tuple(notes))


def documented_contract(name: str) -> ContractFields:
    """What the architecture's library documents of its own pretrained weights; nothing is downloaded.

    Empty for our networks, factories, and torchvision networks without weights.
    """
    resolved = resolve_architecture(name)
    if resolved.library == "torchvision":
        weights = torchvision.models.get_model_weights(resolved.name)
        default = getattr(weights, "DEFAULT", None)
        if default is None:
            return ContractFields()
        transforms = default.transforms()
        crop = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
        side = None if not crop else int(crop[0])
        categories = tuple(str(category) for category in default.meta["categories"])
        return ContractFields(
            input_size=None if side is None else (3, side, side),
            num_classes=len(categories),
            mean=tuple(float(value) for value in transforms.mean),
            std=tuple(float(value) for value in transforms.std),
            # Some of torchvision's lists repeat a name, which is no harm.
            class_names=categories,
        )
    if resolved.library == "timm":
        documented = _import_timm().get_pretrained_cfg(resolved.name, allow_unregistered=True)
        if documented is None or not documented.input_size:
            return ContractFields()
        channels, height, width = documented.input_size
        return ContractFields(
            input_size=(int(channels), int(height), int(width)),
            num_classes=int(documented.num_classes) or None,
            mean=tuple(float(value) for value in documented.mean),
            std=tuple(float(value) for value in documented.std),
        )
    return ContractFields()


class _WeightsOnMeta(TorchFunctionMode):
    """Puts weights on the meta device and leaves the small tensors that a network computes its widths with.

    Under ``torch.device("meta")`` torchvision's RegNets cannot be built: they read numbers back from a tensor.
    """

    # Filling weights that have no memory only costs time.
    _FILLERS = frozenset({"normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_"})
    _CREATORS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].is_meta and func.__name__ in self._FILLERS:
            return args[0]
        if func in self._CREATORS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _construct(resolved: ArchitectureName, contract: ImageContract) -> nn.Module:
    try:
        if resolved.library == "own":
            network = find_network(resolved.name)
            assert network is not None, "resolve_architecture has found it"  # noqa: S101
            return network(contract)
        if resolved.library == "torchvision":
            return _construct_torchvision(resolved.name, contract)
        if resolved.library == "timm":
            return _construct_timm(resolved.name, contract)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as exc:
        raise DfadcError(
            f"{resolved.canonical} cannot be built for input size {_size(contract)}: {exc}",
            "choose another network or another --input-size; `dfadc students` lists what fits",
        ) from exc
    return _construct_from_factory(resolved.name, contract)


def _construct_torchvision(name: str, contract: ImageContract) -> nn.Module:
    channels, height, width = contract.input_size
    settings: dict[str, Any] = {"weights": None, "num_classes": contract.num_classes}
    if name in torchvision_segmenters():
        settings["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        settings |= {"aux_logits": False, "init_weights": False}
    if name.startswith("vit_"):
        if height != width:
            raise ValueError("it takes square images only")
        settings["image_size"] = height
    if name.startswith("maxvit"):
        settings["input_size"] = (height, width)
    module = get_model(name, **settings)
    if not isinstance(module, nn.Module):
        raise TypeError(f"torchvision gave a {type(module).__name__} for {channels} channels")
    return module


def _construct_timm(name: str, contract: ImageContract) -> nn.Module:
    timm = _import_timm()
    documented = timm.get_pretrained_cfg(name, allow_unregistered=True)
    settings: dict[str, Any] = {"num_classes": contract.num_classes, "in_chans": contract.channels}
    if documented is not None and documented.fixed_input_size:
        settings["img_size"] = contract.input_size[1:]
    module = timm.create_model(name, pretrained=False, **settings)
    if not isinstance(module, nn.Module):
        raise TypeError(f"timm gave a {type(module).__name__}")
    return module


def _construct_from_factory(name: str, contract: ImageContract) -> nn.Module:
    """Calls the user's factory with those of our keywords that its signature has.

    These are ``contract`` alone, or any of ``num_classes``, ``in_channels``/``in_chans``/``channels``, ``input_size``
    and ``image_size``/``img_size`` (the height). A factory that takes none of them is called without arguments.
    """
    factory = import_factory(name)
    offered: dict[str, Any] = {
        "num_classes": contract.num_classes,
        **dict.fromkeys(("in_channels", "in_chans", "channels"), contract.channels),
        "input_size": contract.input_size,
        **dict.fromkeys(("image_size", "img_size"), contract.input_size[1]),
    }
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError) as exc:
        raise DfadcError(f"{name} has no readable signature", "write it as a plain function") from exc
    if "contract" in parameters:
        offered = {"contract": contract}
    accepted = {key: value for key, value in offered.items() if key in parameters}
    try:
        module = factory(**accepted)
    except (RuntimeError, TypeError, ValueError) as exc:
        raise DfadcError(f"{name}({', '.join(accepted)}) failed: {exc}", "it is called with these keywords") from exc
    if not isinstance(module, nn.Module):
        raise DfadcError(f"{name} gave a {type(module).__name__}, not a torch.nn.Module")
    return module


def import_factory(name: str) -> Callable[..., object]:
    """Imports ``package.module:factory``; the working directory is on the path, as it is for ``python -m``.

    Raises:
        DfadcError: the module or the factory does not exist.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        found: object = importlib.import_module(module_name)
    except ImportError as exc:
        raise DfadcError(f"cannot import {module_name!r} of architecture {name!r}: {exc}", _NAME_FORMS) from exc
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise DfadcError(f"{module_name} has no callable {attribute!r}", _NAME_FORMS)
    return found


_NAME_FORMS = "write torchvision:NAME, timm:NAME, package.module:factory or a name of `dfadc students`"


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as exc:
        raise RequirementMissing("timm is not installed", 'pip install "dfadc[timm]"') from exc


def _unknown(name: str, known: Sequence[str], wanted: str) -> DfadcError:
    nearest = difflib.get_close_matches(wanted, known, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(nearest)}? " if nearest else ""
    return DfadcError(f"unknown architecture {name!r}", f"{hint}`dfadc students` lists the names")


def _size(contract: ImageContract) -> str:
    return "x".join(map(str, contract.input_size))
